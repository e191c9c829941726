"""What is done with compressed weights without decoding all of them, or without decoding them at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import nn

from df11.runtime import compressed as tensors
from df11.runtime import weight
from df11.runtime.weight import CompressedWeight, FrozenWeightError, ViewStep

_aten: Final = torch.ops.aten

SLICE_WEIGHTS: Final = 1 << 25
"""A matrix with more weights is decoded in slices of rows for a product, so that an output layer needs little scratch.

The operators are called by name, as tests patch it.
"""

Handler = TypeVar("Handler", bound=Callable[..., Any])


def _handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        weight.HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


# Products.


def linear(input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 - the names that callers may use
    """``F.linear`` if no gradient is wanted: one step where torch takes three, each of which would be dispatched."""
    x, matrix = input, weight
    if type(matrix) is not CompressedWeight or matrix._views or len(matrix.compressed.shape) != 2:
        return NotImplemented
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return NotImplemented
    if type(bias) is CompressedWeight:
        bias = bias.decode()
    if matrix.compressed.elements > SLICE_WEIGHTS:
        return _by_rows(x, matrix, bias)
    prefetcher = matrix.compressed.prefetcher
    if prefetcher is not None:
        with prefetcher.weight(matrix.compressed) as values:
            if values is not None:
                return nn.functional.linear(x, values.view(matrix.compressed.shape), bias)
    return nn.functional.linear(x, matrix.here.decode(), bias)


def _by_rows(x: torch.Tensor, matrix: CompressedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    # x @ matrix.T + bias, for x [..., columns].
    compressed, out = matrix.here, None
    for start, stop in _slices(matrix):
        part = nn.functional.linear(x, compressed.rows(start, stop), None if bias is None else bias[start:stop])
        if out is None:
            out = part.new_empty((*x.shape[:-1], compressed.shape[0]))
        out[..., start:stop] = part
    return x.new_empty((*x.shape[:-1], 0)) if out is None else out


def _slices(matrix: CompressedWeight) -> list[tuple[int, int]]:
    rows, columns = matrix.compressed.shape
    step = max(1, SLICE_WEIGHTS // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _is_large(value: Any) -> bool:
    return isinstance(value, CompressedWeight) and value.compressed.elements > SLICE_WEIGHTS


def _is_transposed(value: CompressedWeight) -> bool:
    return len(value._views) == 1 and value._views[0].function is _aten.t.default


@_handles(_aten.mm.default)
def _mm(a: Any, b: Any) -> Any:
    if not _is_large(b) or isinstance(a, CompressedWeight) or len(b.compressed.shape) != 2:
        return NotImplemented
    if _is_transposed(b):
        return _by_rows(a, b)
    if b._views:
        return NotImplemented
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    compressed = b.here  # A gradient: one product of the whole matrix would be summed in F32, too.
    for start, stop in _slices(b):
        total += a[:, start:stop] @ compressed.rows(start, stop)
    return total.to(b.dtype)


@_handles(_aten.addmm.default)
def _addmm(bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    plain = not isinstance(a, CompressedWeight) and beta == alpha == 1
    if not plain or not _is_large(b) or len(b.compressed.shape) != 2 or not _is_transposed(b) or bias.dim() != 1:
        return NotImplemented
    return _by_rows(a, b, bias.decode() if isinstance(bias, CompressedWeight) else bias)


@_handles(*([_aten._grouped_mm.default] if hasattr(_aten, "_grouped_mm") else []))  # torch 2.8 and later
def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    # Experts of a layer, of which only those with tokens are decoded.
    if not isinstance(b, CompressedWeight) or isinstance(a, CompressedWeight) or offs is None or b.is_traced:
        return NotImplemented
    if len(b.compressed.shape) != 3 or not all(_keeps_rows(step) for step in b._views):
        return NotImplemented
    compressed = b.here
    values = compressed.record.new_empty(compressed.shape, dtype=compressed.dtype)
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if start < end:
            compressed.narrow(expert, expert + 1).decode(values[expert])
        start = end
    for step in b._views:
        values = step(values)
    return _aten._grouped_mm.default(a, values, offs, bias, out_dtype)


# Rows.


@_handles(_aten.embedding.default)
def _embedding(matrix: Any, ids: Any, *_: Any, **__: Any) -> Any:
    return _gathered(matrix, ids)


@_handles(_aten.index_select.default)
def _index_select(matrix: Any, dimension: int, ids: Any) -> Any:
    is_of_rows = dimension in (0, -matrix.dim()) and ids.dim() == 1
    return _gathered(matrix, ids) if is_of_rows else NotImplemented


@_handles(_aten.index.Tensor)
def _index(matrix: Any, ids: Any) -> Any:
    is_of_rows = len(ids) == 1 and ids[0] is not None and ids[0].dtype in (torch.int64, torch.int32)
    if not is_of_rows or not isinstance(matrix, CompressedWeight) or not _can_gather(matrix):
        return NotImplemented
    return _gathered(matrix, torch.where(ids[0] < 0, ids[0] + matrix.shape[0], ids[0]))


def _can_gather(matrix: CompressedWeight) -> bool:
    return not matrix._views and matrix.dim() > 1 and not (matrix.is_traced and len(matrix.compressed.pieces) > 1)


def _gathered(matrix: Any, ids: Any) -> Any:
    if not isinstance(matrix, CompressedWeight) or isinstance(ids, CompressedWeight) or not _can_gather(matrix):
        return NotImplemented
    # If the record is kept elsewhere, the few rows are decoded there and copied, rather than the whole record.
    rows: torch.Tensor = matrix.compressed.gather(ids.to(matrix.compressed.device))
    return rows.to(matrix.device)


@_handles(_aten.select.int)
def _select(matrix: Any, dimension: int, index: Any) -> Any:
    if not _narrows(matrix, dimension) or not -matrix.shape[0] <= index < matrix.shape[0]:
        return NotImplemented
    step = ViewStep(_aten.select.int, (0, int(index) % matrix.shape[0]))
    row = int(index) % matrix.shape[0]
    return CompressedWeight.of(
        matrix.compressed.narrow(row, row + 1),
        matrix.device,
        (*matrix._views, ViewStep(_aten.select.int, (0, 0))),
        step(matrix.form),
    )


@_handles(_aten.unbind.int)
def _unbind(matrix: Any, dimension: int = 0) -> Any:
    return (
        [_select(matrix, 0, row) for row in range(matrix.shape[0])] if _narrows(matrix, dimension) else NotImplemented
    )


@_handles(_aten.slice.Tensor)
def _slice(matrix: Any, dimension: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if step != 1 or not _narrows(matrix, dimension):
        return NotImplemented
    first, last, _ = slice(start, end).indices(matrix.shape[0])
    form = _aten.slice.Tensor(matrix.form, 0, start, end)
    return CompressedWeight.of(matrix.compressed.narrow(first, max(first, last)), matrix.device, matrix._views, form)


def _narrows(matrix: CompressedWeight, dimension: int) -> bool:
    # Whether this dimension is that of the rows, so that the others need not be decoded.
    is_first = matrix.dim() > 0 and dimension in (0, -matrix.dim()) and not matrix.is_traced
    return is_first and all(_keeps_rows(step) for step in matrix._views)


def _keeps_rows(step: ViewStep) -> bool:
    return step.function is _aten.transpose.int and 0 not in step.arguments


@_handles(_aten.transpose.int)
def _transpose(matrix: Any, first: int, second: int) -> Any:
    step = ViewStep(_aten.transpose.int, (first % matrix.dim(), second % matrix.dim())) if matrix.dim() else None
    return NotImplemented if step is None or matrix.is_traced else matrix.view_by(step)


@_handles(_aten.t.default)
def _t(matrix: Any) -> Any:
    if _is_transposed(matrix):
        return CompressedWeight.of(matrix.compressed, matrix.device)
    if not matrix.is_traced or not _is_large(matrix) or matrix._views:
        return NotImplemented
    # A product of a large one is compiled in slices, too.
    return CompressedWeight.of(matrix.compressed, matrix.device, (ViewStep(_aten.t.default, ()),), _Transposed(matrix))


class _Transposed:
    # The form of a view that is made while a compiler traces, when tensors without memory would be traced, too.
    def __init__(self, matrix: CompressedWeight) -> None:
        self.shape, self.dtype = matrix.shape[::-1], matrix.dtype
        self._stride = matrix.stride()[::-1]

    def stride(self) -> tuple[int, ...]:
        return self._stride

    def storage_offset(self) -> int:
        return 0


# The same, elsewhere.


@_handles(_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
def _same(matrix: Any) -> Any:
    return CompressedWeight.of(matrix.compressed, matrix.device, matrix._views, matrix._form)


@_handles(_aten._to_copy.default)
def _to_copy(matrix: Any, **options: Any) -> Any:
    device, dtype = torch.device(options.get("device") or matrix.device), options.get("dtype") or matrix.dtype
    is_moved, is_cast = device != matrix.device, dtype != matrix.dtype
    is_kept = is_moved if not is_cast else weight.is_casting() and dtype.is_floating_point
    if not matrix.is_whole or not is_kept:
        return NotImplemented
    if device.type == "meta":
        return torch.empty_strided(matrix.shape, matrix.stride(), dtype=dtype, device=device)
    compressed = matrix.compressed.cast(dtype) if is_cast else matrix.compressed
    # What a loader is about to keep is decoded if the record takes more than the values.
    if is_cast and not compressed.is_smaller and not matrix._is_param:
        return NotImplemented
    if is_moved:
        compressed = compressed.to(device, non_blocking=bool(options.get("non_blocking")))
    return CompressedWeight.of(compressed, None if is_moved else matrix.device)


@_handles(_aten._pin_memory.default, _aten.pin_memory.default)
def _pin_memory(matrix: Any, device: Any = None) -> Any:
    if not matrix.is_whole:
        return NotImplemented
    return CompressedWeight.of(matrix.compressed.with_record(matrix.compressed.record.pin_memory(device)))


@_handles(_aten.is_pinned.default)
def _is_pinned(matrix: Any, device: Any = None) -> Any:
    return matrix.compressed.record.is_pinned(device)


@_handles(_aten.record_stream.default)
def _record_stream(matrix: Any, stream: Any) -> None:
    if matrix.compressed.record.is_cuda:
        matrix.compressed.record.record_stream(stream)


@_handles(_aten.stack.default)
def _stack(parts: Any, dim: int = 0) -> Any:
    if not _can_join(parts) or any(part.shape != parts[0].shape for part in parts):
        return NotImplemented
    return CompressedWeight.of(tensors.joined([part.compressed for part in parts], dim, stacked=True))


@_handles(_aten.cat.default)
def _cat(parts: Any, dim: int = 0) -> Any:
    if not _can_join(parts) or len({part.dim() for part in parts}) > 1:
        return NotImplemented
    dim %= parts[0].dim()
    if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
        return NotImplemented
    return CompressedWeight.of(tensors.joined([part.compressed for part in parts], dim, stacked=False))


def _can_join(parts: Any) -> bool:
    if not weight.is_joining() or not all(isinstance(part, CompressedWeight) and part.is_whole for part in parts):
        return False
    return len({(part.compressed.device, part.device, part.dtype) for part in parts}) == 1


# Shapes without values, and writing what it holds already.

_LIKE: Final = (
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_empty_strided",
)  # fmt: skip


def _like(function: Any) -> Callable[..., Any]:
    def make(matrix: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(matrix, CompressedWeight) or matrix.is_traced:
            return NotImplemented
        return function(matrix.form, *args, **{**options, "device": options.get("device") or matrix.device})

    return make


for _name in _LIKE:
    for _overload in getattr(_aten, _name).overloads():
        _function = getattr(getattr(_aten, _name), _overload)
        if not any(argument.is_out for argument in _function._schema.arguments):
            weight.HANDLERS[_function] = _like(_function)


@_handles(_aten.copy_.default)
def _copy(matrix: Any, values: Any, non_blocking: bool = False) -> Any:  # noqa: ARG001
    if not isinstance(matrix, CompressedWeight):
        return NotImplemented
    if not matrix.holds(values if values.shape == matrix.shape else values.expand(matrix.shape)):
        raise FrozenWeightError("copy_ of other values")
    return matrix


@_handles(_aten.detach_.default)
def _detach(matrix: Any) -> Any:
    return matrix
