"""The custom operators ``torch.ops.df11.*``: decoding for torch.compile, CUDA graphs and fake tensors.

All take records as u8 tensors, one-dimensional, aligned to 16 bytes, on any device that has a decoder, and return
tensors there. ``shape`` is that of the matrix; ``segment_elements`` is the record's (weights per segment but the last);
``dtype`` is that of its weights, which on a GPU must be BF16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from df11.formats import errors, layout
from df11.runtime import cpu, gpu
from df11.runtime.kernels import Range


class Decoder(Protocol):
    """What a decoding device must offer; see :class:`df11.runtime.gpu.Gpu`."""

    def decode(self, ranges: Sequence[Range], *, background: bool = False) -> None:
        """Decode ranges of records."""

    def gather_rows(self, matrix: Range, ids: int, count: int, row_weights: int, rows: int) -> None:
        """Decode the rows of a matrix with the given indices."""

    def check_errors(self) -> None:
        """Raise the error for damage that was met and has not been raised yet."""


_CPU = cpu.Cpu()


def decoder_of(device: torch.device) -> Decoder:
    """The decoder of a device. Raises DeviceError where there is none."""
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda":
        return gpu.of(device)
    raise errors.DeviceError(f"records cannot be decoded on the device {device}", hint="use 'cuda' or 'cpu'")


_KINDS: Final = {
    torch.bfloat16: layout.BF16,
    torch.float16: layout.F16,
    torch.float32: layout.F32,
    torch.float8_e4m3fn: layout.F8_E4M3,
    torch.float8_e5m2: layout.F8_E5M2,
}


def kind_of(dtype: torch.dtype, device: torch.device) -> layout.Kind:
    """The kind of records of a dtype. Raises DtypeError for another one, DeviceError where it cannot be decoded."""
    if dtype not in _KINDS:
        raise errors.DtypeError("no record has this dtype", expected=", ".join(map(str, _KINDS)), found=dtype)
    if dtype != torch.bfloat16 and device.type != "cpu":
        raise errors.DeviceError(f"records of {dtype} are decoded on the CPU alone", hint="decode it there, then copy")
    return _KINDS[dtype]


def check_record(record: torch.Tensor, weights: int, segment_elements: int, kind: layout.Kind = layout.BF16) -> None:
    """Raise a UsageError if a tensor cannot be a record of this many weights."""
    if record.dtype != torch.uint8 or record.dim() != 1 or not record.is_contiguous():
        raise errors.UsageError(
            "a record must be a contiguous, one-dimensional u8 tensor", found=f"{record.dtype} {tuple(record.shape)}"
        )
    if record.data_ptr() % layout.RECORD_ALIGNMENT:
        raise errors.UsageError(
            "a record must be aligned to 16 bytes in memory", found=hex(record.data_ptr()), hint="pass a clone()"
        )
    if not 0 < segment_elements <= layout.MAX_SEGMENT_WEIGHTS or segment_elements % layout.TILE_WEIGHTS:
        raise errors.UsageError("segment_elements", expected="a multiple of 8192 up to 2^24", found=segment_elements)
    smallest = layout.RECORD_HEADER.size + layout.DIRECTORY_ENTRY.size * -(-weights // segment_elements)
    smallest += kind.least_size(weights)
    if (
        not 1 <= weights <= layout.MAX_RECORD_WEIGHTS
        or record.numel() < smallest
        or record.numel() % layout.RECORD_ALIGNMENT
    ):
        raise errors.UsageError(
            f"a record of {weights} weights cannot have this size",
            expected=f"{smallest} bytes or more",
            found=record.numel(),
        )


def _range(
    record: torch.Tensor, weights: int, segment_elements: int, first: int, out: torch.Tensor, dtype: torch.dtype
) -> Range:
    kind = kind_of(dtype, record.device)
    check_record(record, weights, segment_elements, kind)
    if out.dtype != dtype or not out.is_contiguous() or out.device != record.device:
        raise errors.UsageError(
            f"the output must be a contiguous tensor of {dtype} on the record's device",
            expected=record.device,
            found=f"{out.dtype} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}",
        )
    last = first + out.numel()
    if not 0 <= first <= last <= weights:
        raise errors.UsageError("no such weights", expected=f"within 0 to {weights}", found=(first, last))
    return Range(record.data_ptr(), record.numel(), weights, segment_elements, first, last, out.data_ptr(), kind)


@torch.library.custom_op("df11::decode", mutates_args=())
def decode(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    background: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """All weights of a record, of ``shape``. ``background``: use the kernel that can run beside others."""
    out = record.new_empty(shape, dtype=dtype)
    decoder_of(record.device).decode(
        [_range(record, out.numel(), segment_elements, 0, out, dtype)], background=background
    )
    return out


@decode.register_fake
def _(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,  # noqa: ARG001
    background: bool = False,  # noqa: ARG001
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    return record.new_empty(shape, dtype=dtype)


@torch.library.custom_op("df11::decode_rows", mutates_args=())
def decode_rows(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    start: int,
    stop: int,
    background: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    r"""The rows ``start`` to ``stop`` (exclusive) of the first dimension: [stop - start, \*shape[1:]]."""
    if not 0 <= start <= stop <= shape[0]:
        raise errors.UsageError("no such rows", expected=f"within 0 to {shape[0]}", found=(start, stop))
    out = record.new_empty([stop - start, *shape[1:]], dtype=dtype)
    first = start * math.prod(shape[1:])
    decoder_of(record.device).decode(
        [_range(record, math.prod(shape), segment_elements, first, out, dtype)], background=background
    )
    return out


@decode_rows.register_fake
def _(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,  # noqa: ARG001
    start: int,
    stop: int,
    background: bool = False,  # noqa: ARG001
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    return record.new_empty([stop - start, *shape[1:]], dtype=dtype)


@torch.library.custom_op("df11::gather_rows", mutates_args=())
def gather_rows(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    ids: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    r"""The rows with the indices ``ids`` (i64 or i32, any shape): [\*ids.shape, \*shape[1:]].

    An index outside the matrix raises on the CPU. On a GPU its row becomes NaN, and the next ``check_errors`` raises.
    """
    if ids.dtype not in (torch.int64, torch.int32) or ids.device != record.device:
        raise errors.UsageError(
            "row indices must be i64 or i32 on the record's device",
            expected=record.device,
            found=f"{ids.dtype} on {ids.device}",
        )
    numbers = ids.to(torch.int64).contiguous()
    out = record.new_empty([*ids.shape, *shape[1:]], dtype=dtype)
    weights, row_weights = math.prod(shape), math.prod(shape[1:])
    kind = kind_of(dtype, record.device)
    check_record(record, weights, segment_elements, kind)
    matrix = Range(record.data_ptr(), record.numel(), weights, segment_elements, 0, weights, out.data_ptr(), kind)
    decoder_of(record.device).gather_rows(matrix, numbers.data_ptr(), numbers.numel(), row_weights, shape[0])
    return out


@gather_rows.register_fake
def _(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,  # noqa: ARG001
    ids: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    return record.new_empty([*ids.shape, *shape[1:]], dtype=dtype)


@torch.library.custom_op("df11::decode_into", mutates_args=("out",))
def decode_into(
    records: list[torch.Tensor],
    weights: list[int],
    segment_elements: list[int],
    first: list[int],
    out: list[torch.Tensor],
    background: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Decode from each record (of ``weights`` weights) as many as its output holds, from weight ``first`` on.

    A launch takes 64 records.
    """
    if not len(records) == len(weights) == len(segment_elements) == len(first) == len(out):
        raise errors.UsageError("lists of different lengths")
    if not records:
        return
    if len({record.device for record in records}) > 1:
        raise errors.UsageError(
            "records on several devices", found=", ".join(sorted({str(record.device) for record in records}))
        )
    parts = zip(records, weights, segment_elements, first, out, strict=True)
    ranges = [_range(*part, dtype) for part in parts]
    decoder_of(records[0].device).decode(ranges, background=background)


@decode_into.register_fake
def _(*_arguments: object, **_options: object) -> None:
    return None
