"""What transformers' and diffusers' loaders need of containers: tensors, dtypes, sizes, records that stay on disk."""

from __future__ import annotations

import functools
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
from df11.runtime.weight import CompressedWeight

_CPU: Final = torch.device("cpu")


def read(container: Container, name: str) -> torch.Tensor:
    """A tensor of a container in CPU memory: a compressed weight if it is large, else its values."""
    return models.load_tensor(container, name, _CPU, _CPU)


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
    return _map(container.path, name, container.info(name).shape, record.segment_elements, dtype)


def _map(
    file: str,
    name: str,
    shape: Sequence[int],
    segment_elements: int,
    dtype: torch.dtype,
    casts: Sequence[torch.dtype] = (),
) -> CompressedWeight:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        record = opened.get_tensor(name)
    tensor = CompressedTensor(record, shape, segment_elements, dtype).from_file(file, name)
    return CompressedWeight.of(functools.reduce(CompressedTensor.cast, casts, tensor))


def cast_for_good(path: str, dtype: torch.dtype, containers: Sequence[Container]) -> set[tuple[str, str]]:
    """Which large tensors are held in the dtype of a model, as their records take more; a line of the log says so.

    They are (file, name) pairs.
    """
    found = {
        (container.path, name): load.torch_dtype(container, name)
        for container in containers
        for name in container.keys()
        if models.stays_compressed(container, name) and not models.stays_compressed(container, name, dtype)
    }
    models.log_cast(path, [(held, dtype) for held in found.values()])
    return set(found)


def first_dtype(container: Container) -> torch.dtype:
    """The dtype of the first floating-point tensor of the source, which libraries take for that of the model.

    BF16 if F32 was rounded to it.
    """
    infos = [container.info(name) for name in container.keys()]
    if any(info.exact is False for info in infos):
        return torch.bfloat16
    dtypes = [load.torch_dtype(container, info.name) if info.exact is None else torch.float32 for info in infos]
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)


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
                _FILE: (file, stored_as, tuple(value.shape), piece.segment_elements, piece.dtype, piece.casts)
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

    @functools.wraps(original)
    def compute_module_sizes(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        if kwargs.get("buffers_only"):
            return result
        tables = result if isinstance(result, tuple) else (result,)
        tied = getattr(model, "all_tied_weights_keys", {}) if len(tables) > 1 else {}  # which transformers leaves out
        for name, parameter in model.named_parameters():
            size = parameter.record.numel() if isinstance(parameter, CompressedWeight) else _expected.get(name)
            if size is not None and name not in tied:
                saved = tables[0].get(name, parameter.numel() * parameter.element_size()) - size
                parts = name.split(".")
                _subtract(tables[0], [".".join(parts[:length]) for length in range(len(parts) + 1)], saved)
                _subtract(tables[-1] if len(tables) > 1 else {}, [".".join(parts[:-1])], saved)
        return result

    return compute_module_sizes


def _subtract(sizes: dict[str, int], names: Sequence[str], saved: int) -> None:
    for name in names:
        if name in sizes:
            sizes[name] -= saved
