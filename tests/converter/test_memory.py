"""Memory stays within its bound, whatever the size of the file and its tensors. Time is never measured here."""

from __future__ import annotations

import pytest

import df11
from tests.support import commands, sources

pytestmark = pytest.mark.slow

BOUND = 256 << 20
SIZE = 300_000_000
"""Bytes of a file: more than the bound, so that anything that holds a whole file is found out."""


@pytest.fixture
def large(tmp_path):
    """A maker of one large file, which is removed with its container."""
    paths = [tmp_path / "x.safetensors", tmp_path / "x.df11", tmp_path / "y.safetensors"]

    def make(dtype, size=SIZE, **options):
        sources.write_large(paths[0], dtype, size, **options)
        return paths

    yield make
    for path in paths:
        path.unlink(missing_ok=True)


def test_the_measure_sees_memory():
    small = commands.peak_memory("--version")
    assert 10 << 20 < small < 200 << 20


@pytest.mark.parametrize(
    ("dtype", "options", "arguments"),
    [
        ("BF16", {}, []),
        ("BF16", {"uniform": True}, ["--jobs", "16"]),
        ("F32", {}, ["--cast", "bf16"]),
        ("F32", {"uniform": True}, ["--cast", "bf16", "--jobs", "16"]),
        ("F32", {}, []),
        ("F32", {"uniform": True}, ["--jobs", "16"]),
        ("F32", {"sparse": True}, []),
        ("F16", {"uniform": True}, ["--jobs", "16"]),
        ("I32", {"sparse": True}, []),
    ],
    ids=[
        *("weights", "random bits, many jobs", "cast", "cast of random bits, many jobs", "F32"),
        *("F32 of random bits, many jobs", "F32 that is BF16", "F16 of random bits, many jobs", "verbatim"),
    ],
)
def test_a_conversion(dtype, options, arguments, large):
    source, container, _ = large(dtype, **options)
    assert commands.peak_memory("convert", source, container, *arguments) <= BOUND
    with df11.open(container) as opened:
        assert (opened.source.bytes, len(opened)) == (source.stat().st_size, 1)


def test_the_bound_can_be_set(large):
    source, container, _ = large("BF16", 200_000_000)
    line = commands.run("convert", source, container, "--max-memory", "1MiB").error(6)
    needed = int(line.split("at least ")[1].split("MiB")[0])
    assert commands.peak_memory("convert", source, container, "--max-memory", f"{needed}MiB") <= needed << 20


def test_the_way_back(large):
    source, container, back = large("BF16")
    commands.run("convert", source, container, "--no-verify").fine()
    assert commands.peak_memory("verify", container) <= BOUND
    assert commands.peak_memory("verify", container, "--against", source) <= BOUND
    assert commands.peak_memory("restore", container, back) <= BOUND
    assert sources.sha256(back) == sources.sha256(source)
    # A finished output is recognized by hashing the source.
    assert commands.peak_memory("convert", source, container) <= BOUND
