"""Convert for tests of what comes of it: rows straight from the converter, and the same facts apart from df11's way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from df11.converter.apply import apply_plan
from df11.converter.cast import Cast
from df11.converter.convert import open_target
from df11.converter.manifest import FileRow, TensorRow
from df11.converter.plan import Options
from df11.converter.planning import make_plan
from df11.converter.settings import Settings
from df11.converter.work import Done
from df11.storage.store import open_source

SETTINGS = Settings(threads=2, max_memory=256 << 20, cast=None, verify=True)


def convert(folder: Path, name: str, data: bytes, *, cast: Cast = None) -> Done:
    """Write a source to ``folder`` and convert it there. The rows are the converter's: there is no manifest."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(data)
    source = open_source(path)
    target, target_name = open_target(source, folder / f"{name}.df11")
    plan = make_plan(source, target, "convert", Options(cast), name=target_name)
    settings = Settings(SETTINGS.threads, SETTINGS.max_memory, cast, SETTINGS.verify)
    (done,) = apply_plan(plan, settings).done
    return done


def file_row(done: Done) -> FileRow:
    """The row of the container."""
    assert done.row is not None
    return done.row


def tensors_of(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What a safetensors file holds: name -> (dtype, shape, bytes)."""
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in json.loads(data[8:start]).items()
        if name != "__metadata__"
    }


SHAPES = {"BF16": (2, 7, 256), "F16": (2, 10, 32), "F32": (4, 23, 256), "F8_E4M3": (1, 3, 16), "F8_E5M2": (1, 2, 32)}
"""Bytes, bits of the mantissa, number of exponents."""


def numpy_counts(data: bytes, dtype: str = "BF16") -> np.ndarray:
    """How often each exponent occurs in bytes of a dtype, apart from df11's way."""
    width, mantissa, exponents = SHAPES[dtype]
    bits = np.frombuffer(data, f"<u{width}").astype(np.int64)
    return np.bincount(bits // 2**mantissa % exponents, minlength=256)


def numpy_entropy(counts: np.ndarray) -> float:
    """The entropy of counts in bits, apart from df11's way."""
    shares = counts[counts > 0] / counts.sum()
    return float(abs(-(shares * np.log2(shares)).sum()))


def rows_named(rows: tuple[TensorRow, ...]) -> dict[str, TensorRow]:
    """Rows by the names of their tensors."""
    return {row.name: row for row in rows}
