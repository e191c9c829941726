"""Every function that takes a path, with every path that cannot be used: a Df11Error, and nothing else."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import df11
from df11 import runtime
from df11.converter import parquet
from df11.formats import errors
from df11.pipelines import job, report, transfer
from tests.support import sources
from tests.support.sources import bf16

BAD = {
    "missing": "missing/x",
    "empty": "",
    "too long": "x" * 300,
    "too long on the way": f"{'x' * 300}/y",
    "null character": "a\0b",
    "half a surrogate pair": "a\ud800b",
    "loop": "loop",
    "below a loop": "loop/x",
    "below a file": "model.df11/x",
    "pipe": "pipe",
    "not a df11 name": "notes.txt",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = sources.write(tmp_path / "model.safetensors", [bf16("w", (64, 64))])
    df11.convert(source, tmp_path / "model.df11")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "notes.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


READ: dict[str, Callable[[str, Path], object]] = {
    "convert": lambda path, out: df11.convert(path, out / "new"),
    "convert, as bytes of a path": lambda path, out: df11.convert(Path(path), out / "new"),
    "verify": lambda path, _: df11.verify(path),
    "verify against": lambda path, out: df11.verify(out / "model.df11", path),
    "restore": lambda path, out: df11.restore(path, out / "new"),
    "open": lambda path, _: df11.open(path),
    "load_file": lambda path, _: runtime.load_file(path, device="cpu"),
    "manifest": lambda path, _: parquet.read(path),
    "report": lambda path, out: report.write_report(path, out / "new"),
    "read_job": lambda path, _: job.read_job(path),
    "push": lambda path, _: transfer.push(path, "me/m"),
}
WRITE: dict[str, Callable[[str, Path], object]] = {
    "convert": lambda path, out: df11.convert(out / "model.safetensors", path),
    "convert, forced": lambda path, out: df11.convert(out / "model.safetensors", path, force=True),
    "restore": lambda path, out: df11.restore(out / "model.df11", path),
    "report": lambda path, out: report.write_report(out / "model.df11", path),
}


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    return ((path.name, path.lstat().st_ino) for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("function", READ)
def test_reading(function: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "empty" and function in ("verify", "report"):
        return  # The folder where it is called.
    monkeypatch.chdir(folder)
    before = list(entries(folder))
    with pytest.raises(errors.Df11Error) as caught:
        READ[function](BAD[kind], folder)
    assert caught.value.exit_code in (2, 3, 4, 5)
    assert len(str(caught.value).splitlines()) == 1
    assert list(entries(folder)) == before


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind not in ("missing", "not a df11 name")])
@pytest.mark.parametrize("function", WRITE)
def test_writing(function: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (function, kind) == ("report", "empty"):
        return  # The folder where it is called.
    monkeypatch.chdir(folder)
    before = list(entries(folder))
    with pytest.raises(errors.Df11Error) as caught:
        WRITE[function](BAD[kind], folder)
    assert caught.value.exit_code in (2, 3, 4)
    assert len(str(caught.value).splitlines()) == 1
    assert list(entries(folder)) == before


ASKS = {
    *(
        "exists",
        "is_dir",
        "is_file",
        "is_symlink",
        "is_fifo",
        "resolve",
        "stat",
        "lstat",
        "samefile",
        "iterdir",
        "glob",
    ),
    *("rglob", "read_bytes", "read_text", "write_bytes", "write_text", "mkdir", "rmdir", "unlink", "touch", "rename"),
}
MAY = {("converter/terminal.py", "open")}
"""What asks for no path of a caller: the null device."""


def test_only_the_storage_room_asks_for_paths() -> None:
    """So that the next function cannot forget what a path may be: it has no other way than df11.storage.paths."""
    root = Path(__file__).parents[2]
    found = set()
    for path in [*(root / "converter").glob("*.py"), *(root / "pipelines").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute) and node.func.attr in ASKS:
                found.add((path.relative_to(root).as_posix(), node.func.attr))
            of_os = isinstance(node.func, ast.Attribute) and ast.unparse(node.func).startswith(("os.open", "os.stat"))
            if of_os or (isinstance(node.func, ast.Name) and node.func.id == "open"):
                found.add((path.relative_to(root).as_posix(), "open"))
    assert found <= MAY
