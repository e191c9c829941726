"""Imports point one way.

formats knows nobody, nor does storage, but for errors; converter and runtime know both, pipelines may know all.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "formats": {"formats"},
    "storage": {"storage", "formats.errors", "version"},
    "converter": {"converter", "formats", "storage", "version"},
    "runtime": {"runtime", "formats", "storage"},
    "pipelines": {"pipelines", "converter", "runtime", "formats", "storage", "version"},
}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "df11"
                else [node.module or ""]
            )
            if node.module == "df11.formats":
                names = [f"df11.formats.{alias.name}" for alias in node.names]
        rooms |= {name.removeprefix("df11.") for name in names if name.startswith("df11.")}
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = imported_rooms(path)
        if path.name == "kernels.py":  # Only that module calls the extension, so that every call has types.
            rooms -= {"_kernels"}
        unknown = {name for name in rooms if not {name, name.partition(".")[0]} & ALLOWED[room]}
        assert not unknown, path


def test_modules_stay_readable() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
