"""What transformers' and diffusers' loaders need of containers: tensors, dtypes, sizes, records that stay on disk."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from df11.formats import errors
from df11.formats.container import Container
from df11.formats.record import Scratch
from df11.runtime import cpu, load
from df11.runtime import model as models
from df11.runtime.compressed import CompressedTensor
from df11.runtime.modules import weights_of
from df11.runtime.weight import CompressedWeight, FrozenWeightError

_CPU: Final = torch.device("cpu")


def read(container: Container, name: str) -> torch.Tensor:
    """A tensor of a container in CPU memory: a compressed weight if it is large, else its values."""
    return _for_a_loader(models.load_tensor(container, name, _CPU, _CPU), container, name)


def _for_a_loader(value: torch.Tensor, container: Container, name: str) -> torch.Tensor:
    # What was F32 stays compressed if the loader turns it into F32.
    if isinstance(value, CompressedWeight):
        value.may_widen = models.is_narrowed(container, name)
    return value


def read_all(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a container, each as :func:`read` returns it."""
    with Container(path) as container:
        names = container.keys()
        return dict(zip(names, cpu.pool().map(lambda name: read(container, name), names), strict=True))


def mapped(container: Container, name: str) -> torch.Tensor:
    """Like :func:`read`, but a record stays in its file, which is mapped; its checksums are checked at once."""
    if not models.stays_compressed(container, name):
        return read(container, name)
    record, scratch = container.record(name), Scratch()
    for segment in record.segments:
        data = scratch.take(segment.size)
        record.read(segment.offset, data)
        segment.check_stored(data, record.place)
    dtype = load.torch_dtype(container, name)
    weight = _map(container.path, name, container.info(name).shape, record.segment_elements, dtype, dtype)
    return _for_a_loader(weight, container, name)


def _map(
    file: str, name: str, shape: Sequence[int], segment_elements: int, stored: torch.dtype, dtype: torch.dtype
) -> CompressedWeight:
    # ``stored``: the record's dtype; ``dtype``: the weight's.
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        record = opened.get_tensor(name)
    compressed = CompressedTensor(record, shape, segment_elements, stored).from_file(file, name)
    return CompressedWeight.of(compressed if dtype == stored else compressed.widened())


def check_dtype(
    path: str, dtype: torch.dtype, containers: Sequence[Container], *, is_quantized: bool = False
) -> set[tuple[str, str]]:
    """Which large tensors a loader will cast to the dtype of its model; says so in a line of the log.

    They are (file, name) pairs. Raises a MismatchError for BF16, which must be asked for as such: who forgets that
    would get a model of twice the size. ``is_quantized``: FP8 is left to the loader.
    """
    cast: dict[tuple[str, str], torch.dtype] = {}
    for container in containers:
        found = {
            name: load.torch_dtype(container, name)
            for name in container.keys()
            if models.stays_compressed(container, name)
            and not (dtype == torch.float32 and models.is_narrowed(container, name))
        }
        if dtype != torch.bfloat16 and (count := list(found.values()).count(torch.bfloat16)):
            raise models.MismatchError(
                f"{count} compressed tensors are BF16 and cannot be loaded as {dtype}",
                file=container.path,
                hint=f"pass dtype={torch.bfloat16} (torch_dtype in older versions)",
            )
        cast |= {
            (container.path, name): held
            for name, held in found.items()
            if held != dtype and not (is_quantized and held.itemsize == 1)
        }
    models.log_cast(path, [(held, dtype) for held in cast.values()])
    return set(cast)


def first_dtype(container: Container) -> torch.dtype:
    """The dtype of the first floating-point tensor of the source, which libraries take for that of the model.

    BF16 if F32 was rounded to it.
    """
    infos = [container.info(name) for name in container.keys()]
    if any(info.exact is False for info in infos):
        return torch.bfloat16
    dtypes = [load.torch_dtype(container, info.name) if info.exact is None else torch.float32 for info in infos]
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)


def check_some_fit(path: str, held: int, unexpected: int) -> None:
    """Raise a MismatchError if a library has found none of its model's tensors in the containers."""
    if held and unexpected >= held:
        raise models.MismatchError(
            "the model and the container have no tensor in common", file=path, hint="check the model class"
        )


def settle(model: nn.Module, is_mapped: Callable[[str], bool] = lambda _: False) -> set[tuple[str, str]]:
    """Tidy a model into which a loader has put weights; returns files and names of what has stayed compressed.

    Buffers and views are decoded. ``is_mapped``: whether the parameter of this name must be copied from a mapped file
    to memory: if someone truncates a mapped file, the process dies.
    """
    kept: set[tuple[str, str]] = set()
    done: dict[int, Any] = {}
    for prefix, module in model.named_modules():
        for name, weight in weights_of(module).items():
            if id(weight) not in done:
                done[id(weight)] = weight
                if not weight.is_whole:
                    done[id(weight)] = nn.Parameter(weight.decode(), requires_grad=False)
                elif is_mapped(f"{prefix}.{name}" if prefix else name):
                    weight.data = CompressedWeight.of(weight.compressed.with_record(weight.record.clone()))
            if done[id(weight)] is not weight:
                setattr(module, name, done[id(weight)])
            else:
                kept |= {piece.source for piece in weight.compressed.pieces if piece.source is not None}
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = models.plain(buffer)
    return kept


def disk_index(model: nn.Module, on_disk: Callable[[str], bool], folder: str | None) -> dict[str, dict[str, Any]]:
    """Move parameters and buffers of modules to the disk; returns the index that tells accelerate where they are.

    Records stay in the containers they came from; the others go to ``folder``.
    """
    from accelerate.utils import offload_weight

    index: dict[str, dict[str, Any]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not on_disk(name):
            continue
        pieces = value.compressed.pieces if isinstance(value, CompressedWeight) and value.is_whole else ()
        if len(pieces) == 1 and pieces[0].source is not None:
            file, stored_as = pieces[0].source
            piece = pieces[0]
            index[name] = {
                _FILE: (file, stored_as, tuple(value.shape), piece.segment_elements, piece.dtype, value.dtype)
            }
        elif folder is None:
            raise errors.UsageError(
                "parts of the model are to be kept on disk", tensor=name, hint="pass offload_folder"
            )
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            offload_weight(models.plain(value.data), name, folder, index)
    away: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, weight in weights_of(module).items():
            if on_disk(f"{prefix}.{name}" if prefix else name):
                setattr(module, name, away.setdefault(id(weight), nn.Parameter(weight.to("meta"), requires_grad=False)))
    return index


_FILE: Final = "df11"
"""Key of an entry of :func:`disk_index` for a record in its container."""


def reading_records(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``__getitem__`` of accelerate's loader of what is on disk, so that it knows entries for containers."""

    @functools.wraps(original)
    def get(self: Any, key: str) -> Any:
        entry = None if key in self.state_dict else self.index.get(key)
        return _map(*entry[_FILE]) if isinstance(entry, Mapping) and _FILE in entry else original(self, key)

    return get


# Sizes.

_expected: dict[str, int] = {}


@contextmanager
def expecting(model: nn.Module, containers: Sequence[Container]) -> Iterator[None]:
    """Within this context, device maps for a model on the meta device are made for what it will take compressed.

    Tensors that the library renames or merges are taken to shrink as the average.
    """
    held, bytes_held, weights = {}, 0, 0
    for container in containers:
        for name in container.keys():
            if models.stays_compressed(container, name):
                held[name] = container, name
                bytes_held += container.info(name).stored_bytes
                weights += container.info(name).elements
    for name, parameter in model.named_parameters():
        if parameter.numel() >= models.SMALL:
            most = parameter.numel() * parameter.element_size()
            if name in held:
                _expected[name] = models.loaded_size(*held[name], parameter.dtype)
            else:
                _expected[name] = min(most, parameter.numel() * bytes_held // weights) if weights else most
    try:
        yield
    finally:
        _expected.clear()


def counting_records(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a library's ``compute_module_sizes``, so that compressed weights count as the bytes that they take."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compute_module_sizes(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        if kwargs.get("buffers_only"):
            return result
        tables = result if isinstance(result, tuple) else (result,)
        wanted = signature.bind(model, *args, **kwargs).arguments.get("dtype")
        wanted = wanted if isinstance(wanted, torch.dtype) else torch.float64  # None: the dtypes of the model.
        for name, parameter in model.named_parameters():
            size = parameter.record.numel() if isinstance(parameter, CompressedWeight) else _expected.get(name)
            if size is not None:
                saved = parameter.numel() * min(wanted.itemsize, parameter.element_size()) - size
                parts = name.split(".")
                _subtract(tables[0], [".".join(parts[:length]) for length in range(len(parts) + 1)], saved)
                _subtract(tables[-1] if len(tables) > 1 else {}, [".".join(parts[:-1])], saved)
        return result

    return compute_module_sizes


def _subtract(sizes: dict[str, int], names: Sequence[str], saved: int) -> None:
    for name in names:
        if name in sizes:
            sizes[name] -= saved


def keeping_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model class's ``_apply``, so that a cast raises before anything has changed: records cannot be cast."""

    @functools.wraps(original)
    def apply(self: Any, function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        held = {weight.dtype for weight in self.parameters() if isinstance(weight, CompressedWeight)}
        moved = {dtype: function(torch.empty(0, dtype=dtype)) for dtype in held}
        for dtype, probe in moved.items():
            if probe.dtype != dtype:
                raise FrozenWeightError(f"to {probe.dtype}")
        return original(self, function, *args, **kwargs)

    return apply
