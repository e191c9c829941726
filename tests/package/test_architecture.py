"""Imports point one way: formats knows nobody, converter and runtime know formats, pipelines may know all three."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "formats": {"formats"},
    "converter": {"converter", "formats", "version"},
    "runtime": {"runtime", "formats"},
    "pipelines": {"pipelines", "converter", "runtime", "formats", "version"},
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
        rooms |= {name.split(".")[1] for name in names if name.startswith("df11.")}
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = imported_rooms(path)
        if path.name == "kernels.py":  # Only it calls the extension, so that every call has types.
            rooms -= {"_kernels"}
        assert rooms <= ALLOWED[room], path


def test_modules_stay_readable() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
