"""Modules whose weights stay compressed: decoded in the module's own ``forward``, whoever calls it, then freed.

A compressed module is an instance of a subclass made from its original class. Instead of the parameter ``weight`` it
has the parameter ``weight_df11``, the record as u8, which moves, is saved and is offloaded like any other; ``weight``
is a property that decodes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.utils._pytree import tree_map

from df11.formats import errors, layout
from df11.runtime import operators
from df11.runtime.prefetch import Prefetcher, Streams

SUFFIX: Final = "_df11"
"""Suffix of the name of a parameter that holds a record."""
SLICE_WEIGHTS: Final = 1 << 25
"""A linear layer with more weights is decoded in slices of rows, so that an output layer needs little scratch."""


_PREFETCHER: Final = "_df11_prefetcher"
_EXECUTION: Final = "_df11_execution_device"


class FrozenWeightError(errors.UsageError):
    """Something tried to change, replace or fuse a compressed weight."""


def _frozen(what: str) -> FrozenWeightError:
    return FrozenWeightError(
        f"{what}: the weight is compressed and cannot be changed", hint="call df11.runtime.materialize(module) first"
    )


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a record of a module decodes to."""

    shape: tuple[int, ...]
    segment_elements: int

    @property
    def elements(self) -> int:
        """Weights."""
        return math.prod(self.shape)


class DecodedWeight(torch.Tensor):
    """What ``module.weight`` returns to outsiders: decoded values that can be read and computed with, but not changed.

    A change would be lost, since the record stays as it is: fusing a LoRA, for example, would silently do nothing.
    """

    payload: nn.Parameter

    @staticmethod
    def of(values: torch.Tensor, payload: nn.Parameter) -> DecodedWeight:
        """Guard decoded values against changes."""
        guarded: DecodedWeight = torch.Tensor._make_subclass(DecodedWeight, values)
        guarded.payload = payload
        return guarded

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        changed = [args[0]] if args and (name in _CHANGING or (name.endswith("_") and not name.endswith("__"))) else []
        out = kwargs.get("out", ())
        changed += out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(target, DecodedWeight) for target in changed):
            raise _frozen(name)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        guards = [argument for argument in args if isinstance(argument, DecodedWeight)]
        return _guard_views(result, guards) if guards else result


class UnreadWeight(DecodedWeight):
    """A decoded weight that is decoded only when its values are needed.

    Libraries often look at nothing but a weight's dtype, in every forward. Like any parameter, it may be on the meta
    device until an offloading hook has brought the record.
    """

    _module: CompressedModule
    _part: str
    _decoded: DecodedWeight | None

    @staticmethod
    def of_module(module: CompressedModule, name: str) -> UnreadWeight:
        """The weight of a module."""
        payload: Any = module._parameters[name + SUFFIX]
        device = payload.device if payload.device.type == "meta" else module.__dict__.get(_EXECUTION) or payload.device
        unread: UnreadWeight = torch.Tensor._make_wrapper_subclass(
            UnreadWeight, module.geometries[name].shape, dtype=torch.bfloat16, device=device
        )
        unread.payload, unread._module, unread._part, unread._decoded = payload, module, name, None
        return unread

    def read(self) -> DecodedWeight:
        """The values."""
        if self._decoded is None:
            self._decoded = DecodedWeight.of(self._module.decode(self._part), self.payload)
        return self._decoded

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__self__", None) is torch.Tensor.data and len(args) == 1:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if is_about_form(function):
                return function(*args, **(kwargs or {}))
        return function(*tree_map(_read, args), **tree_map(_read, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return function(*tree_map(_read, args), **tree_map(_read, kwargs or {}))


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, UnreadWeight) else value


def is_about_form(function: Any) -> bool:
    """Whether a torch function, as ``__torch_function__`` gets it, reads only shape, dtype, device or the like."""
    if function in _FORM:
        return True
    of_property = (
        getattr(getattr(function, "__self__", None), "__name__", "")
        if getattr(function, "__name__", "") == "__get__"
        else ""
    )
    return of_property.startswith("is_") or of_property in {
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "nbytes",
        "itemsize",
        "requires_grad",
        "grad",
    }


_FORM: Final = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "size",
        "dim",
        "numel",
        "nelement",
        "element_size",
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "__len__",
    )
)


_CHANGING: Final = frozenset(
    {
        "__set__",
        "__setitem__",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "__ifloordiv__",
        "__imod__",
        "__ipow__",
    }
    | {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)


def _guard_views(result: Any, guards: Sequence[DecodedWeight]) -> Any:
    # A view of guarded values is guarded; results computed from them are not.
    if isinstance(result, (tuple, list)):
        return type(result)(_guard_views(item, guards) for item in result)
    if not isinstance(result, torch.Tensor) or result.device.type == "meta":
        return result
    with torch._C.DisableTorchFunctionSubclass():
        for guard in guards:
            if result.numel() and result.untyped_storage().data_ptr() == guard.untyped_storage().data_ptr():
                return DecodedWeight.of(result, guard.payload)
        return result.as_subclass(torch.Tensor) if isinstance(result, DecodedWeight) else result


class _Inside(threading.local):
    """The modules whose ``forward`` runs in this thread: they see their weights as plain tensors."""

    def __init__(self) -> None:
        self.modules: list[CompressedModule] = []


_inside: Final = _Inside()


class CompressedModule(nn.Module):
    """Base of all compressed modules. ``geometries``: parameter name -> shape and segments of its record."""

    geometries: dict[str, Geometry]
    _original: ClassVar[type[nn.Module]]

    def decode(self, name: str = "weight") -> torch.Tensor:
        """The values of a compressed parameter, BF16, freshly decoded on the device where the module runs."""
        geometry = self.geometries[name]
        decoded: torch.Tensor = operators.decode(self.record(name), list(geometry.shape), geometry.segment_elements)
        return decoded

    def record(self, name: str = "weight") -> torch.Tensor:
        """The record of a compressed parameter on the device where the module runs; copied if kept elsewhere."""
        payload, device = self.payload(name), self.__dict__.get(_EXECUTION)
        return aligned(payload) if device is None or payload.device == device else payload.to(device, non_blocking=True)

    def payload(self, name: str = "weight") -> nn.Parameter:
        """The record of a compressed parameter, u8."""
        found = self._parameters[name + SUFFIX]
        if found is None or found.device.type == "meta":
            raise errors.MissingError(
                "this weight has not been loaded", tensor=name, hint="load the model, or let its offloading hook run"
            )
        return found

    def prefetch_elements(self) -> int:
        """Number of weights of ``weight``, for prefetching."""
        return self.geometries["weight"].elements

    def prefetch_state(self) -> object:
        """Which record ``weight`` has, and whether it has been written to since."""
        payload = self.payload()
        # A tensor made in inference mode counts no writes, and raises if asked.
        return payload.data_ptr(), None if payload.is_inference() else payload._version

    def prefetch_into(self, out: torch.Tensor) -> None:
        """Launch the decoding of ``weight`` on the current stream, into BF16 [elements]."""
        record, geometry = self.record(), self.geometries["weight"]
        if record.is_cuda:
            record.record_stream(torch.cuda.current_stream(record.device))
        operators.decode_into([record], [geometry.elements], [geometry.segment_elements], [0], [out])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the original class, which sees decoded weights."""
        _inside.modules.append(self)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _inside.modules.pop()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move the module. A cast raises, as records cannot be cast."""
        dtype = fn(torch.empty(0, dtype=torch.bfloat16)).dtype
        if dtype != torch.bfloat16:
            raise _frozen(f"to {dtype}")
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("geometries", ()):
            if (
                isinstance(value, DecodedWeight) and value.shape == self.geometries[name].shape
            ):  # Tying one compressed weight to another.
                self._parameters[name + SUFFIX] = value.payload
                return
            raise _frozen(f"setting {name}")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:  # The class is made at run time, so pickle cannot find it by name.
        state = {
            name: value for name, value in self.__dict__.items() if name != _PREFETCHER
        }  # Buffers and streams stay behind.
        return _rebuild, (self._original, tuple(self.geometries)), state

    def extra_repr(self) -> str:
        """The original's text, and what is compressed."""
        sizes = ", ".join(
            f"{name}: {self.payload_bytes(name):,} of {2 * geometry.elements:,} bytes"
            for name, geometry in self.geometries.items()
        )
        return ", ".join(filter(None, [super().extra_repr(), f"df11({sizes})"]))

    def payload_bytes(self, name: str) -> int:
        """Size of a record."""
        found = self._parameters[name + SUFFIX]
        return 0 if found is None else found.numel()


class CompressedLinear(CompressedModule):
    """A linear layer: decode, multiply; a large one in slices of rows."""

    in_features: int
    out_features: int
    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in_features] to [..., out_features]."""
        if "weight" not in self.geometries:
            return nn.functional.linear(x, self.weight, self.decode("bias"))
        bias = self.decode("bias") if "bias" in self.geometries else self._parameters["bias"]
        geometry = self.geometries["weight"]
        if geometry.elements <= SLICE_WEIGHTS:
            prefetcher: Prefetcher | None = self.__dict__.get(_PREFETCHER)
            if prefetcher is None or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
                return nn.functional.linear(x, self.decode(), bias)
            with prefetcher.weight(self) as weight:
                return nn.functional.linear(x, self.decode() if weight is None else weight.view(geometry.shape), bias)
        record, step = self.record(), max(1, SLICE_WEIGHTS // self.in_features)
        out: torch.Tensor | None = None
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            rows = operators.decode_rows(record, list(geometry.shape), geometry.segment_elements, start, stop)
            part = nn.functional.linear(x, rows, None if bias is None else bias[start:stop])
            if out is None:
                out = part.new_empty((*x.shape[:-1], self.out_features))
            out[..., start:stop] = part
        assert out is not None
        return out


class CompressedEmbedding(CompressedModule):
    """An embedding that decodes only the rows it looks up."""

    max_norm: float | None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Row indices, of any shape, to [..., embedding_dim]."""
        if self.max_norm is not None:
            raise FrozenWeightError(
                "an embedding with max_norm changes its weight as it runs",
                hint="call df11.runtime.materialize(module) first",
            )
        geometry, payload = self.geometries["weight"], self.payload()
        # If the record is kept elsewhere, the few rows are decoded there and copied, rather than the whole record.
        rows = ids.to(payload.device)
        gathered: torch.Tensor = operators.gather_rows(
            aligned(payload), list(geometry.shape), geometry.segment_elements, rows
        )
        return gathered.to(ids.device)


def aligned(payload: torch.Tensor) -> torch.Tensor:
    """A record at an address that decoders accept; readers of files, such as disk offloading, may put it anywhere."""
    return (
        payload
        if torch.compiler.is_compiling() or payload.data_ptr() % layout.RECORD_ALIGNMENT == 0
        else payload.clone()
    )


def _property(name: str) -> property:
    def decode(self: CompressedModule) -> torch.Tensor:
        if torch.compiler.is_compiling() or any(module is self for module in _inside.modules):
            return self.decode(name)  # A compiler drops this if only shape or dtype are used.
        return UnreadWeight.of_module(self, name)

    return property(decode)


_made: Final[dict[tuple[type[nn.Module], tuple[str, ...]], type[CompressedModule]]] = {}


def _subclass(original: type[nn.Module], names: tuple[str, ...]) -> type[CompressedModule]:
    if (original, names) in _made:
        return _made[original, names]
    base: type[CompressedModule] = CompressedModule
    if original.forward is nn.Linear.forward:
        base = CompressedLinear
    elif original.forward is nn.Embedding.forward and "weight" in names:
        base = CompressedEmbedding
    fields = {name: _property(name) for name in names} | {"_original": original, "__module__": __name__}
    made: type[CompressedModule] = type(f"Compressed{original.__name__}", (base, original), fields)
    return _made.setdefault((original, names), made)


def _rebuild(original: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _subclass(original, names)
    return made.__new__(made)


def _replace(module: nn.Module, new: dict[str, tuple[str, nn.Parameter]]) -> None:
    # Replace parameters in the same order, which is that of a state dict and of its shards.
    parameters = dict(new.get(name, (name, value)) for name, value in module._parameters.items())
    module._parameters.clear()
    module._parameters.update(parameters)


def compress_parameter(module: nn.Module, name: str, record: nn.Parameter, geometry: Geometry) -> None:
    """Replace a module's parameter with a record; the module becomes a compressed one."""
    operators.check_record(record, geometry.elements, geometry.segment_elements)
    known = module.geometries if isinstance(module, CompressedModule) else {}
    original = module._original if isinstance(module, CompressedModule) else type(module)
    _replace(module, {name: (name + SUFFIX, record)})
    geometries = {**known, name: geometry}
    module.__class__ = _subclass(original, tuple(sorted(geometries)))
    module.__dict__["geometries"] = geometries


def offload_records(model: nn.Module, device: torch.device) -> None:
    """Move all records to CPU memory, pinned if there is a GPU; modules copy them to ``device`` as they run."""
    moved: dict[int, nn.Parameter] = {}
    for _, module in compressed_modules(model):
        for name in module.geometries:
            payload = module.payload(name)
            if id(payload) not in moved:
                data = payload.data.cpu()
                moved[id(payload)] = nn.Parameter(
                    data.pin_memory() if device.type == "cuda" else data, requires_grad=False
                )
            module._parameters[name + SUFFIX] = moved[id(payload)]
        module.__dict__[_EXECUTION] = device


def enable_prefetch(model: nn.Module, device: torch.device, streams: Streams) -> Prefetcher:
    """Prefetch the linear layers that are not decoded in slices, into two buffers as large as the largest weight."""
    layers = [
        module
        for _, module in compressed_modules(model)
        if isinstance(module, CompressedLinear)
        and "weight" in module.geometries
        and module.prefetch_elements() <= SLICE_WEIGHTS
    ]
    prefetcher = Prefetcher(max((layer.prefetch_elements() for layer in layers), default=0), device, streams)
    for layer in layers:
        layer.__dict__[_PREFETCHER] = prefetcher
    return prefetcher


def disable_prefetch(model: nn.Module) -> None:
    """Undo :func:`enable_prefetch`; its buffers are freed."""
    for _, module in compressed_modules(model):
        module.__dict__.pop(_PREFETCHER, None)


def prefetcher_of(module: nn.Module) -> Prefetcher | None:
    """The prefetcher of a module, if it has one."""
    found: Prefetcher | None = module.__dict__.get(_PREFETCHER)
    return found


def materialize(module: nn.Module) -> nn.Module:
    """Decode all weights in a module into ordinary parameters, which can be trained, fused and edited.

    Returns the module. Tied weights stay tied. Memory grows to that of the BF16 model.
    """
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if isinstance(part, CompressedModule):
            decoded: dict[str, nn.Parameter] = {}
            for name in part.geometries:
                payload = part.payload(name)
                if id(payload) not in done:
                    done[id(payload)] = nn.Parameter(part.decode(name), requires_grad=False)
                decoded[name] = done[id(payload)]
            _replace(part, {name + SUFFIX: (name, parameter) for name, parameter in decoded.items()})
            part.__class__ = part._original  # type: ignore[assignment]
            for name in ("geometries", _PREFETCHER, _EXECUTION):
                part.__dict__.pop(name, None)
    return module


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """Names and compressed modules of a model."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule):
            yield name, module
