"""The figures of the report, its plots and the model card, computed from a manifest. All sizes are in bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from df11.formats import errors
from df11.formats.layout import KINDS

if TYPE_CHECKING:
    from df11.converter.manifest import FileRow, Manifest, TensorRow

Counts = npt.NDArray[np.int64]

MOST_PARTS: Final = 12
"""Most parts of a model that are listed. If there are more, the smallest are added up as one."""
OUTLIER_WEIGHTS: Final = 65_536
"""Smaller tensors do not count as outliers: the size of their tables dominates their bits per weight."""
OUTLIER_DEVIATIONS: Final = 6.0
OUTLIER_BITS: Final = 0.25
"""Least distance of an outlier from the median: in bits per weight, and as a multiple of the usual deviation."""
STACK_LAYERS: Final = 3
"""Fewer layers do not make a stack."""
MOST_LAYERS: Final = 5000
"""Nor do more: nobody could see them, and each takes memory to draw."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Some files, added up.

    ``weights``, ``weight_bytes`` and ``entropy_bound`` only cover tensors that decode to BF16.
    """

    name: str
    files: int
    tensors: int
    weights: int
    weight_bytes: int
    """Stored bytes of the BF16 tensors, tables and checksums included."""
    cast: int
    """Tensors cast from F32."""
    changed: int
    """Those whose values changed."""
    source_bytes: int
    """The safetensors files that were converted."""
    bf16_bytes: int
    """All decoded tensors, without headers: two bytes per BF16 weight, the others unchanged."""
    coded_bytes: int
    verbatim_bytes: int
    container_bytes: int
    """The `.df11` files, with everything in them."""
    entropy_bound: float | None
    """The fewest bits per weight for a code of single exponents: their entropy, tensor by tensor, plus 8."""

    @property
    def ratio(self) -> float | None:
        """Size of the containers relative to the tensors in BF16."""
        return self.container_bytes / self.bf16_bytes if self.bf16_bytes else None

    @property
    def source_ratio(self) -> float | None:
        """Size of the containers relative to the source files."""
        return self.container_bytes / self.source_bytes if self.source_bytes else None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight, over the weights that decode to BF16."""
        return 8 * self.weight_bytes / self.weights if self.weights else None


def is_bf16(row: TensorRow) -> bool:
    """Whether a tensor decodes to BF16."""
    return row.dtype == "BF16"


def add_up(name: str, files: Sequence[FileRow], rows: Sequence[TensorRow]) -> Sizes:
    """The figures of some files and of their tensors."""
    weights = [row for row in rows if is_bf16(row)]
    elements = sum(row.elements for row in weights)
    return Sizes(
        name=name,
        files=len(files),
        tensors=len(rows),
        weights=elements,
        weight_bytes=sum(row.stored_bytes for row in weights),
        cast=sum(row.exact is not None for row in rows),
        changed=sum(row.exact is False for row in rows),
        source_bytes=sum(file.source_bytes for file in files),
        bf16_bytes=sum(row.decoded_bytes for row in rows),
        coded_bytes=sum(row.stored_bytes for row in rows if row.encoding == "df11"),
        verbatim_bytes=sum(row.stored_bytes for row in rows if row.encoding != "df11"),
        container_bytes=sum(file.bytes for file in files),
        entropy_bound=entropy_bound(weights),
    )


def entropy_bound(rows: Iterable[TensorRow]) -> float | None:
    """Entropy of the exponents plus 8, in bits per weight, averaged over the weights of BF16 tensors.

    None without weights, or if an entropy is missing.
    """
    total, elements = 0.0, 0
    for row in rows:
        if row.elements:
            if row.exponent_entropy is None:
                return None
            total += row.exponent_entropy * row.elements
            elements += row.elements
    return 8 + total / elements if elements else None


@dataclass(frozen=True, slots=True)
class OfDtype:
    """The tensors of one dtype of the source."""

    dtype: str
    """As the source has it, and what it is stored as if that is not the same."""
    tensors: int
    elements: int
    source_bytes: int
    stored_bytes: int
    bound: float | None
    """The fewest bits per weight for a code of single exponents; None unless all of them are coded."""

    @property
    def ratio(self) -> float | None:
        """Stored bytes relative to those of the source."""
        return self.stored_bytes / self.source_bytes if self.source_bytes else None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per element."""
        return 8 * self.stored_bytes / self.elements if self.elements else None


def by_dtype(manifest: Manifest) -> list[OfDtype]:
    """The tensors by dtype, those with the most bytes in the source first."""
    found: dict[tuple[str, bool], list[TensorRow]] = {}
    for row in manifest.tensors:
        found.setdefault((row.dtype, row.exact is not None), []).append(row)
    sums = []
    for (dtype, was_f32), rows in found.items():
        elements, entropies = sum(row.elements for row in rows), [row.exponent_entropy for row in rows if row.elements]
        known = [entropy for entropy in entropies if entropy is not None]
        bound = None
        if elements and dtype in KINDS and len(known) == len(entropies):
            coded = sum(row.elements * (row.exponent_entropy or 0) for row in rows)
            bound = KINDS[dtype].mantissa_bits + 1 + coded / elements
        name = f"F32, as {dtype}" if was_f32 else dtype
        source_bytes = sum(row.decoded_bytes for row in rows) * (2 if was_f32 else 1)
        sums.append(OfDtype(name, len(rows), elements, source_bytes, sum(row.stored_bytes for row in rows), bound))
    return sorted(sums, key=lambda one: (-one.source_bytes, one.dtype))


_TORCH_NAMES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def torch_dtype(manifest: Manifest) -> str:
    """torch's name of the dtype that most weights of the containers have: a model that asks for it loses nothing."""  # noqa: D403
    weights = dict.fromkeys(_TORCH_NAMES, 0)
    for row in manifest.tensors:
        if row.dtype in weights:
            weights[row.dtype] += row.elements
    return _TORCH_NAMES[max(weights, key=lambda dtype: weights[dtype])]


def average_bits(rows: Sequence[TensorRow]) -> float | None:
    """Stored bits per weight of some tensors."""
    elements = sum(row.elements for row in rows)
    return 8 * sum(row.stored_bytes for row in rows) / elements if elements else None


def total(manifest: Manifest) -> Sizes:
    """The whole model."""
    return add_up("all", manifest.files, manifest.tensors)


def part_of(manifest: Manifest) -> Callable[[str], str]:
    """The function from a file to the part of the model that it belongs to.

    That is the top-level folder if any file is in a folder, else the file itself.
    """
    folders = any("/" in file.file for file in manifest.files)

    def part(file: str) -> str:
        if "/" in file:
            return file.split("/")[0]
        return "(top level)" if folders else file

    return part


def parts(manifest: Manifest) -> list[tuple[Sizes, list[TensorRow]]]:
    """At most MOST_PARTS parts of a model, each with its tensors, in the order of the manifest."""
    part = part_of(manifest)
    files: dict[str, list[FileRow]] = {}
    rows: dict[str, list[TensorRow]] = {}
    for file in manifest.files:
        files.setdefault(part(file.file), []).append(file)
    for row in manifest.tensors:
        rows.setdefault(part(row.file), []).append(row)
    names = list(dict.fromkeys([*files, *rows]))
    if len(names) > MOST_PARTS:
        largest = set(
            sorted(names, key=lambda name: -sum(file.bytes for file in files.get(name, [])))[: MOST_PARTS - 1]
        )
        rest = [name for name in names if name not in largest]
        together = f"{len(rest)} others"
        for name in rest:
            files.setdefault(together, []).extend(files.pop(name, []))
            rows.setdefault(together, []).extend(rows.pop(name, []))
        names = [*(name for name in names if name in largest), together]
    return [(add_up(name, files.get(name, []), rows.get(name, [])), rows.get(name, [])) for name in names]


# Layers


@dataclass(frozen=True, slots=True)
class Position:
    """Where a matrix belongs in a model.

    ``stack`` is its name before the first number, ``layer`` the number, ``kind`` the name after it.
    """

    stack: str
    layer: int
    kind: str


_LAYER: Final = re.compile(r"(?:(.*?)\.)?([0-9]{1,6})\.(.+)", re.DOTALL)
_NUMBER: Final = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def position(name: str) -> Position | None:
    """The position that a tensor's name implies; None if it contains no number.

    Numbers after the first one (experts) become asterisks.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    stack, layer, kind = match.groups()
    return Position(stack or "", int(layer), _NUMBER.sub("*", kind).removesuffix(".weight"))


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of the same form: the BF16 matrices of each kind, by layer. Kinds with the most weights come first."""

    name: str
    kinds: dict[str, dict[int, list[TensorRow]]]

    @property
    def rows(self) -> list[TensorRow]:
        """All matrices of the stack."""
        return [row for layers in self.kinds.values() for rows in layers.values() for row in rows]

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers, ascending."""
        return sorted({layer for layers in self.kinds.values() for layer in layers})

    def by_layer(self, value: Callable[[Sequence[TensorRow]], float | None]) -> dict[int, float]:
        """A value for all matrices of each layer."""
        found = {
            layer: value([row for layers in self.kinds.values() for row in layers.get(layer, [])])
            for layer in self.layers
        }
        return {layer: number for layer, number in found.items() if number is not None}


def is_matrix(row: TensorRow) -> bool:
    """Whether a tensor is a BF16 matrix: not empty, with two or more dimensions."""
    return is_bf16(row) and row.elements > 0 and len(row.shape) > 1


def stacks(manifest: Manifest) -> tuple[list[Stack], list[TensorRow]]:
    """The stacks of layers, largest first, and the matrices that belong to none, largest first."""
    part = part_of(manifest)
    folders = any("/" in file.file for file in manifest.files)
    found: dict[str, dict[str, dict[int, list[TensorRow]]]] = {}
    outside = []
    for row in filter(is_matrix, manifest.tensors):
        place = position(row.name)
        if place is None:
            outside.append(row)
            continue
        of = ": ".join(filter(None, [part(row.file) if folders else "", place.stack])) or "layers"
        found.setdefault(of, {}).setdefault(place.kind, {}).setdefault(place.layer, []).append(row)
    made = []
    for name, kinds in found.items():
        ordered = dict(
            sorted(
                kinds.items(),
                key=lambda item: (-sum(row.elements for rows in item[1].values() for row in rows), item[0]),
            )
        )
        stack = Stack(name, ordered)
        if not STACK_LAYERS <= len(stack.layers) <= MOST_LAYERS:
            outside += stack.rows
        else:
            made.append(stack)
    made.sort(key=lambda stack: (-sum(row.elements for row in stack.rows), stack.name))
    return made, sorted(outside, key=lambda row: (-row.elements, row.file, row.name))


def alike(rows: Iterable[TensorRow]) -> list[tuple[str, list[TensorRow]]]:
    """Matrices by name, largest group first. Names that differ only in numbers, shown as asterisks, are equal."""
    groups: dict[str, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(_NUMBER.sub("*", row.name), []).append(row)
    named = [
        ((name if len(group) > 1 else group[0].name).removesuffix(".weight"), group) for name, group in groups.items()
    ]
    return sorted(named, key=lambda item: (-sum(row.elements for row in item[1]), item[0]))


# Exponents


def exponents(rows: Iterable[TensorRow]) -> tuple[Counts, int]:
    """How often each exponent, i64 [256], occurs in the counted tensors, and how many weights these have."""
    counts: Counts = np.zeros(256, np.int64)
    for row in rows:
        if row.exponent_counts is not None and is_bf16(row):
            counts += row.exponent_counts.array()
    return counts, int(counts.sum())


def quantiles(counts: Counts, shares: Sequence[float]) -> list[int]:
    """For each share, the exponent at or below which that share of the weights lies."""
    cumulated = np.cumsum(counts)
    return [int(np.searchsorted(cumulated, min(share * cumulated[-1], cumulated[-1]))) for share in shares]


# Outliers


@dataclass(frozen=True, slots=True)
class Outlier:
    """A tensor whose bits per weight are far from the model's median.

    ``excess_bytes``: its size beyond the size at the median rate.
    """

    row: TensorRow
    bits: float
    excess_bytes: float


@dataclass(frozen=True, slots=True)
class Outliers:
    """``usual``: median bits per weight of the large BF16 tensors; ``limit``: an outlier's least distance from it."""

    usual: float | None
    limit: float
    tensors: list[Outlier]
    """Largest absolute excess first."""


def outliers(manifest: Manifest) -> Outliers:
    """The tensors of OUTLIER_WEIGHTS or more weights that are far from the median in bits per weight."""
    large = [
        (row, 8 * row.stored_bytes / row.elements)
        for row in manifest.tensors
        if is_bf16(row) and row.elements >= OUTLIER_WEIGHTS
    ]
    if not large:
        return Outliers(None, OUTLIER_BITS, [])
    usual = median(bits for _, bits in large)
    deviation = median(abs(bits - usual) for _, bits in large)
    limit = max(OUTLIER_BITS, OUTLIER_DEVIATIONS * deviation)
    found = [Outlier(row, bits, (bits - usual) * row.elements / 8) for row, bits in large if abs(bits - usual) > limit]
    return Outliers(
        usual,
        limit,
        sorted(found, key=lambda outlier: (-abs(outlier.excess_bytes), outlier.row.file, outlier.row.name)),
    )


# Restoring


@dataclass(frozen=True, slots=True)
class Proof:
    """A file, and how exactly it can be restored."""

    file: FileRow
    tensors: int
    segments: int
    """Pieces with their own checksums."""
    cast: int
    changed: int
    """Tensors cast from F32, and those whose values changed."""

    @property
    def exact(self) -> bool:
        """Whether restoring gives the source file, byte for byte."""
        return self.changed == 0


def proofs(manifest: Manifest) -> list[Proof]:
    """One per file, in the order of the manifest."""
    rows: dict[str, list[TensorRow]] = {}
    for row in manifest.tensors:
        rows.setdefault(row.file, []).append(row)
    found = []
    for file in manifest.files:
        own = rows.get(file.file, [])
        segments = sum(len(row.decoded_xxh3) for row in own)
        found.append(
            Proof(
                file,
                len(own),
                segments,
                sum(row.exact is not None for row in own),
                sum(row.exact is False for row in own),
            )
        )
    return found


def checksum_list(manifest: Manifest) -> str:
    """Input of ``sha256sum --check`` for the source files that can be restored byte for byte.

    Files whose names ``sha256sum`` would escape are left out.
    """
    files = [proof.file for proof in proofs(manifest) if proof.exact]
    plain = [
        file
        for file in files
        if "\\" not in file.source_file and errors.printable(file.source_file, None) == file.source_file
    ]
    return "".join(f"{file.source_sha256}  {file.source_file}\n" for file in plain)


def share(part: float, whole: float) -> float | None:
    """``part`` of ``whole``; None if ``whole`` is zero."""
    return part / whole if whole else None
