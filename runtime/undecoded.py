"""Records that pass through a library's own loader and saver as if they were the BF16 tensors they decode to.

While a library loads, a record is an :class:`Undecoded` tensor with the name, shape and dtype of the decoded one. It is
renamed, tied and moved like any other, and decoded only if the library computes with it. :func:`keep_compressed` then
makes compressed modules of what has arrived. While a library writes a state dict, a record is a :class:`Deferred`
tensor under the decoded tensor's name, which is decoded when its shard is written.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_map

from df11.formats import errors
from df11.formats.container import Container
from df11.formats.record import Scratch
from df11.runtime import cpu, load, operators
from df11.runtime import model as models
from df11.runtime.modules import (
    SUFFIX,
    CompressedModule,
    FrozenWeightError,
    Geometry,
    aligned,
    compress_parameter,
    compressed_modules,
    is_about_form,
)

_CPU: Final = torch.device("cpu")
_aten: Final = torch.ops.aten


class Undecoded(torch.Tensor):
    """A record with the shape, dtype and device of its decoded tensor but no memory for that.

    ``file``, ``stored_as``: its container, and its name there.
    """

    payload: nn.Parameter
    geometry: Geometry
    file: str
    stored_as: str

    @staticmethod
    def of(payload: nn.Parameter, geometry: Geometry, file: str, stored_as: str) -> Undecoded:
        """Present a record as the tensor it decodes to."""
        made: Undecoded = torch.Tensor._make_wrapper_subclass(
            Undecoded, geometry.shape, dtype=torch.bfloat16, device=payload.device
        )
        made.payload, made.geometry, made.file, made.stored_as = payload, geometry, file, stored_as
        return made

    def decode(self) -> torch.Tensor:
        """The values."""
        decoded: torch.Tensor = operators.decode(
            self.payload, list(self.geometry.shape), self.geometry.segment_elements
        )
        return decoded

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Undecoded({self.stored_as}, {tensor_contents or tuple(self.shape)}, {self.payload.device})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Undecoded):
            if function in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
                return cls.of(first.payload, first.geometry, first.file, first.stored_as)
            if function is _aten._to_copy.default and kwargs.get("dtype") in (None, torch.bfloat16):
                device = torch.device(kwargs.get("device") or first.device)
                if device.type == "meta":
                    return torch.empty(first.shape, dtype=torch.bfloat16, device=device)
                moved = first.payload.detach().to(device, non_blocking=bool(kwargs.get("non_blocking")))
                return cls.of(nn.Parameter(moved, requires_grad=False), first.geometry, first.file, first.stored_as)
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if isinstance(value, Undecoded) and argument.alias_info is not None and argument.alias_info.is_write:
                raise FrozenWeightError(
                    f"{function}: a compressed weight cannot be changed while it is loaded", tensor=value.stored_as
                )
        decode = lambda value: value.decode() if isinstance(value, Undecoded) else value  # noqa: E731
        return function(*tree_map(decode, args), **tree_map(decode, kwargs))


def read(container: Container, name: str) -> torch.Tensor:
    """A tensor of a container in CPU memory: undecoded if it is to stay compressed, else its values."""
    parameter, geometry = models.load_tensor(container, name, _CPU, _CPU)
    return parameter.data if geometry is None else Undecoded.of(parameter, geometry, container.path, name)


def read_all(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a container, each as :func:`read` returns it."""
    with Container(path) as container:
        names = container.keys()
        return dict(zip(names, cpu.pool().map(lambda name: read(container, name), names), strict=True))


def mapped(container: Container, name: str) -> torch.Tensor:
    """Like :func:`read`, but a record stays in its file, which is mapped; its checksums are checked at once."""
    if not stays_compressed(container, name):
        return read(container, name)
    from safetensors import safe_open

    record, scratch = container.record(name), Scratch()
    for segment in record.segments:
        data = scratch.take(segment.size)
        record.read(segment.offset, data)
        segment.check_stored(data, record.place)

    with safe_open(container.path, framework="pt") as file:
        payload = nn.Parameter(file.get_tensor(name), requires_grad=False)
    return Undecoded.of(payload, Geometry(container.info(name).shape, record.segment_elements), container.path, name)


def stays_compressed(container: Container, name: str) -> bool:
    """Whether a tensor is large enough to stay compressed."""
    info = container.info(name)
    return info.encoding == "df11" and info.elements >= models.SMALL and load.decodes_on_a_device(info)


def check_dtype(dtype: torch.dtype, containers: Sequence[Container]) -> None:
    """Raise a MismatchError if weights that are to stay compressed would be cast, which is impossible."""
    for container in containers:
        if dtype != torch.bfloat16 and (
            names := [name for name in container.keys() if stays_compressed(container, name)]
        ):
            what = f"{len(names)} compressed tensors are BF16 and cannot be loaded as {dtype}"
            raise models.MismatchError(
                what, file=container.path, hint="pass dtype=torch.bfloat16 (torch_dtype in older versions)"
            )


def first_dtype(container: Container) -> torch.dtype:
    """The dtype of the first floating-point tensor, which libraries take for that of the model."""
    dtypes = [load.torch_dtype(container, name) for name in container.keys()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)


def check_names(
    path: str | os.PathLike[str],
    missing: Sequence[str],
    unknown: Sequence[str],
    shapes: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Raise a MismatchError that lists where a model and its containers differ.

    ``shapes``: name, shape in the container, shape in the model.
    """
    lines = []
    if missing:
        lines.append(f"not in the container: {models.some(sorted(missing))}")
    if unknown:
        lines.append(f"not in the model: {models.some(sorted(unknown))}")
    if shapes:
        listed = [
            f"{name} {tuple(held)} in the container, {tuple(wanted)} in the model" for name, held, wanted in shapes
        ]
        lines.append(f"shapes differ: {models.some(sorted(listed))}")
    if lines:
        raise models.MismatchError(f"the model and the container differ; {'; '.join(lines)}", file=path)


def keep_compressed(model: nn.Module, is_mapped: Callable[[str], bool] = lambda _: False) -> set[str]:
    """Make compressed modules of a model into which a loader has put undecoded tensors.

    Returns the names of these tensors in the container. ``is_mapped``: whether the parameter of this name must be
    copied from a mapped file to memory: if someone truncates a mapped file, the process dies.
    """
    kept: set[str] = set()
    copies: dict[int, nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        found: dict[str, Any] = dict(module._parameters)
        for name, parameter in found.items():
            if isinstance(parameter, Undecoded):
                payload = parameter.payload
                if is_mapped(f"{prefix}.{name}" if prefix else name):
                    payload = copies.setdefault(id(payload), nn.Parameter(payload.data.clone(), requires_grad=False))
                compress_parameter(module, name, payload, parameter.geometry)
                kept.add(parameter.stored_as)
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Undecoded):
                module._buffers[name] = buffer.decode()
    return kept


def disk_index(model: nn.Module, on_disk: Callable[[str], bool], folder: str | None) -> dict[str, dict[str, Any]]:
    """The index that tells accelerate where the tensors of modules on disk are. Call it before :func:`keep_compressed`.

    Records stay in the containers they came from; the others go to ``folder``.
    """
    from accelerate.utils import offload_weight

    index: dict[str, dict[str, Any]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not on_disk(name):
            continue
        if isinstance(value, Undecoded):
            index[name + SUFFIX] = {"safetensors_file": value.file, "weight_name": value.stored_as, "dtype": "uint8"}
        elif folder is None:
            raise errors.UsageError(
                "parts of the model are to be kept on disk", tensor=name, hint="pass offload_folder"
            )
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            offload_weight(value.data, name, folder, index)
    return index


# Saving.


class Deferred(torch.Tensor):
    """A tensor whose values are decoded anew each time they are read.

    It has an address and a size like any other, in memory that is never touched.
    """

    decode: Callable[[], torch.Tensor]

    @staticmethod
    def of(shape: Sequence[int], decode: Callable[[], torch.Tensor]) -> Deferred:
        """A tensor with the BF16 values that ``decode`` returns."""
        made: Deferred = torch.Tensor._make_subclass(Deferred, torch.empty(tuple(shape), dtype=torch.bfloat16))
        made.decode = decode
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_about_form(function) or function in _ADDRESSES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        decode = lambda value: value.decode() if isinstance(value, Deferred) else value  # noqa: E731
        return function(*tree_map(decode, args), **tree_map(decode, kwargs or {}))


_ADDRESSES: Final = frozenset({torch.Tensor.data_ptr, torch.Tensor.untyped_storage})


def decoded_names(model: nn.Module, state: Mapping[str, Any], tied: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A state dict with BF16 tensors under their own names instead of records. One with several names appears once.

    ``tied``: from names that are left out to the names of the same tensors.
    """
    records = {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in compressed_modules(model)
        for name in module.geometries
    }
    records = {full: found for full, found in records.items() if full + SUFFIX in state}
    names: dict[int, str] = {}
    for full, (module, name) in records.items():
        if (tied or {}).get(full) not in records:
            names.setdefault(id(module._parameters[name + SUFFIX]), full)
    saved = set(names.values())
    out: dict[str, Any] = {}
    for key, value in state.items():
        full = key.removesuffix(SUFFIX)
        if full == key or full not in records:
            out[key] = value
        elif full in saved:
            module, name = records[full]
            out[full] = Deferred.of(module.geometries[name].shape, functools.partial(_decode, module, name))
    return out


@contextmanager
def plain_state_dict(model: nn.Module, tied: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within this context ``model.state_dict()`` holds decoded tensors under their own names, as a checkpoint does."""

    def decode(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        if not prefix:  # Only of the model itself, not as a part of another.
            found = decoded_names(model, state, tied)
            state.clear()
            state.update(found)

    handle = model.register_state_dict_post_hook(decode)
    try:
        yield
    finally:
        handle.remove()


def _decode(module: CompressedModule, name: str) -> torch.Tensor:
    # The record may be on the meta device, or where accelerate's hook keeps it.
    geometry = module.geometries[name]
    record: Any = module._parameters[name + SUFFIX]
    if record is None or record.device.type == "meta":
        hook = getattr(module, "_hf_hook", None)
        maps = [
            found for one in getattr(hook, "hooks", [hook]) if (found := getattr(one, "weights_map", None)) is not None
        ]
        record = maps[0][name + SUFFIX] if maps else module.payload(name)
    decoded: torch.Tensor = operators.decode(aligned(record), list(geometry.shape), geometry.segment_elements)
    return decoded.cpu()


def counting(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap a library's ``num_parameters``, so that it counts weights rather than the bytes of records."""

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = original(self, only_trainable, exclude_embeddings)
        seen: set[int] = set()
        for _, module in compressed_modules(self):
            for name, geometry in module.geometries.items():
                record = module._parameters[name + SUFFIX]
                if record is not None and id(record) not in seen and not only_trainable:
                    seen.add(id(record))
                    left_out = exclude_embeddings and isinstance(module, nn.Embedding)
                    count += (0 if left_out else geometry.elements) - record.numel()
        return count

    return num_parameters


def keeping_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model class's ``_apply``, so that a cast raises before anything has changed: records cannot be cast."""

    @functools.wraps(original)
    def apply(self: Any, function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if next(compressed_modules(self), None) is not None:
            dtype = function(torch.empty(0, dtype=torch.bfloat16)).dtype
            if dtype != torch.bfloat16:
                raise FrozenWeightError(
                    f"to {dtype}: the weights are compressed and stay BF16",
                    hint="call df11.runtime.materialize(model) first",
                )
        return original(self, function, *args, **kwargs)

    return apply
