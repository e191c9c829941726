"""The CPU kernels as a separate program (``cpu_kernels.c``): building it, questions, and the answers it must give."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from df11.converter.kernels import NOT_SMALLER, Encoder, any_bits, cast_f32, count_exponents, narrow_f32
from df11.formats import kernels, layout
from df11.formats.record import Bytes, Weights, weights_dtype
from tests.support import records, strategies

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests" / "support" / "cpu_kernels.c",
    *(ROOT / "formats" / name for name in ("cpu.c", "decode.c")),
    *(ROOT / "converter" / name for name in ("encode.c", "sha256.c", "dfloat11/kernels.c")),
]
SECTION_OFFSETS = ("tiles_offset", "lanes_offset", "sign_mantissa_offset", "stream_offset")
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@dataclass(frozen=True)
class Segment:
    """A coded segment with valid geometry and arbitrary bytes."""

    data: Bytes
    kind: layout.Kind
    left_out: int
    alphabet_size: int
    elements: int
    lane_bytes: int
    first: int
    last: int

    @property
    def sections(self) -> dict[str, int]:
        """The offsets of its sections."""
        return layout.segment_sections(self.elements, self.alphabet_size, self.lane_bytes, self.kind, self.left_out)


def tool(name: str, package: str) -> str:
    """A program from a Debian package, which CI must have."""
    path = shutil.which(name)
    if path is None and "CI" in os.environ:
        pytest.fail(f"{name} is missing: apt install {package}")
    if path is None:
        pytest.skip(f"needs {name}: apt install {package}")
    return path


def build(compiler: Sequence[str], folder: Path, *options: str) -> Path:
    """Compile the program."""
    program = folder / "cpu_kernels"
    command = [*compiler, *WARNINGS, *options, *map(str, SOURCES), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return program


def run(command: Sequence[str | Path], questions: Sequence[bytes]) -> bytes:
    """All answers of the program, in order."""
    done = subprocess.run([str(part) for part in command], input=b"".join(questions), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    return done.stdout


def numbers(*values: int) -> bytes:
    """Arrays as the program reads and writes them."""
    return b"".join(struct.pack("<q" if value < 0 else "<Q", value) for value in values)


def ask_to_encode(weights: Weights, kind: layout.Kind = layout.BF16, left_out: int = 0) -> tuple[bytes, bytes]:
    """A question, and this process's answer. ``left_out``: planes at the end, whether zero or not."""
    encoder = Encoder()
    code = encoder.build_code(weights, kind)
    answer = numbers(code.alphabet_size, code.bits, code.filler, len(code.section)) + code.section.tobytes()
    end = layout.raw_segment_size(len(weights), kind) - layout.RECORD_ALIGNMENT
    for lane_bytes in (1, 2):
        sections = layout.segment_sections(len(weights), code.alphabet_size, lane_bytes, kind, left_out)
        if sections["stream_offset"] + layout.STREAM_END > end:
            answer += numbers(NOT_SMALLER, 0)
            continue
        out = np.zeros(end + 8192, np.uint8)
        size, exceptions = encoder.encode_tiles(weights, kind, left_out, code, lane_bytes, sections, end, out)
        answer += numbers(size, exceptions) + (out[sections["tiles_offset"] : size].tobytes() if size > 0 else b"")
    question = b"E" + numbers(kind.code, left_out, len(weights)) + weights.tobytes()
    return question, answer + encoder.exponents().tobytes()


def ask_to_decode(segment: Segment) -> tuple[bytes, bytes]:
    """A question, and this process's answer."""
    sections = segment.sections
    question = numbers(len(segment.data), segment.alphabet_size, segment.kind.code, segment.left_out)
    question += numbers(segment.elements, segment.lane_bytes)
    question += numbers(*(sections[name] for name in SECTION_OFFSETS), segment.first, segment.last)
    table = kernels.build_decode_table(segment.data[layout.SEGMENT_HEADER.size :], segment.alphabet_size, segment.kind)
    answer = numbers(table if isinstance(table, int) else kernels.OK)
    if not isinstance(table, int):
        count = min(segment.last * layout.TILE_WEIGHTS, segment.elements) - segment.first * layout.TILE_WEIGHTS
        weights = np.zeros(count, weights_dtype(segment.kind))
        header = {"encoding": 1 + segment.left_out, "element_count": segment.elements}
        header |= {"lane_bytes": segment.lane_bytes, **sections}

        def pass_over(*, compare: bool) -> tuple[int, int]:
            return kernels.decode_tiles(
                segment.data, table, segment.kind, header, segment.first, segment.last, weights, compare=compare
            )

        answer += numbers(*pass_over(compare=False), count) + weights.tobytes()
        answer += numbers(*pass_over(compare=True))
        weights[count // 2] ^= 1
        answer += numbers(*pass_over(compare=True))
    return b"D" + question + segment.data.tobytes(), answer


def ask_to_cast(values: Bytes) -> tuple[bytes, bytes]:
    """F32 values as bytes: a question, and this process's answer."""
    source = values.view(np.uint32)
    out = np.empty(len(source), np.uint16)
    exact = cast_f32(source, out)
    narrowed = np.empty(len(source), np.uint16)
    narrow_f32(source, narrowed)
    question = b"C" + numbers(len(source)) + source.tobytes()
    return question, numbers(exact) + out.tobytes() + narrowed.tobytes()


def ask_to_count(weights: Weights, kind: layout.Kind = layout.BF16) -> tuple[bytes, bytes]:
    """A question, and this process's answer."""
    answer = count_exponents(weights, kind).tobytes() + numbers(any_bits(weights.view(np.uint8), kind))
    return b"N" + numbers(kind.code, len(weights)) + weights.tobytes(), answer


def ask_to_hash(before: Bytes, weights: Weights, after: Bytes) -> tuple[bytes, bytes]:
    """Bytes around the weights of a segment: a question, and the answers of hashlib and an independent encoder."""
    question = (
        b"H" + numbers(len(before), len(weights), len(after)) + before.tobytes() + weights.tobytes() + after.tobytes()
    )
    code = Encoder().build_code(weights, layout.BF16)
    digest = hashlib.sha256(before.tobytes() + weights.tobytes() + after.tobytes()).digest()
    return question, digest + numbers(code.bits) + code.section.tobytes()


def sound_segment(seed: int) -> Segment | None:
    """A segment as encoded, and some of its tiles; None if the weights were stored raw."""
    kind = list(layout.KINDS.values())[seed // 6 % len(layout.KINDS)] if seed % 2 else layout.BF16
    if seed % 6 > 1:
        _, _, record = records.generate(seed, kind=kind)
    else:  # Large enough that rare pairs are exceptions.
        weights = strategies.as_kind(strategies.make("rare", 50_000 + seed % 9000, seed), kind, seed)
        record = records.encode(weights, kind=kind)
    directory = layout.DIRECTORY_ENTRY.unpack(record.tobytes(), layout.RECORD_HEADER.size)
    start, size, elements = directory["segment_offset"], directory["segment_size"], directory["element_count"]
    data = record[start : start + size].copy()
    header = layout.SEGMENT_HEADER.unpack(data.tobytes())
    if header["encoding"] == layout.ENCODING_RAW:
        return None
    rng = np.random.default_rng(seed)
    first = int(rng.integers(layout.tile_count(elements)))
    last = int(rng.integers(first, layout.tile_count(elements))) + 1
    left_out = header["encoding"] - layout.ENCODING_CODED
    return Segment(data, kind, left_out, header["alphabet_size"], elements, header["lane_bytes"], first, last)


def damaged_segment(seed: int) -> Segment | None:
    """The same with damage: some bits, whole sections of other bytes, or a truncated stream."""
    segment = sound_segment(seed)
    if segment is None:
        return None
    rng = np.random.default_rng(seed + 1)
    data, sections = segment.data, segment.sections
    bounds = [layout.SEGMENT_HEADER.size, *(sections[name] for name in SECTION_OFFSETS), len(data)]
    descriptors = data[sections["tiles_offset"] :][: 8 * layout.tile_count(segment.elements)].view("<u4").reshape(-1, 2)
    listing = np.flatnonzero(descriptors[:, 1] >> 16)
    if len(listing) and rng.random() < 0.5:  # A position beyond the tile, or out of order.
        end = (
            sections["stream_offset"] + 16 * int(descriptors[listing[0] + 1, 0])
            if listing[0] + 1 < len(descriptors)
            else len(data) - 16
        )
        data[end - 16 : end] = rng.integers(256, size=16)
        return segment
    for _ in range(int(rng.integers(1, 4))):
        which = int(rng.integers(len(bounds) - 1))
        part = data[bounds[which] : bounds[which + 1]]
        match rng.integers(4):
            case 0:
                part[rng.integers(len(part))] ^= 1 << rng.integers(8)
            case 1:
                part[:] = rng.integers(256, size=len(part))
            case 2:
                part[:] = rng.choice([0, 255])
            case _:
                place = int(rng.integers(len(part)))
                part[place : place + 8] = rng.integers(256, size=len(part[place : place + 8]))
    if rng.random() < 0.3:
        data = data[: int(rng.integers(sections["stream_offset"] + layout.STREAM_END, len(data) + 1))]
    return dataclasses.replace(segment, data=data)


def questions(seed: int, scale: int = 1) -> list[tuple[bytes, bytes]]:
    """Questions of all kinds with their answers; ``scale`` times about three hundred."""
    rng = np.random.default_rng(seed)
    asked = []
    for flavour in sorted(strategies.FLAVOURS):
        sizes = [*strategies.BOUNDARY_SIZES[1:], *map(int, rng.integers(2, 40_000, size=2 * scale))]
        asked += [ask_to_encode(strategies.make(flavour, size, seed + size)) for size in sizes]
        for kind in layout.KINDS.values():
            size = sizes[seed % len(sizes)]
            weights = strategies.as_kind(strategies.make(flavour, size, seed), kind, seed)
            asked += [ask_to_encode(weights, kind, left_out) for left_out in range(kind.most_left_out + 1)]
    for number in range(100 * scale):
        for make in (sound_segment, damaged_segment):
            if (segment := make(seed + number)) is not None:
                asked.append(ask_to_decode(segment))
    for count in (0, 1, 7, 64, 1000):
        asked.append(ask_to_cast(rng.integers(256, size=4 * count, dtype=np.uint8)))
        for kind in layout.KINDS.values():
            bits = rng.integers(1 << 8 * kind.bytes, size=count, dtype=np.uint64).astype(weights_dtype(kind))
            asked.append(ask_to_count(bits, kind))
    asked.append(
        ask_to_cast(
            (np.arange(1 << 16, dtype=np.uint32) << 16 | rng.integers(2, size=1 << 16, dtype=np.uint32)).view(np.uint8)
        )
    )
    return asked
