"""The custom operators ``torch.ops.df11.*``: decoding for torch.compile, CUDA graphs and fake tensors.

All take records as u8 tensors, one-dimensional, aligned to 16 bytes, on any device that has a decoder, and return
tensors there. ``shape`` is that of the matrix; ``segment_elements`` is the record's (weights per segment but the last);
``dtype`` is that of its weights.

The functions here go past torch's dispatcher, which takes longer than a launch, unless somebody must see the operator:
a compiler, a tracer, a mode, a tensor of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import torch

from df11.formats import errors, layout
from df11.runtime import cpu, gpu
from df11.runtime.kernels import Range


class Decoder(Protocol):
    """What a decoding device must offer; see :class:`df11.runtime.gpu.Gpu`."""

    def prepare(self, kind: layout.Kind) -> None:
        """Make ready what decodes records of a kind, which its first use does otherwise."""

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


def kind_of(dtype: torch.dtype) -> layout.Kind:
    """The kind of records of a dtype. Raises DtypeError if there is none."""
    if dtype not in _KINDS:
        raise errors.DtypeError("no record has this dtype", expected=", ".join(map(str, _KINDS)), found=dtype)
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
    if out.dtype != dtype or not out.is_contiguous() or out.device != record.device:
        raise errors.UsageError(
            f"the output must be a contiguous tensor of {dtype} on the record's device",
            expected=record.device,
            found=f"{out.dtype} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}",
        )
    last = first + out.numel()
    if not 0 <= first <= last <= weights:
        raise errors.UsageError("no such weights", expected=f"within 0 to {weights}", found=(first, last))
    return _checked(record, weights, segment_elements, first, last, out, kind_of(dtype))


def _checked(
    record: torch.Tensor,
    weights: int,
    segment_elements: int,
    first: int,
    last: int,
    out: torch.Tensor,
    kind: layout.Kind,
) -> Range:
    check_record(record, weights, segment_elements, kind)
    return Range(
        record=record.data_ptr(),
        record_size=record.numel(),
        element_count=weights,
        segment_elements=segment_elements,
        first=first,
        last=last,
        output=out.data_ptr(),
        owner=record.untyped_storage(),
        kind=kind,
    )


_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
_ops: Any = torch.ops.df11


def _is_watched(tensors: Iterable[torch.Tensor]) -> bool:
    # Whether somebody must see that an operator is called with these tensors.
    return (
        torch.compiler.is_compiling()
        or any(type(tensor) not in _PLAIN for tensor in tensors)
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, fake tensors, counters of operations
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
    )


_BF16: Final = torch.bfloat16


def decode(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    background: bool = False,
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    """All weights of a record, of ``shape``. ``background``: use the kernel that can run beside others."""
    if _is_watched((record,)):
        decoded: torch.Tensor = _ops.decode(record, shape, segment_elements, background, dtype)
        return decoded
    return _decode(record, shape, segment_elements, background, dtype)


def _decode(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    background: bool = False,
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    out = record.new_empty(shape, dtype=dtype)
    part = _range(record, out.numel(), segment_elements, 0, out, dtype)
    decoder_of(record.device).decode([part], background=background)
    return out


def decode_rows(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    start: int,
    stop: int,
    background: bool = False,
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    r"""The rows ``start`` to ``stop`` (exclusive) of the first dimension: [stop - start, \*shape[1:]]."""
    if _is_watched((record,)):
        decoded: torch.Tensor = _ops.decode_rows(record, shape, segment_elements, start, stop, background, dtype)
        return decoded
    return _decode_rows(record, shape, segment_elements, start, stop, background, dtype)


def _decode_rows(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,
    start: int,
    stop: int,
    background: bool = False,
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    if not 0 <= start <= stop <= shape[0]:
        raise errors.UsageError("no such rows", expected=f"within 0 to {shape[0]}", found=(start, stop))
    out = record.new_empty([stop - start, *shape[1:]], dtype=dtype)
    first = start * math.prod(shape[1:])
    part = _range(record, math.prod(shape), segment_elements, first, out, dtype)
    decoder_of(record.device).decode([part], background=background)
    return out


def gather_rows(
    record: torch.Tensor, shape: list[int], segment_elements: int, ids: torch.Tensor, dtype: torch.dtype = _BF16
) -> torch.Tensor:
    r"""The rows with the indices ``ids`` (i64 or i32, any shape): [\*ids.shape, \*shape[1:]].

    An index outside the matrix raises on the CPU. On a GPU its row becomes NaN, and the next ``check_errors`` raises.
    """
    if _is_watched((record, ids)):
        gathered: torch.Tensor = _ops.gather_rows(record, shape, segment_elements, ids, dtype)
        return gathered
    return _gather_rows(record, shape, segment_elements, ids, dtype)


def _gather_rows(
    record: torch.Tensor, shape: list[int], segment_elements: int, ids: torch.Tensor, dtype: torch.dtype = _BF16
) -> torch.Tensor:
    if ids.dtype not in (torch.int64, torch.int32) or ids.device != record.device:
        raise errors.UsageError(
            "row indices must be i64 or i32 on the record's device",
            expected=record.device,
            found=f"{ids.dtype} on {ids.device}",
        )
    numbers = ids.to(torch.int64).contiguous()
    weights, row_weights = math.prod(shape), math.prod(shape[1:])
    out = record.new_empty([*ids.shape, *shape[1:]], dtype=dtype)
    matrix = _checked(record, weights, segment_elements, 0, weights, out, kind_of(dtype))
    decoder_of(record.device).gather_rows(matrix, numbers.data_ptr(), numbers.numel(), row_weights, shape[0])
    return out


def decode_into(
    records: list[torch.Tensor],
    weights: list[int],
    segment_elements: list[int],
    first: list[int],
    out: list[torch.Tensor],
    background: bool = False,
    dtype: torch.dtype = _BF16,
) -> None:
    """Decode from each record (of ``weights`` weights) as many as its output holds, from weight ``first`` on.

    A launch takes 64 records.
    """
    if _is_watched((*records, *out)):
        _ops.decode_into(records, weights, segment_elements, first, out, background, dtype)
        return
    _decode_into(records, weights, segment_elements, first, out, background, dtype)
    for tensor in out:
        if not tensor.is_inference():  # As the dispatcher does: nobody may go backward with what was there.
            torch.autograd.graph.increment_version(tensor)


def _decode_into(
    records: list[torch.Tensor],
    weights: list[int],
    segment_elements: list[int],
    first: list[int],
    out: list[torch.Tensor],
    background: bool = False,
    dtype: torch.dtype = _BF16,
) -> None:
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


# What torch knows of them. On fake tensors, only the shapes matter.


def _fake_decode(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,  # noqa: ARG001
    background: bool = False,  # noqa: ARG001
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    return record.new_empty(shape, dtype=dtype)


def _fake_decode_rows(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,  # noqa: ARG001
    start: int,
    stop: int,
    background: bool = False,  # noqa: ARG001
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    return record.new_empty([stop - start, *shape[1:]], dtype=dtype)


def _fake_gather_rows(
    record: torch.Tensor,
    shape: list[int],
    segment_elements: int,  # noqa: ARG001
    ids: torch.Tensor,
    dtype: torch.dtype = _BF16,
) -> torch.Tensor:
    return record.new_empty([*ids.shape, *shape[1:]], dtype=dtype)


def _fake_decode_into(*_arguments: object, **_options: object) -> None:
    return None


for _function, _fake, _mutated in (
    (_decode, _fake_decode, ()),
    (_decode_rows, _fake_decode_rows, ()),
    (_gather_rows, _fake_gather_rows, ()),
    (_decode_into, _fake_decode_into, ("out",)),
):
    _name = f"df11::{_function.__name__[1:]}"
    torch.library.custom_op(_name, _function, mutates_args=_mutated).register_fake(_fake)
