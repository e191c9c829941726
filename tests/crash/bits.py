"""Flip bits of a container, one at a time: what is decoded stays the same, or ``verify`` says that it differs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import df11
from df11.converter.restore_file import restore_file, restored_layout
from df11.formats.container import Container
from tests.support import sources
from tests.support.sources import bf16, f32


@dataclass(frozen=True)
class Flips:
    """What became of the flipped bits."""

    bits: int
    noticed: int
    free: int
    """In the name of the program that wrote the file, which no reader may look at (SPEC.md, section 3)."""
    same: int
    """Another spelling of the same content: two bits of a compressed header that its decoder does not need."""
    missed: tuple[int, ...]
    """Bits that changed what is decoded, unnoticed."""


def make(folder: Path) -> Path:
    """A small container with a tensor of each encoding."""
    folder.mkdir(parents=True, exist_ok=True)
    source = sources.write(folder / "x.safetensors", [bf16("a", (20, 40), 1), f32("b", (5,), 2)])
    df11.convert(source, folder / "x.df11", force=True)
    with Container(folder / "x.df11") as container:
        assert {container.info(name).encoding for name in container.keys()} == {"df11", "verbatim"}
    return folder / "x.df11"


def decoded(path: Path) -> object:
    """All that a container says, but who wrote it."""
    with Container(path) as container:
        parts: list[bytes] = []
        sha256 = restore_file(
            container, restored_layout(container, bf16=False), lambda data: parts.append(bytes(data)), 1, lambda _: None
        )
        infos = [container.info(name) for name in container.keys()]
        return sha256, b"".join(parts), infos, container.source, container.source_header


def flip(path: Path, which: Iterable[int]) -> Flips:
    """Flip each of the bits alone, in a copy."""
    data, copy = bytearray(path.read_bytes()), path.with_name("flipped.df11")
    writer = re.search(rb'"df11.writer":"([^"]*)"', data)
    assert writer is not None
    whole = decoded(path)
    bits = noticed = free = same = 0
    missed = []
    for bit in which:
        bits += 1
        data[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(data)
        try:
            df11.verify(copy, threads=1)
            if decoded(copy) != whole:
                missed.append(bit)
            elif writer.start(1) <= bit // 8 < writer.end(1):
                free += 1
            else:
                same += 1
        except df11.Df11Error:
            noticed += 1
        data[bit // 8] ^= 1 << bit % 8
    copy.unlink()
    return Flips(bits, noticed, free, same, tuple(missed))
