"""Imports point one way.

formats knows nobody, nor does storage, but for errors; converter and runtime know both, pipelines may know all.
"""

import ast
import io
import keyword
import re
import tokenize
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


PLACES = {
    # What is done with files, bytes and text of strangers, and the only modules that do it: each has the limits and
    # checks that the next function would forget.
    r"\bos\.(open|rename|replace|remove|unlink|link|symlink|mkdir|makedirs|chmod)\(|\.(unlink|rename|rmdir|touch)\(": {
        "storage/atomic.py",
        "storage/download.py",
        "storage/journal.py",  # The journal, relative to the folder that is locked.
        "storage/hub.py",  # The lock of a staging folder.
        "storage/paths.py",
        "converter/terminal.py",  # The null device.
    },
    r"(?<![\w.])(?<!def )open\(": {"storage/atomic.py", "storage/hub.py", "storage/paths.py", "formats/container.py"},
    r"\.(read_text|read_bytes|write_text|write_bytes)\(": {
        "storage/hub.py",
        "converter/dfloat11/architectures.py",  # A table of this package.
        "runtime/gpu.py",  # The kernel's source, of this package.
        "runtime/omnigen2_classes.py",  # Modules that are imported right after.
    },
    r"\bjson\.loads?\(": {
        "formats/json_text.py",
        "converter/index.py",  # Text that it has read.
        "converter/restore_file.py",  # Text that df11 has made.
    },
    r"zstandard\.|zlib|gzip|bz2|lzma": {"formats/container.py", "converter/output.py"},
    r"\b(import|from) ?(huggingface_hub|httpx|requests|urllib\.request)": {
        "storage/answers.py",  # Its errors.
        "storage/client.py",
        "storage/hub.py",
        "storage/limits.py",
        "storage/ranges.py",
        "pipelines/card.py",  # Its model card.
        "runtime/hub.py",  # Its cache.
    },
    r"(?<!\w)print\(|\.(stdout|stderr)\.write\(|typer\.echo\(": {
        "converter/terminal.py",
        "converter/options.py",  # The version.
        "runtime/omnigen2.py",
    },
    r"\b(pickle|marshal|shelve)\b|(?<![\w.])(eval|exec|compile)\(": set(),
}


@pytest.mark.parametrize("pattern", PLACES)
def test_what_comes_from_strangers_has_one_place(pattern: str) -> None:
    found = set()
    for room in ALLOWED:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name != "formats/reference.py" and re.search(pattern, code_of(path)):
                found.add(name)
    assert found == PLACES[pattern]


def code_of(path: Path) -> str:
    """A module without its comments, docstrings and other texts."""
    kept = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.STRING:
            kept.append('""')
        elif token.type != tokenize.COMMENT:
            kept.append(token.string)
            kept.append(" " if token.type == tokenize.NAME and token.string in keyword.kwlist else "")
    return "".join(kept)


def test_modules_stay_readable() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
