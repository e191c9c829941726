"""A compressed tensor in device memory: its records, and what they decode to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from df11.formats import errors, layout
from df11.formats.container import Container

if TYPE_CHECKING:
    import torch

    from df11.runtime.operators import Decoder
    from df11.runtime.prefetch import Prefetcher


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of weights of one record, and the box of the tensor that they fill, in the tensor's order.

    ``begin``, ``size``: bytes of the record, within those of the tensor. ``elements``, ``dtype``: weights of the whole
    record, and theirs. ``first``: the first weight of the run. ``start``, ``shape``: of the box. ``source``: file and
    name, if known. ``casts``: dtypes that decoded weights are cast to, one after another.
    """

    begin: int
    size: int
    elements: int
    dtype: torch.dtype
    segment_elements: int
    first: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: tuple[str, str] | None = None
    casts: tuple[torch.dtype, ...] = ()

    def cast(self, dtype: torch.dtype) -> Piece:
        """The same, cast once more."""
        casts = self.casts
        if casts and casts[-1].itemsize > (self.dtype, *casts)[-2].itemsize:
            casts = casts[:-1]  # A wider dtype holds the values before it exactly.
        return replace(self, casts=casts if (self.dtype, *casts)[-1] == dtype else (*casts, dtype))

    def as_cast(self, values: torch.Tensor) -> torch.Tensor:
        """Decoded weights of any shape, cast."""
        for dtype in self.casts:
            values = values.to(dtype)
        return values


class CompressedTensor:
    """A tensor held as a record on a device, decoded on request. It is never changed.

    ``record``: u8, one-dimensional, the record as it is in the file. ``shape``, ``dtype``: of the decoded tensor.
    ``dtype`` is the record's, by default BF16, or another that is cast to, see :meth:`cast`.
    ``segment_elements``: weights per segment of the record (the last may have fewer). On a GPU, decoding is launched on
    torch's current stream. Damaged bytes decode to wrong weights but never cause an access out of bounds;
    :func:`check_errors` reports them. Where tensors have been joined, ``record`` holds their records one after another,
    and ``pieces`` says which part of the tensor each fills.
    """

    record: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    prefetcher: Prefetcher | None
    _record_size: int
    _kept: torch.Tensor | None
    _part_of: tuple[CompressedTensor, int] | None

    def __init__(
        self,
        record: torch.Tensor,
        shape: Sequence[int],
        segment_elements: int = layout.DEFAULT_SEGMENT_WEIGHTS,
        dtype: torch.dtype | None = None,
    ) -> None:
        import torch

        from df11.runtime import operators

        elements, dtype = math.prod(shape), dtype or torch.bfloat16
        operators.check_record(record, elements, segment_elements, operators.kind_of(dtype))
        piece = Piece(0, record.numel(), elements, dtype, segment_elements, 0, (0,) * len(shape), tuple(shape))
        self._set(record, tuple(shape), dtype, (piece,))

    def _set(self, record: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, pieces: tuple[Piece, ...]) -> None:
        self.record, self.shape, self.dtype, self.pieces = record, shape, dtype, pieces
        self._record_size = record.numel()  # A tracer would record the question, if it were asked later.
        self.prefetcher = self._kept = self._part_of = None

    @classmethod
    def of_pieces(
        cls, record: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, pieces: tuple[Piece, ...]
    ) -> CompressedTensor:
        """A tensor of pieces that have been checked."""
        made = cls.__new__(cls)
        made._set(record, shape, dtype, pieces)
        return made

    @classmethod
    def load(cls, container: Container, name: str, device: str | torch.device = "cuda") -> CompressedTensor:
        """Read a record of an open container, check its checksums, and copy it to a device."""
        import torch

        from df11.runtime import load

        record = container.record(name)
        data = torch.from_numpy(record.read_whole()).to(device)
        made = cls(data, container.info(name).shape, record.segment_elements, load.torch_dtype(container, name))
        return made.from_file(container.path, name)

    def from_file(self, file: str, name: str) -> CompressedTensor:
        """The same, which remembers where it is stored."""
        return self._with(self.record, tuple(replace(piece, source=(file, name)) for piece in self.pieces))

    def _with(
        self, record: torch.Tensor, pieces: tuple[Piece, ...], shape: tuple[int, ...] | None = None
    ) -> CompressedTensor:
        return self.of_pieces(record, self.shape if shape is None else shape, self.dtype, pieces)

    def cast(self, dtype: torch.dtype) -> CompressedTensor:
        """The same record as a tensor of another dtype: decoded values are cast as :meth:`torch.Tensor.to` does."""
        return self.of_pieces(self.record, self.shape, dtype, tuple(piece.cast(dtype) for piece in self.pieces))

    @property
    def is_smaller(self) -> bool:
        """Whether the record takes fewer bytes than the values."""
        return self.record.numel() < self.elements * self.dtype.itemsize

    @property
    def segment_elements(self) -> int:
        """Weights per segment."""
        return self.pieces[0].segment_elements

    @property
    def device(self) -> torch.device:
        """The device that holds the record."""
        return self.record.device

    @property
    def elements(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether all weights of its records belong to it."""
        return sum(piece.elements for piece in self.pieces) == self.elements

    @property
    def _only_record(self) -> torch.Tensor | None:
        # The record, if there is just one and all of it belongs to the tensor.
        piece = self.pieces[0] if len(self.pieces) == 1 else None
        if piece is None or piece.elements != self.elements:
            return None
        whole = piece.size == self._record_size
        return _aligned(self.record if whole else self.record[piece.begin : piece.begin + piece.size])

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> CompressedTensor:
        """The same on another device."""
        return self._with(self.record.to(device, non_blocking=non_blocking), self.pieces)

    def with_record(self, record: torch.Tensor) -> CompressedTensor:
        """The same over another copy of the record."""
        return self._with(record, self.pieces)

    def decode(self, out: torch.Tensor | None = None, *, background: bool = False) -> torch.Tensor:
        """All weights, of ``shape`` and ``dtype``; written to ``out`` (contiguous, as many of ``dtype``) if given.

        ``background`` selects the kernel with few registers and little shared memory, which can run beside others on a
        side stream.
        """
        from df11.runtime import operators

        if out is None and (record := self._only_record) is not None:
            piece = self.pieces[0]
            return piece.as_cast(
                operators.decode(record, list(self.shape), piece.segment_elements, background, piece.dtype)
            )
        if out is None:
            out = self.record.new_empty(self.shape, dtype=self.dtype)
        elif out.dtype != self.dtype or not out.is_contiguous() or out.numel() != self.elements:
            raise errors.UsageError(
                "the output must be contiguous",
                expected=f"{self.elements} weights, {self.dtype}",
                found=f"{tuple(out.shape)}, {out.dtype}",
            )
        self._decode_pieces(out.view(self.shape), background)
        return out

    def _decode_pieces(self, out: torch.Tensor, background: bool) -> None:
        from df11.runtime import operators

        into: dict[Piece, torch.Tensor] = {}
        apart: list[tuple[Piece, torch.Tensor, torch.Tensor]] = []
        for piece in self.pieces:
            box = out
            for dimension, (start, size) in enumerate(zip(piece.start, piece.shape, strict=True)):
                box = box.narrow(dimension, start, size)
            if not box.is_contiguous() or piece.casts:
                apart.append((piece, box, box.new_empty(box.shape, dtype=piece.dtype)))
                box = apart[-1][2]
            into[piece] = box
        record = _aligned(self.record)
        for dtype in dict.fromkeys(piece.dtype for piece in self.pieces):
            pieces = [piece for piece in self.pieces if piece.dtype == dtype]
            operators.decode_into(
                [record[piece.begin : piece.begin + piece.size] for piece in pieces],
                [piece.elements for piece in pieces],
                [piece.segment_elements for piece in pieces],
                [piece.first for piece in pieces],
                [into[piece] for piece in pieces],
                background,
                dtype,
            )
        for piece, box, values in apart:
            box.copy_(piece.as_cast(values))

    def kept(self, device: torch.device) -> torch.Tensor:
        """The decoded values at one address, which stay in memory as long as this tensor: for who reads there."""
        if self._part_of is not None:
            whole, start = self._part_of
            return whole.kept(device)[start : start + self.shape[0]]
        if self._kept is None or self._kept.device != device:
            self._kept = self.to(device).decode()
        return self._kept

    def decode_ahead(self, out: torch.Tensor) -> None:
        """Launch decoding into ``out``, [elements], on the current stream, which need not be that of the record."""
        import torch

        here = self.to(out.device, non_blocking=True)
        if here.record.is_cuda:
            here.record.record_stream(torch.cuda.current_stream(here.device))
        here.decode(out)

    def __getstate__(self) -> dict[str, Any]:  # Buffers and streams stay behind.
        return {**self.__dict__, "prefetcher": None, "_kept": None, "_part_of": None}

    def narrow(self, start: int, stop: int) -> CompressedTensor:
        """Rows ``start`` to ``stop`` (exclusive) of the first dimension; it shares the record."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise errors.UsageError("no such rows", expected=f"within 0 to {self.shape[0]}", found=(start, stop))
        kept = []
        for piece in self.pieces:
            low, high = max(start, piece.start[0]), min(stop, piece.start[0] + piece.shape[0])
            if low < high:
                first = piece.first + (low - piece.start[0]) * math.prod(piece.shape[1:])
                box = (low - start, *piece.start[1:]), (high - low, *piece.shape[1:])
                kept.append(replace(piece, first=first, start=box[0], shape=box[1]))
        made = self._with(self.record, tuple(kept), (stop - start, *self.shape[1:]))
        made._part_of = self, start
        return made

    def rows(self, start: int, stop: int, *, background: bool = False) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (exclusive) of the first dimension. Tiles outside of them are not decoded."""
        from df11.runtime import operators

        if (record := self._only_record) is None:
            return self.narrow(start, stop).decode(background=background)
        piece = self.pieces[0]
        return piece.as_cast(
            operators.decode_rows(
                record, list(self.shape), piece.segment_elements, start, stop, background, piece.dtype
            )
        )

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows with the indices ``ids`` (i64 or i32, any shape, on the same device), as for an embedding.

        Of a tensor with three or more dimensions, such as the experts of a layer, each row is decoded once.
        """
        import torch

        from df11.runtime import operators

        if len(self.shape) > 2 or (record := self._only_record) is None:
            wanted, places = torch.unique(ids, return_inverse=True)
            rows = [self.rows(row, row + 1) for row in wanted.tolist()]
            return (torch.cat(rows) if rows else self.rows(0, 0))[places]
        piece = self.pieces[0]
        return piece.as_cast(operators.gather_rows(record, list(self.shape), piece.segment_elements, ids, piece.dtype))


def _aligned(record: torch.Tensor) -> torch.Tensor:
    # At an address that decoders accept; readers of files, such as disk offloading, may put it anywhere.
    import torch

    if torch.compiler.is_compiling() or type(record) is not torch.Tensor:
        return record
    return record if record.data_ptr() % layout.RECORD_ALIGNMENT == 0 else record.clone()


def joined(tensors: Sequence[CompressedTensor], dimension: int, *, stacked: bool) -> CompressedTensor:
    """Tensors on one device as one: side by side in a dimension, or ``stacked`` in a new one. Nothing is decoded."""
    import torch

    begin = position = 0
    pieces = []
    for tensor in tensors:
        for piece in tensor.pieces:
            start, shape = list(piece.start), list(piece.shape)
            if stacked:
                start.insert(dimension, position)
                shape.insert(dimension, 1)
            else:
                start[dimension] += position
            pieces.append(replace(piece, begin=begin + piece.begin, start=tuple(start), shape=tuple(shape)))
        begin += tensor.record.numel()
        position += 1 if stacked else tensor.shape[dimension]
    shape = list(tensors[0].shape)
    if stacked:
        shape.insert(dimension, position)
    else:
        shape[dimension] = position
    record = torch.cat([tensor.record for tensor in tensors])
    return CompressedTensor.of_pieces(record, tuple(shape), tensors[0].dtype, tuple(pieces))


def decode_many(
    tensors: Sequence[CompressedTensor], out: Sequence[torch.Tensor] | None = None, *, background: bool = False
) -> list[torch.Tensor]:
    """Decode several tensors of one device at once, such as all matrices of a transformer block.

    A launch takes 64 of them, so that small ones keep the GPU busy. ``out``: a contiguous tensor for each, of its dtype
    and with as many weights; allocated if not given.
    """
    import torch

    from df11.runtime import operators

    outputs = list(out) if out is not None else [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
    if [output.numel() for output in outputs] != [tensor.elements for tensor in tensors]:
        raise errors.UsageError(
            "the outputs have other sizes than the tensors",
            expected=[t.elements for t in tensors],
            found=[o.numel() for o in outputs],
        )
    batches: dict[torch.dtype, list[tuple[CompressedTensor, torch.Tensor]]] = {}
    for tensor, output in zip(tensors, outputs, strict=True):
        if len(tensor.pieces) == 1 and tensor.is_whole and not tensor.pieces[0].casts:
            batches.setdefault(tensor.dtype, []).append((tensor, output))
        else:
            tensor.decode(output, background=background)
    for dtype, batch in batches.items():
        operators.decode_into(
            [tensor.record for tensor, _ in batch],
            [tensor.elements for tensor, _ in batch],
            [tensor.segment_elements for tensor, _ in batch],
            [0] * len(batch),
            [output for _, output in batch],
            background,
            dtype,
        )
    return outputs


def check_errors(device: str | torch.device = "cuda") -> None:
    """Wait for the current stream; raise a Df11Error if a kernel met damaged bytes or a row index out of range.

    On the CPU, decoding itself raises at once.
    """
    decoder(device).check_errors()


def warm_up(device: str | torch.device = "cuda", dtype: torch.dtype | None = None) -> None:
    """Compile or load the kernels of a device now rather than at first use, which a CUDA graph cannot capture.

    ``dtype``: that of the records that will be decoded, by default BF16; each has kernels of its own.
    """
    import torch

    from df11.runtime import operators

    decoder(device).prepare(operators.kind_of(dtype or torch.bfloat16))


def decoder(device: str | torch.device) -> Decoder:
    """The decoder of a device."""
    from df11.runtime import load, operators

    return operators.decoder_of(load.device_of(device))


__all__ = ["CompressedTensor", "Piece", "check_errors", "decode_many", "joined", "warm_up"]
