"""A weight that stays compressed: a parameter with the name, dtype and shape of the decoded one, over its record.

Three rules, which torch's own schemas decide, say what happens to it:

* What writes to it is refused: the record stays as it is, so a change would be lost.
* A view of it is another weight over the same record, which remembers how to make the view.
* Everything else gets the decoded values.

``weight_operations.py`` has the operations for which there is something better to do than to decode all of it. Autograd
needs no code: it saves the weight itself, which is decoded again in the backward pass.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map

from df11.formats import errors
from df11.runtime.compressed import CompressedTensor

_aten: Final = torch.ops.aten

HINT: Final = "call df11.runtime.materialize(module) first"


class FrozenWeightError(errors.UsageError):
    """Something tried to change, cast or train a compressed weight."""

    def __init__(self, what: str) -> None:
        # torch puts only the first argument into its own message.
        super().__init__(f"{what}: the weight is compressed and cannot be changed; {HINT}")


class ViewStep(NamedTuple):
    """An operation that makes a view: ``function(values, *arguments)``, or one of its results."""

    function: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    part: int | None = None

    def __call__(self, values: Any) -> Any:
        """Make the view."""
        made = self.function(values, *self.arguments, **dict(self.options))
        return made if self.part is None else made[self.part]


class _FlattensParameters:
    """torch's protocol for tensors that wrap others, so that a compiler sees the record.

    Only parameters and what a compiler traces have it. Libraries ask for it to find out how to move, count and save a
    tensor, and what it is made of is not what they should move, count and save.
    """

    def __get__(self, weight: CompressedWeight | None, owner: type) -> Callable[..., Any]:
        if weight is None:
            return _flatten
        if weight._views or not (weight._is_param or weight.is_traced):
            raise AttributeError("__tensor_flatten__")
        return functools.partial(_flatten, weight)


def _flatten(weight: CompressedWeight) -> tuple[list[str], Any]:
    compressed = weight.compressed
    return ["record"], (compressed.shape, compressed.dtype, compressed.pieces)


class CompressedWeight(torch.Tensor):
    """A compressed tensor that torch and its libraries take for the decoded one.

    ``compressed``: the record, on any device; it is copied to that of the weight for decoding. Made by :meth:`of`.
    ``CompressedWeight(values)`` is ``nn.Parameter(values)``, as libraries make a parameter anew with the class of the
    old one. It is frozen: asking for gradients has no effect but a warning.
    """

    compressed: CompressedTensor
    _views: tuple[ViewStep, ...]
    _is_param = False
    _form: torch.Tensor | None
    _memory: torch.Tensor | None

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Any:
        """A parameter."""
        return nn.Parameter(data, requires_grad=requires_grad)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def of(
        cls,
        compressed: CompressedTensor,
        device: torch.device | None = None,
        views: tuple[ViewStep, ...] = (),
        form: Any = None,
    ) -> CompressedWeight:
        """A weight on a device, by default the record's. ``form``: a view's, as of a tensor without memory."""
        shape = compressed.shape if form is None else form.shape
        options: dict[str, Any] = {"dtype": compressed.dtype, "device": device or compressed.device}
        if form is not None:
            options |= {"dtype": form.dtype, "strides": form.stride(), "storage_offset": form.storage_offset()}
        with torch.inference_mode(mode=False):  # What is made in it could not be used outside.
            made: CompressedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, **options)
        if hasattr(torch._C, "_set_throw_on_mutable_data_ptr"):
            torch._C._set_throw_on_mutable_data_ptr(made)  # An error for native code that would read its memory.
        made.compressed, made._views, made._form, made._memory = compressed, views, form, None
        return made

    # Values.

    @property
    def record(self) -> torch.Tensor:
        """The record, u8."""
        return self.compressed.record

    @property
    def is_traced(self) -> bool:
        """Whether a compiler runs: the record has no memory."""
        return type(self.compressed.record) is not torch.Tensor

    @property
    def is_whole(self) -> bool:
        """Whether it is no view."""
        return not self._views and self.compressed.is_whole

    @property
    def here(self) -> CompressedTensor:
        """The record on the device of the weight; copied if it is kept elsewhere."""
        compressed, device = self.compressed, self.device
        return compressed if compressed.device == device else compressed.to(device, non_blocking=True)

    def decode(self) -> torch.Tensor:
        """The values: a new tensor."""
        values = self.here.decode()
        if self.is_traced:
            _decode_again_in_backward()
        for step in self._views:
            values = step(values)
        return values

    @property
    def form(self) -> torch.Tensor:
        """A tensor without memory that has its shape, strides and dtype."""
        if self._form is None:
            self._form = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._form

    def view_by(self, step: ViewStep) -> CompressedWeight:
        """A view of it."""
        return CompressedWeight.of(self.compressed, self.device, (*self._views, step), step(self.form))

    # What torch does with it.

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_tracing_state() is not None and function.__name__ not in _ATTRIBUTES:
            return function(*tree_map(_values, args), **tree_map(_values, kwargs or {}))  # into TorchScript
        if function is nn.functional.linear and not torch.compiler.is_compiling():
            result = weight_operations.linear(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        caller = _name(sys._getframe(1)) if function in _CONVERSIONS else ""
        with torch._C.DisableTorchFunctionSubclass(), _keeping_casts() if caller in CASTING else nullcontext():
            result = function(*args, **(kwargs or {}))
            # A module swaps a parameter that it gets for its own, which fails while autograd holds that.
            return result.detach() if caller == _MODULE and result is args[0] else result

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = HANDLERS.get(function)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        written, is_view, is_composite = _schema(function)
        for name, position in written:
            target = args[position] if position < len(args) else kwargs.get(name)
            for part in target if isinstance(target, (list, tuple)) else (target,):
                if isinstance(part, CompressedWeight):
                    raise FrozenWeightError(function.__name__)
        if is_composite:
            return function.decompose(*args, **kwargs)
        if is_view and isinstance(args[0], CompressedWeight) and not args[0].is_traced:
            return _views(args[0], function, args[1:], kwargs)
        return function(*tree_map(_values, args), **tree_map(_values, kwargs))

    __tensor_flatten__ = _FlattensParameters()

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> CompressedWeight:
        shape, dtype, pieces = context
        return CompressedWeight.of(CompressedTensor.of_pieces(inner["record"], shape, dtype, pieces))

    @classmethod
    def _stable_hash_for_caching(cls) -> str:
        return cls.__qualname__

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        size = sum(piece.size for piece in self.compressed.pieces)
        shown = f"shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, record={size:,} bytes"
        return f"CompressedWeight({shown}{', view' if self._views else ''})"

    # It is frozen, and moves as its record.

    def requires_grad_(self, requires_grad: bool = True) -> CompressedWeight:
        """No effect: it is frozen."""
        if requires_grad and self._is_param:
            warnings.warn(f"compressed weights are not trained; to train one, {HINT}", stacklevel=2)
        return self

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self.requires_grad_(wanted)

    @property
    def data(self) -> CompressedWeight:
        """The same weight, not a parameter. It may be set to one that has been moved."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, CompressedWeight) and value.is_whole and value.shape == self.shape:
            with torch._C.DisableTorchFunctionSubclass():
                torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined] # the device
            self.compressed, self._form, self._memory = value.compressed, None, None
        elif value.dtype != self.dtype or not self.holds(value):
            raise FrozenWeightError("setting .data" if value.dtype == self.dtype else f"to {value.dtype}")

    def holds(self, values: torch.Tensor) -> bool:
        """Whether these are its values, to the bit."""
        if isinstance(values, CompressedWeight):
            if values.compressed is self.compressed and values._views == self._views:
                return True
            values = values.decode()
        if values.shape != self.shape or values.is_meta:
            return False
        mine = self.decode()
        return torch.equal(_bits(mine), _bits(values.to(mine.device, mine.dtype)))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedWeight:
        if id(self) not in memo:
            copied = CompressedWeight.of(self.compressed, self.device, self._views, self._form)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name not in _OWN})
            memo[id(self)] = copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch.save, which asks for protocol 2, and what is in a state dict: plain, so that anybody can load it.
        if not self._is_param or self._views or protocol <= torch.serialization.DEFAULT_PROTOCOL:
            values = self.decode()
            return (nn.Parameter(values, requires_grad=False) if self._is_param else values).__reduce_ex__(protocol)
        others = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return _rebuild, (self.compressed, self.device, others)

    # What reads memory past torch's dispatcher gets decoded values, too.

    def numpy(self, *, force: bool = False) -> Any:
        """As of the decoded tensor."""
        return self.decode().numpy(force=force)

    def tolist(self) -> Any:
        """As of the decoded tensor."""
        return self.decode().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.decode(), spec) if self.dim() == 0 else super().__format__(spec)  # type: ignore[no-untyped-call]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.decode().__array__(*args, **kwargs)

    def __dlpack__(self, **options: Any) -> Any:
        return self.decode().__dlpack__(**options)

    @property
    def __cuda_array_interface__(self) -> Any:
        return self._kept().__cuda_array_interface__

    def data_ptr(self) -> int:
        """The address of decoded values, which stay in memory for it as long as the weight.

        Libraries that only compare addresses get one that is its own but of no memory, so that nothing is decoded.
        """
        if _only_compares(sys._getframe(1)):
            return self._address + int(self.storage_offset()) * self.element_size()
        return self._kept().data_ptr()

    def untyped_storage(self) -> Any:
        """Storage with decoded values; see :meth:`data_ptr`."""
        caller = sys._getframe(1)
        if self.is_traced or _name(caller).startswith(_COMPILING):
            with torch._C.DisableTorchFunctionSubclass():
                return super().untyped_storage()
        if _only_compares(caller):
            return _NoStorage(self._address, self.compressed.elements * self.compressed.dtype.itemsize)
        return self._kept().untyped_storage()

    @property
    def _address(self) -> int:
        return _NOBODYS_MEMORY | self.compressed.record.data_ptr()

    def _kept(self) -> torch.Tensor:
        if self._memory is None:
            self._memory = self.compressed.kept(self.device)
            for step in self._views:
                self._memory = step(self._memory)
        return self._memory

    def share_memory_(self) -> CompressedWeight:
        """Put the record into shared memory."""
        self.compressed.record.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the record is in shared memory."""
        return bool(self.compressed.record.is_shared())


_OWN: Final = frozenset({"compressed", "_views", "_form", "_memory"})
"""Attributes of a weight; others may be set by anybody, and are copied with it."""

_ATTRIBUTES: Final = frozenset({"__get__", "__set__", "detach", "size", "dim", "stride", "numel"})

HANDLERS: Final[dict[Any, Callable[..., Any]]] = {}
"""Operations that have better ways than the three rules. They return NotImplemented for what is left to the rules."""


def _values(value: Any) -> Any:
    return value.decode() if isinstance(value, CompressedWeight) else value


def _bits(values: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])


def _rebuild(compressed: CompressedTensor, device: torch.device, others: dict[str, Any]) -> CompressedWeight:
    made = CompressedWeight.of(compressed, device)
    made.__dict__.update(others)
    return made


def _decode_again_in_backward() -> None:
    # A compiler saves what custom operators return for the backward pass, and what it is widened to, unless they are
    # marked.
    from torch.utils.checkpoint import CheckpointPolicy

    tracers = [mode.tracer for mode in _get_current_dispatch_mode_stack() if hasattr(mode, "tracer")]
    for tracer in tracers:
        for node in reversed(tracer.graph.nodes):
            is_ours = _is_ours(node)
            if is_ours and "recompute" in node.meta:
                break
            if is_ours or any(_is_ours(argument) for argument in node.args):
                node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}


def _is_ours(node: Any) -> bool:
    return getattr(node, "op", None) == "call_function" and getattr(node.target, "namespace", None) == "df11"


@functools.cache
def _schema(function: Any) -> tuple[tuple[tuple[str, int], ...], bool, bool]:
    # Names and positions of the arguments that it writes to; whether it returns views of the first; whether it consists
    # of other operations.
    arguments = function._schema.arguments
    aliases = [argument.alias_info for argument in arguments]
    written = tuple(
        (argument.name, position)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    is_view = (
        bool(aliases)
        and aliases[0] is not None
        and not written
        and any(found.alias_info is not None for found in function._schema.returns)
    )
    return (
        written,
        is_view,
        torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), torch._C.DispatchKey.CompositeImplicitAutograd),
    )


def _views(weight: CompressedWeight, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    step = ViewStep(function, arguments, tuple(options.items()))
    forms = step(weight.form)
    if isinstance(forms, torch.Tensor):
        return weight.view_by(step)
    return [weight.view_by(step._replace(part=part)) for part in range(len(forms))]


_NOBODYS_MEMORY: Final = 1 << 62
"""With this bit, an address is invalid on every machine: whoever reads there anyway ends rather than reads garbage."""
COMPARING: Final = {"accelerate", "diffusers", "huggingface_hub", "peft", "torch.nn.modules.rnn", "transformers"}
"""Modules and packages that only compare addresses."""


_COMPILING: Final = ("torch._dynamo.", "torch._functorch.", "torch._inductor.", "torch._subclasses.", "torch.fx.")


def _only_compares(caller: FrameType) -> bool:
    name = _name(caller)
    return name in COMPARING or name.partition(".")[0] in COMPARING


def _name(caller: FrameType) -> str:
    return str(caller.f_globals.get("__name__"))


class _NoStorage(NamedTuple):
    address: int
    bytes: int

    def data_ptr(self) -> int:
        return self.address

    def nbytes(self) -> int:
        return self.bytes


_joining: Final = ContextVar("df11_joining", default=False)


@contextmanager
def joining() -> Iterator[None]:
    """Within this context, a stack or concatenation of weights is a weight: nothing is decoded.

    Elsewhere it is decoded, as its owner may want to change it.
    """
    token = _joining.set(True)
    try:
        yield
    finally:
        _joining.reset(token)


def is_joining() -> bool:
    """Whether weights are joined now."""
    return _joining.get()


_MODULE: Final = "torch.nn.modules.module"
CASTING: Final = {
    "accelerate.utils.modeling",
    "diffusers.models.model_loading_utils",
    "peft.utils.other",
    _MODULE,
    "transformers.core_model_loading",
}
"""Modules that cast weights in order to keep them so: these stay compressed. Anybody else gets values to work with."""
_CONVERSIONS: Final = frozenset(
    {
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.float,
        torch.Tensor.double,
        torch.Tensor.cpu,
        torch.Tensor.cuda,
    }
)
_casting: Final = ContextVar("df11_casting", default=False)


@contextmanager
def _keeping_casts() -> Iterator[None]:
    token = _casting.set(True)
    try:
        yield
    finally:
        _casting.reset(token)


def is_casting() -> bool:
    """Whether a cast of a weight is a weight now."""
    return _casting.get()


# They import this module: one fills HANDLERS, the other extends torch.
from df11.runtime import torchscript, weight_operations  # noqa: E402, F401
