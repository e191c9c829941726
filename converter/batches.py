"""How one source file is split: what happens to each tensor, and in which pieces the file is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from df11.converter.cast import Cast, is_rounded
from df11.converter.kernels import ENCODE_SLACK
from df11.formats import framing, layout

VERBATIM_PIECE_BYTES: Final = 4 << 20
SEGMENT_WEIGHTS: Final = layout.DEFAULT_SEGMENT_WEIGHTS


class Fate(Enum):
    """What happens to a tensor."""

    CODE = "code"
    """Encode it as a record if that makes it smaller."""
    COPY = "copy"
    """Copy it verbatim, in the order of the source."""
    DEFER = "defer"
    """Copy it verbatim, after all others: its size would misalign the next record."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor: its entry in the source, its fate, and whether it is rounded from F32 to BF16."""

    entry: framing.Entry
    fate: Fate
    cast: bool

    @property
    def may_be_bf16(self) -> bool:
        """Whether it is F32 that becomes BF16 if that loses nothing."""
        return self.entry.dtype == "F32" and self.fate is Fate.CODE and not self.cast

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that it may have in the container: usually one."""
        if self.cast:
            return ("BF16",)
        return (self.entry.dtype, "BF16") if self.may_be_bf16 else (self.entry.dtype,)

    def size_as(self, dtype: str) -> int:
        """Its bytes, decoded, if it has this dtype in the container."""
        return self.entry.size // 2 if dtype != self.entry.dtype else self.entry.size


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one tensor, read and processed together: a segment, or part of a verbatim tensor."""

    tensor: SourceTensor
    start: int
    """First byte, in the data of the source."""
    size: int
    last: bool
    """Whether this is the end of the tensor."""

    @property
    def weights(self) -> int:
        """Weights of a piece of a coded tensor."""
        return 8 * self.size // framing.DTYPE_BITS[self.tensor.entry.dtype]


@dataclass(frozen=True, slots=True)
class Batch:
    """Pieces next to each other in the source, read together."""

    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        """First byte, in the data of the source."""
        return self.pieces[0].start

    @property
    def size(self) -> int:
        """Bytes to read."""
        return self.pieces[-1].start + self.pieces[-1].size - self.start

    @property
    def output_size(self) -> int:
        """Bytes that the encoder may need for all pieces."""
        coded = [piece for piece in self.pieces if piece.tensor.fate is Fate.CODE]
        sizes = [layout.raw_segment_size(piece.weights, layout.KINDS[piece.tensor.dtypes[0]]) for piece in coded]
        return sum(sizes) + (ENCODE_SLACK if coded else 0)


def list_tensors(header: framing.Header, cast: Cast, keep: Sequence[str] = ()) -> list[SourceTensor]:
    """The fate of every tensor, in the order of the source's data. ``keep``: patterns of what is not to be cast."""
    tensors = []
    for entry in header.entries:
        is_cast = entry.dtype == "F32" and is_rounded(entry.name, cast, keep)
        if entry.dtype in layout.KINDS and 0 < entry.elements <= layout.MAX_RECORD_WEIGHTS:
            fate = Fate.CODE
        elif entry.size and entry.size % layout.RECORD_ALIGNMENT == 0 and not is_cast:
            fate = Fate.COPY
        else:
            fate = Fate.DEFER
        tensors.append(SourceTensor(entry, fate, is_cast))
    return tensors


def split_tensor(tensor: SourceTensor) -> list[Piece]:
    """The pieces of one tensor; none if it is empty."""
    step = VERBATIM_PIECE_BYTES
    if tensor.fate is Fate.CODE:
        step = SEGMENT_WEIGHTS * framing.DTYPE_BITS[tensor.entry.dtype] // 8
    entry = tensor.entry
    return [
        Piece(tensor, start, min(step, entry.end - start), start + step >= entry.end)
        for start in range(entry.start, entry.end, step)
    ]


def make_batches(tensors: Sequence[SourceTensor]) -> list[Batch]:
    """All pieces of a file. Small neighbours are joined so that one read serves many."""
    pieces = [piece for tensor in tensors for piece in split_tensor(tensor)]
    if not pieces:
        return []
    limit = max(piece.size for piece in pieces)
    limit = max(limit, min(VERBATIM_PIECE_BYTES, sum(piece.size for piece in pieces)))
    batches: list[Batch] = []
    current: list[Piece] = []
    size = 0
    for piece in pieces:
        if current and size + piece.size > limit:
            batches.append(Batch(tuple(current)))
            current, size = [], 0
        current.append(piece)
        size += piece.size
    batches.append(Batch(tuple(current)))
    return batches
