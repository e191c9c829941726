"""Manifests made by hand, to render."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from df11.converter.exponents import COUNTED_WEIGHTS, ExponentCounts, entropy
from df11.converter.manifest import FileRow, Manifest, Origin, TensorRow

EVIL_NAMES = (
    "<script>alert(1)</script>",
    "$x$ and $\\frac{1}{2}$",
    "a|b|c",
    "quote\" and 'quote' & amp;",
    "`back`tick``",
    "new\nline\r\ttab",
    "right \u202eto left\u202c",
    "שלום.עולם.0.משקל",
    "重み.🤗.weight",
    "x" * 300,
    "</title></style></svg>",
    "[link](https://example.com) https://example.com www.example.com",
    "javascript:alert(1)",
    "\\",
    "",
    "---",
    "*bold* _it_ ~~s~~ # h @user :tag:",
)
"""Tensor names that break a page, a drawing, YAML or Markdown unless they are escaped."""


def counts_around(center: int, elements: int, spread: int = 6) -> np.ndarray:
    """Counts of exponents, i64 [256], that halve from ``center`` downwards."""
    counts = np.zeros(256, np.int64)
    for step in range(spread):
        counts[center - step] = elements >> (step + 1)
    counts[center] += elements - counts.sum()
    return counts


def tensor(
    file: str,
    name: str,
    shape: tuple[int, ...],
    *,
    bits: float = 10.75,
    dtype: str = "BF16",
    exact: bool | None = None,
    center: int = 121,
) -> TensorRow:
    """A row. A BF16 tensor is coded to about ``bits`` per weight, unless that is 16 or more."""
    elements = math.prod(shape)
    coded = dtype == "BF16" and bits < 16
    if dtype != "BF16":
        stored = elements * {"F32": 4, "I64": 8, "U8": 1}[dtype]
        return TensorRow(file, name, dtype, shape, "verbatim", stored, None, None, exact, (7,), (7,))
    counts = counts_around(center, elements)
    kept = ExponentCounts.of(counts) if elements >= COUNTED_WEIGHTS else None
    known = entropy(counts.tolist()) if elements else None
    stored = round(elements * bits / 8) if coded else 2 * elements
    stored_xxh3, decoded_xxh3 = ((1, 2), (3, 4)) if coded else ((7,), (7,))
    return TensorRow(
        file, name, dtype, shape, "df11" if coded else "verbatim", stored, known, kept, exact, stored_xxh3, decoded_xxh3
    )


def file(name: str, rows: Sequence[TensorRow], sha256: str | None = None) -> FileRow:
    """The row of the file with these tensors: 1,000 bytes of header in the container, 500 in the source."""
    source = sum(row.elements * 4 if row.exact is not None else row.decoded_bytes for row in rows)
    return FileRow(
        name,
        1000 + sum(row.stored_bytes for row in rows),
        sha256,
        name.replace(".df11", ".safetensors"),
        500 + source,
        f"{len(name):064x}",
    )


def with_file(known: Manifest, file: FileRow, rows: Sequence[TensorRow]) -> Manifest:
    """A manifest with another row for a file, or one more, and its tensors."""
    placed = tuple(replace(row, file=file.file) for row in rows)
    return known.holding((known.by_file() | {file.file: (file, placed)}).values())


def manifest(*tensors: TensorRow, origin: Origin | None = None, cast: bool = False) -> Manifest:
    """A manifest of these tensors and their files."""
    names = list(dict.fromkeys(row.file for row in tensors))
    files = tuple(file(name, [row for row in tensors if row.file == name]) for name in names)
    return Manifest(origin or Origin(), "bf16" if cast else None, "df11 0.1.0", files, tuple(tensors))


def model(layers: int = 12, *, origin: Origin | None = None) -> Manifest:
    """A small model of two parts, with layers, an outlier, tensors that were cast, and some that are not BF16."""
    text = "text/model.df11"
    rows = [
        tensor(text, "model.embed.weight", (1000, 512), center=122),
        tensor(text, "model.norm.weight", (512,), bits=16),
    ]
    for layer in range(layers):
        bits = 12.5 if layer == 3 else 10.7 + layer / 1000
        rows += [
            tensor(text, f"model.layers.{layer}.mlp.up.weight", (512, 512), bits=bits),
            tensor(text, f"model.layers.{layer}.attn.q.weight", (256, 512)),
            tensor(text, f"model.layers.{layer}.norm.weight", (512,), bits=16),
        ]
    vae = "vae/part.df11"
    rows += [
        tensor(vae, "conv.weight", (64, 64, 32), exact=False),
        tensor(vae, "ids", (10,), dtype="I64"),
        tensor(vae, "bias", (64,), bits=16, exact=True),
    ]
    return manifest(*rows, origin=origin or Origin("owner/name", "c" * 40, "sub folder"), cast=True)


def evil() -> Manifest:
    """Names that nobody should give, each to a tensor and some to files."""
    rows = [
        tensor(f"part {index % 3}/we|ird`<{index % 3}>.df11", name, (300, 300), bits=10.7 + (index == 1))
        for index, name in enumerate(EVIL_NAMES)
    ]
    rows += [
        tensor("part 0/we|ird`<0>.df11", f"{name}.{layer}.<b>$w$</b>", (300, 300))
        for name in EVIL_NAMES[:3]
        for layer in range(4)
    ]
    return manifest(*rows, origin=Origin('owner/name"><script>', "<commit>", "a`|b"))
