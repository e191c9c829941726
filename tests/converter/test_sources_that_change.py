"""A source that somebody writes to while it is converted: it is noticed, even if its times are set back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import df11
from df11.formats import errors
from tests.support import sources
from tests.support.sources import SEGMENT, bf16


def test_times_that_are_set_back_are_noticed(tmp_path: Path) -> None:
    source = sources.write(tmp_path / "x.safetensors", [bf16("a", (3 * SEGMENT,))])
    before = source.stat()
    changed: list[bool] = []

    def change(_: int) -> None:
        if not changed:
            changed.append(True)
            with source.open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"\1\2")
            os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(errors.ConflictError, match="changed"):
        df11.convert(source, tmp_path / "x.df11", threads=1, on_progress=change)
    assert source.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_source_that_was_replaced_is_converted_as_it_was(tmp_path: Path) -> None:
    source = sources.write(tmp_path / "x.safetensors", [bf16("a", (3 * SEGMENT,))])
    original = source.read_bytes()
    replaced: list[bool] = []

    def replace(_: int) -> None:
        if not replaced:
            replaced.append(True)
            other = sources.write(tmp_path / "other.safetensors", [bf16("a", (3 * SEGMENT,), 1)])
            other.replace(source)

    try:
        df11.convert(source, tmp_path / "x.df11", threads=1, on_progress=replace)
    except errors.ConflictError:
        assert not (tmp_path / "x.df11").exists()  # Its number of links has changed, which is a change.
        return
    (tmp_path / "original.safetensors").write_bytes(original)
    df11.verify(tmp_path / "x.df11", tmp_path / "original.safetensors")
