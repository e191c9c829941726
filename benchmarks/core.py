"""Core speeds: the coders alone, one thread, on weights in memory. ``python -m benchmarks.core FILE REPEATS`` prints JSON for df11."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import measure, safetensors_file, synthetic
from benchmarks.peers import Environment
from benchmarks.safetensors_file import Tensor

_SLACK: Final = 1 << 20
"""More than the encoder asks for beyond the largest segment."""


def df11_core(path: Path, repeats: int) -> dict[str, Any]:
    """Best seconds of ``repeats`` for a file of raw BF16 weights, in segments as the converter makes them.

    ``encode`` and ``encode_verified`` make finished segments, both checksums included; ``decode`` checks both checksums.
    """
    from df11.converter.encode import EncodedSegment, SegmentEncoder
    from df11.converter.plan import SEGMENT_WEIGHTS
    from df11.formats import layout
    from df11.formats.record import Place, Segment, SegmentPlace

    weights = np.fromfile(path, np.uint16)
    parts = [weights[start : start + SEGMENT_WEIGHTS] for start in range(0, len(weights), SEGMENT_WEIGHTS)]
    targets = [np.zeros(layout.raw_segment_size(len(part)) + _SLACK, np.uint8) for part in parts]
    out = np.zeros(SEGMENT_WEIGHTS, np.uint16)
    encoder = SegmentEncoder()
    best = dict.fromkeys(("encode", "encode_verified", "decode"), float("inf"))
    segments: list[EncodedSegment] = []
    for _ in range(repeats + 1):  # once more, so that compiling and the first touch of memory count in no best
        for name, verify in (("encode", False), ("encode_verified", True)):
            start = time.perf_counter()
            segments = [encoder.encode(part, target, verify=verify) for part, target in zip(parts, targets, strict=True)]
            best[name] = min(best[name], time.perf_counter() - start)
        seconds = 0.0
        for part, segment in zip(parts, segments, strict=True):
            place = SegmentPlace(0, len(segment.data), segment.elements, segment.stored_checksum, segment.decoded_checksum, 0)
            start = time.perf_counter()
            Segment(segment.data, place, Place()).decode(out[: len(part)])
            seconds += time.perf_counter() - start
            if not np.array_equal(out[: len(part)], part):
                raise SystemExit("df11 does not restore the segment")
        best["decode"] = min(best["decode"], seconds)
    return {**best, "stored": sum(len(segment.data) for segment in segments)}


def write_samples(folder: Path) -> dict[str, Path]:
    """Raw BF16 weights: 64 MiB of one Gaussian, and all of MiniLM."""
    gaussian, minilm = folder / "gaussian.bin", folder / "minilm.bin"
    with gaussian.open("wb") as file:
        for piece in synthetic.gaussian(Tensor("core", "BF16", (8192, 4096))):
            file.write(piece)
    container = folder / "minilm.safetensors"
    synthetic.write_minilm_bf16(container)
    with container.open("rb") as source, minilm.open("wb") as file:
        for tensor in safetensors_file.read_header(container):
            if tensor.dtype == "BF16":
                for data in safetensors_file.read_pieces(source, tensor, 1 << 20):
                    file.write(memoryview(data))
    container.unlink()
    return {"Gaussian": gaussian, "MiniLM": minilm}


def cut(source: Path, target: Path, size: int) -> None:
    """The first ``size`` bytes of a file as another."""
    with source.open("rb") as file:
        target.write_bytes(file.read(size))


def measure_cores(folder: Path, environment: Environment, repeats: int, slice_bytes: int) -> list[dict[str, Any]]:
    """A row for each sample and coder, interleaved in time; dfloat11 gets a slice only, since it codes a few megabytes a second."""
    rows: list[dict[str, Any]] = []
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    single = {**os.environ, "PYTHONPATH": paths, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for sample, path in write_samples(folder).items():
        commands = {"df11": [sys.executable, "-m", "benchmarks.core", str(path), str(repeats)]}
        for name in ("lmzip", "zipnn"):
            if environment.python and name not in environment.missing:
                commands[name] = environment.worker(f"{name}-core", path, repeats)
        sizes = dict.fromkeys(commands, path.stat().st_size)
        if environment.python and "dfloat11" not in environment.missing:
            piece = folder / "slice.bin"
            cut(path, piece, slice_bytes)
            commands["dfloat11"] = environment.worker("dfloat11-core", piece, 1)
            sizes["dfloat11"] = piece.stat().st_size
        for _ in range(2):
            for name, command in commands.items():
                if name == "dfloat11" and any(row["tool"] == name and row["sample"] == sample for row in rows):
                    continue
                row = json.loads(measure.run(command, env=single).stdout)
                rows.append({"sample": sample, "tool": name, "bytes": sizes[name], **row})
    return _best(rows)


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        known = merged.setdefault((row["sample"], row["tool"]), row)
        for name in ("encode", "encode_verified", "decode"):
            if row.get(name) is not None:
                known[name] = min(known[name], row[name])
    return list(merged.values())


if __name__ == "__main__":
    print(json.dumps(df11_core(Path(sys.argv[1]), int(sys.argv[2]))))
