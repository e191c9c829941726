"""Every dtype of records: sizes on real weights beside the peers, and the kernels beside those of BF16."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks import harness, safetensors_file, synthetic
from benchmarks.safetensors_file import Tensor
from benchmarks.sections import Bench
from df11.converter.encode import SegmentEncoder
from df11.converter.kernels import ENCODE_SLACK
from df11.formats import layout
from df11.formats.record import Place, Segment, SegmentPlace, weights_dtype

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.unsignedinteger[Any]]

WEIGHTS: Final = 1 << 21
"""For the kernels: a segment."""
ROUNDS: Final = 8
LEAST: Final = 65_536
"""Weights of a tensor that is quantised."""


def _e4m3_values() -> Floats:
    # The values of the bits 0 to 126, which ascend.
    bits = np.arange(127)
    exponent, mantissa = bits >> 3, bits & 7
    return np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9).astype(np.float32)


_E4M3: Final = _e4m3_values()


def to_bf16(values: Floats) -> Bits:
    """BF16 bits, rounded."""
    return synthetic.round_to_bf16(values.copy())


def to_f16(values: Floats) -> Bits:
    """F16 bits, rounded."""
    return values.astype(np.float16).view(np.uint16)


def to_f32(values: Floats) -> Bits:
    """F32 bits."""
    return values.view(np.uint32)


def to_f32_of_bf16(values: Floats) -> Bits:
    """F32 bits of values rounded to BF16."""
    return np.left_shift(to_bf16(values), 16, dtype=np.uint32)


def to_e4m3(values: Floats) -> Bits:
    """E4M3 bits, rounded; the largest value of each row becomes 448."""
    scaled = _scaled(values, 448)
    size = np.abs(scaled)
    above = np.minimum(np.searchsorted(_E4M3, size), 126)
    below = np.maximum(above - 1, 0)
    nearest = np.where(size - _E4M3[below] < _E4M3[above] - size, below, above)
    bits: Bits = (nearest | np.signbit(scaled) << 7).astype(np.uint8)
    return bits


def to_e5m2(values: Floats) -> Bits:
    """E5M2 bits, rounded; the largest value of each row becomes 57344."""
    halves = _scaled(values, 57_344).astype(np.float16).view(np.uint16).astype(np.uint32)
    return (halves + 0x7F + (halves >> 8 & 1) >> 8).astype(np.uint8)


def _scaled(values: Floats, most: float) -> Floats:
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-12))
    scaled: Floats = (rows / largest * np.float32(most)).reshape(values.shape)
    return scaled


CASES: Final[dict[str, tuple[str, Callable[[Floats], Bits], str | None]]] = {
    "BF16": ("BF16", to_bf16, "bfloat16"),
    "F16": ("F16", to_f16, "float16"),
    "F32": ("F32", to_f32, "float32"),
    "F32 that is BF16": ("F32", to_f32_of_bf16, "float32"),
    "E4M3, a scale for a row": ("F8_E4M3", to_e4m3, None),
    "E5M2, a scale for a row": ("F8_E5M2", to_e5m2, None),
}
"""Name -> dtype of safetensors, how it is made of F32, and its name in zipnn, which takes no FP8."""


def write_minilm(path: Path, dtype: str, make: Callable[[Floats], Bits]) -> int:
    """MiniLM's tensors of 65,536 or more weights in a dtype. Returns the size of the file."""
    source = synthetic.minilm_path()
    stored = {tensor.name: tensor for tensor in safetensors_file.read_header(source)}
    large = [tensor for tensor in stored.values() if tensor.dtype == "F32" and tensor.elements >= LEAST]
    with source.open("rb") as file:

        def fill(tensor: Tensor) -> Iterator[memoryview]:
            original = stored[tensor.name]
            (data,) = safetensors_file.read_blocks(file, original, original.size)
            bits = np.ascontiguousarray(make(data.view(np.float32).reshape(original.shape)))
            yield memoryview(bits.reshape(-1).view(np.uint8))

        tensors = [Tensor(tensor.name, dtype, tensor.shape) for tensor in large]
        return safetensors_file.write(path, tensors, fill)


def dtypes(bench: Bench) -> None:
    """Sizes of MiniLM in every dtype, everything counted; speed of the kernels per byte of the source."""
    source, target = bench.folder / "x.safetensors", bench.folder / "packed"
    for name, (dtype, make, in_zipnn) in CASES.items():
        size = write_minilm(source, dtype, make)
        container = target.with_suffix(".df11")
        checkout = bench.checkouts[0]
        programs = [checkout.program("", "convert", source, container, "--quiet", output=container)]
        for program in programs + bench.peers.smallest(source, target, in_zipnn):
            harness.say(f"dtypes: {name}: {program.name}")
            harness.run(program)
            assert program.output is not None
            stored = program.output.stat().st_size
            bench.board.add(f"{name}: {program.name}", "of the source", "lower", [stored / size], ratio=True)
            harness.remove(program.output)
    _kernels(bench)


def _kernels(bench: Bench) -> None:
    # All dtypes take turns, so that their ratios hold on a busy machine.
    values = np.random.default_rng(0).standard_normal((1, WEIGHTS)).astype(np.float32) * np.float32(0.02)
    makers = {"BF16": to_bf16, "F16": to_f16, "F32": to_f32, "F8_E4M3": to_e4m3, "F8_E5M2": to_e5m2}
    calls = {name: _calls(make(values).reshape(-1), layout.KINDS[name]) for name, make in makers.items()}
    speeds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in makers} for what in calls["BF16"]}
    for _ in range(ROUNDS * bench.rounds):
        for what, by_name in speeds.items():
            for name, found in by_name.items():
                start = time.perf_counter()
                calls[name][what]()
                found.append(WEIGHTS * layout.KINDS[name].bytes / 1e9 / (time.perf_counter() - start))
    for what, by_name in speeds.items():
        for name, found in by_name.items():
            bench.board.add(f"{what} {name}", "GB/s", "higher", found)
            ratios = [a / b for a, b in zip(found, by_name["BF16"], strict=True)]
            bench.board.add(f"{what} {name}: speed, {name} / BF16", "x", "higher", ratios, ratio=True)


def _calls(weights: Bits, kind: layout.Kind) -> dict[str, Callable[[], object]]:
    bits = np.ascontiguousarray(weights).view(weights_dtype(kind))
    stored, target = (np.zeros(layout.raw_segment_size(len(bits), kind) + ENCODE_SLACK, np.uint8) for _ in range(2))
    encoder, out = SegmentEncoder(), np.zeros_like(bits)
    made = encoder.encode(bits, stored, kind, verify=True)
    place = SegmentPlace(0, len(made.data), len(bits), made.stored_checksum, made.decoded_checksum, 0)
    return {
        "encode": lambda: encoder.encode(bits, target, kind, verify=False),
        "decode": lambda: Segment(made.data, place, Place(), kind, trusted=True).decode(out),
        "compare": lambda: Segment(made.data, place, Place(), kind, trusted=True).compare(bits),
    }
