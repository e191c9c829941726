"""Files made to harm: what they unfold to stays small, no foreign exception gets out, messages stay on their line."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import df11
from df11.formats import errors, framing, layout
from df11.formats.container import Container
from tests.vectors import forge, make_must_fail

ENTRY = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":['
TENSOR = forge.Tensor("a", "U8", (1,), b"x")


def bomb(header: bytes, padding: int = 0) -> bytes:
    """A container whose source header is this one, compressed; ``padding`` makes the container's own header larger."""
    frame = zstandard.ZstdCompressor(level=19).compress(header)

    def edit(document: dict[str, Any]) -> None:
        document["__metadata__"]["df11.source_header"] = base64.b64encode(frame).decode()
        document["__metadata__"]["padding"] = "x" * padding
        with forge.json_value(document, "df11.source") as source:
            source["header_bytes"] = len(header)
            source["bytes"] = 8 + len(header) + 1

    return forge.container([TENSOR], edit=edit)


def filled(unit: bytes, size: int) -> bytes:
    """A source header of about this size, whose tensor has a member with many values."""
    return ENTRY + unit * ((size - len(ENTRY) - 4) // len(unit)) + b"0]}}"


READ = """
import re, sys, time, df11
def peak():  # Of this program: what getrusage says includes that of the one it was started by.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
started, before = time.process_time(), peak()
for act in (df11.verify, lambda path: df11.restore(path, path + ".out")):
    try:
        act(sys.argv[1])
    except df11.Df11Error as error:
        print(type(error).__name__)
print(time.process_time() - started, peak() - before)
"""

NESTED = b"[" * 60 + b"]" * 60 + b","
LARGEST = layout.most_source_header(980_000)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    "header",
    [
        filled(b"[],", 90_000_000),
        filled(b"[],", LARGEST - 1000),
        filled(NESTED, LARGEST - 1000),
        filled(b'{"":0},', LARGEST - 1000),
        filled(b'{"":0},', 300_000),
        b'{"__metadata__":{"a":"'
        + "\N{GRINNING FACE}".encode() * ((LARGEST - 1000) // 4)
        + b'"},'
        + filled(b"0,", 200)[1:],
    ],
    ids=["lists-90-MB", "lists", "nested", "objects", "few-objects", "one-string"],
)
def test_a_small_container_takes_little_memory(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "bomb.df11"
    path.write_bytes(bomb(header, padding=980_000))
    assert path.stat().st_size < 1_000_000
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True, timeout=60)
    seconds, memory = map(float, done.stdout.split()[-2:])
    assert memory < 200 << 10  # KiB, besides some 50 MiB of Python and NumPy.
    assert seconds < 10


def test_a_source_header_in_proportion_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.df11"
    header = b'{"__metadata__":{"a":"' + b"x" * (8 << 20) + b'"},' + filled(b"0,", 200)[1:]
    path.write_bytes(bomb(header))
    with df11.open(path) as container:
        assert container.source_header.raw == header


def test_a_source_header_out_of_proportion_is_not_written(tmp_path: Path) -> None:
    header = forge.safetensors_file([TENSOR])[0].ljust(9 << 20)
    source = tmp_path / "a.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(errors.LimitError, match="out of proportion"):
        df11.convert(source, tmp_path / "a.df11")
    assert not (tmp_path / "a.df11").exists()


# Foreign exceptions.


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F4", "U8"])
@pytest.mark.parametrize("shape", [(0, 2**40, 2**40), (2**40, 2**40, 0), (2**62, 0, 2**62)])
def test_shapes_that_no_array_can_have(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    header = framing.encode_header([framing.Entry("e", dtype, shape, 0, 0)], {})
    with pytest.raises(errors.LimitError, match="the product of the sizes"):
        framing.parse_header(header, 0, "a")
    source = tmp_path / "a.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(errors.LimitError):
        df11.convert(source, tmp_path / "a.df11")


def test_shapes_of_tensor_objects_that_no_array_can_have(tmp_path: Path) -> None:
    path = tmp_path / "a.df11"
    change = make_must_fail.member("df11.tensors", ("w", "shape"), [0, 2**40, 2**40])
    path.write_bytes(make_must_fail.changed(change))
    with pytest.raises(errors.LimitError, match="the product of the sizes"):
        df11.open(path)


@pytest.mark.parametrize("dtype", ["BF16", "F64", "F4"])
def test_the_largest_shapes_are_arrays(tmp_path: Path, dtype: str) -> None:
    bits = framing.DTYPE_BITS[dtype]
    shape = (0, 2**31, 2 ** (33 - bits.bit_length()), 7)
    path = tmp_path / "a.df11"
    path.write_bytes(forge.container([forge.Tensor("e", dtype, shape, b"")]))
    with df11.open(path) as container:
        array = container.tensor("e")
        assert array.size == 0
        if dtype != "F4":
            assert array.shape == shape


def reading(path: Path, act: Callable[[Container], object]) -> None:
    with df11.open(path) as container:
        act(container)


@pytest.mark.parametrize(
    "act",
    [
        lambda path: reading(path, lambda container: container.tensor("a")),
        lambda path: reading(path, lambda container: container.rows("a", 60_000, 60_001)),
        df11.verify,
        lambda path: df11.restore(path, path.with_suffix(".out")),
    ],
    ids=["tensor", "rows", "verify", "restore"],
)
@pytest.mark.parametrize("told", ["whole", "cut"])
def test_a_raw_segment_shorter_than_its_weights(tmp_path: Path, act: Callable[[Path], object], told: str) -> None:
    weights = [(i * 37) & 0xFFFF for i in range(70_000)]
    whole = forge.raw_segment(weights)
    size = layout.align(32 + len(weights))
    short = forge.raw_segment(weights, segment_size=size if told == "cut" else len(whole))[:size]
    path = tmp_path / "a.df11"
    path.write_bytes(forge.container([forge.bf16("a", weights, forge.record([(short, weights)]))]))
    with pytest.raises(errors.SegmentHeaderError):
        act(path)


# Messages.

EVIL = "x\x1b]0;owned\x07\x1b[2J\x1b[31mPWNED\r\n\u202e\ud800" + "y" * 5000


@pytest.mark.parametrize("field", ["what", "file", "tensor", "expected", "found", "hint"])
@pytest.mark.parametrize("value", [EVIL, (EVIL, "a"), [EVIL]])
def test_a_message_is_one_printable_line(field: str, value: Any) -> None:
    if field in ("what", "file", "tensor", "hint") and not isinstance(value, str):
        return
    text = str(errors.Df11Error(**{"what": "wrong", field: value}))
    assert text.isprintable()
    assert len(text) < 2500


def test_a_message_keeps_ordinary_text() -> None:
    error = errors.Df11Error(
        "wrong", file="/größe/名前.df11", expected=(1, "a b"), found="it's", hint="do  this\nthen that"
    )
    assert str(error) == "/größe/名前.df11: wrong (expected (1, 'a b'), found it's); do this then that"


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("df11.version", EVIL.replace("\ud800", ""), errors.VersionError),
        ("df11.requires", '["\\u001b[31mred"]', errors.FeatureError),
        ("df11.requires", "[" + ",".join(f'"{i}\\u001b"' for i in range(3000)) + "]", errors.FeatureError),
        ("df11.tensors", '{"a":{"\\u001b":1,"\\u001b":1}}', errors.MetadataError),
    ],
)
def test_what_a_file_says_is_quoted(tmp_path: Path, key: str, value: str, error: type[errors.Df11Error]) -> None:
    path = tmp_path / "a.df11"
    path.write_bytes(make_must_fail.changed(make_must_fail.metadata(key, value)))
    with pytest.raises(error) as caught:
        Container(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500
    assert "found '" in str(caught.value)
