"""Load a container into a model by tensor name: large weights stay compressed, everything else is loaded as usual."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import nn

from df11.formats import errors, json_text, layout
from df11.formats.container import Container
from df11.runtime import cpu, gpu, hub, load, operators
from df11.runtime.compressed import CompressedTensor
from df11.runtime.foreign import refuse_dfloat11_folder
from df11.runtime.modules import enable_prefetch, is_compressed, offload_records
from df11.runtime.prefetch import CudaStreams
from df11.runtime.weight import CompressedWeight
from df11.runtime.weight_operations import SLICE_WEIGHTS
from df11.storage.paths import read_file

SMALL: Final = 1 << 16
"""Tensors with fewer weights are decoded on loading: decoding them each time costs more than compression saves."""
_LISTED: Final = 8
log: Final = logging.getLogger("df11")


class MismatchError(errors.UsageError):
    """The model and the container do not hold the same tensors."""


@dataclass(frozen=True, slots=True)
class _Place:
    module: nn.Module
    name: str
    value: torch.Tensor
    is_buffer: bool


Model = TypeVar("Model", bound=nn.Module)


def load_model(
    model: Model,
    path: str | os.PathLike[str],
    device: str | torch.device = "cuda",
    *,
    rename: Callable[[str], str] = lambda name: name,
    cpu_offload: bool = False,
    prefetch: bool = False,
) -> Model:
    """Load all parameters and persistent buffers of a model from a `.df11` file or a folder of them.

    Returns the model, on ``device``; it may come from the meta device. ``path`` may be an address on the Hub,
    ``hf://owner/name[@revision][/folder or file]``. Tensors of 65,536 or more weights stay compressed and are decoded
    whenever their module runs; the others become ordinary parameters. Parameters have the dtypes of the model: they
    must be those of the container, but for two. What was F32 and is held as BF16 without loss is widened for a model in
    F32; F32 is rounded for a model in BF16, and then not compressed. Tied parameters are stored once.
    ``rename``: from a name in the container to one in the model. ``cpu_offload``: records stay in CPU memory, pinned,
    and are copied as modules run. ``prefetch``: on a GPU, the next linear layer's weight is decoded on a side stream
    during this one's product, in the order learnt in the first pass; this takes two buffers of the largest weight.
    Raises MismatchError, which lists the names, shapes or dtypes that differ; the model is then unchanged.
    """
    target = load.device_of(device)
    operators.decoder_of(target)
    if target.type == "cuda":
        target = gpu.of(target).device
    if is_compressed(model):
        raise errors.UsageError(
            "the model is compressed already", file=path, hint="load into a new model, or materialize this one first"
        )
    with hub.naming_downloads(), ExitStack() as stack:
        containers = [stack.enter_context(Container(file)) for file in files_of(hub.local_weights(path))]
        held: dict[str, tuple[Container, str]] = {}
        for container in containers:
            for name in container.keys():
                if rename(name) in held:
                    raise MismatchError(
                        f"two tensors have the name {errors.shortened(rename(name))}", file=container.path, tensor=name
                    )
                held[rename(name)] = (container, name)
        places = _places_of(model)
        _compare(model, places, held, os.fspath(path))
        _check_other_buffers(model)
        wanted = {name: places[name][0].value.dtype for name in held}
        needed = sum(loaded_size(*held[name], wanted[name]) for name in held)
        casts = [(load.torch_dtype(*found), wanted[name]) for name, found in held.items()]
        log_cast(os.fspath(path), [cast for cast in casts if cast == (torch.float32, torch.bfloat16)])
        with gpu.enough_memory(target, needed):
            records = torch.device("cpu") if cpu_offload else target
            read = cpu.pool().map(lambda name: load_tensor(*held[name], target, records, wanted[name]), held)
            loaded = dict(zip(held, read, strict=True))
    with torch.inference_mode(mode=False):  # What is made in it could not be used outside.
        for name, value in loaded.items():
            _put(places[name], value, target)
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    module._buffers[name] = buffer.to(target)
    if cpu_offload:
        offload_records(model, target)
    if prefetch and target.type == "cuda":
        enable_prefetch(model, target, CudaStreams(target))
    return model


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The `.df11` files at a path: the file itself, the shards that a folder's index names, or all in the folder."""
    root = Path(path)
    if not os.path.isdir(root):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return [root]
    try:
        indexes, files = sorted(root.glob("*.df11.index.json")), sorted(root.glob("*.df11"))
        if len(indexes) > 1:
            raise errors.UsageError(
                "several models in one folder", file=root, found=", ".join(index.name for index in indexes)
            )
        if not indexes:
            if not files:
                next(root.iterdir(), None)  # glob finds nothing in a folder that may not be read; this raises.
                refuse_dfloat11_folder(root)
                raise errors.MissingError("no .df11 file in this folder", file=root)
            return files
        names = read_index(indexes[0])
        missing = sorted(name for name in names if not (root / name).is_file())
    except OSError as error:
        raise errors.from_os_error(error, file=error.filename or root) from None
    if missing:
        raise errors.MissingError(
            f"{len(missing)} of {len(names)} shards are missing: {some(missing)}", file=root, hint="download them again"
        )
    return [root / name for name in sorted(names)]


def read_index(path: str | os.PathLike[str]) -> set[str]:
    """The names of the shards in an index file. Raises FormatError if it is no index or leads to another folder."""
    data = read_file(path, layout.MAX_JSON_HEADER)
    document = json_text.parse(data, what="the index", where={"file": path})
    shards = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise errors.FormatError("not a shard index", file=path)
    names = set(shards.values())
    if wrong := sorted(name for name in names if Path(name).name != name or "\0" in name):
        raise errors.FormatError("a shard lies in another folder", file=path, found=errors.shortened(wrong[0]))
    return names


def _places_of(model: nn.Module) -> dict[str, list[_Place]]:
    # Name in the state dict -> where it is held. Every name of a tied parameter has the places of all of them.
    places: dict[str, list[_Place]] = {}
    by_identity: dict[int, list[_Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for is_buffer, values in ((False, module._parameters), (True, module._buffers)):
            for name, value in values.items():
                if value is None or (is_buffer and name in module._non_persistent_buffers_set):
                    continue
                tied = by_identity.setdefault(id(value), [])
                if not any(place.module is module and place.name == name for place in tied):
                    tied.append(_Place(module, name, value, is_buffer))
                places[f"{prefix}.{name}" if prefix else name] = tied
    return places


def _compare(
    model: nn.Module, places: dict[str, list[_Place]], held: dict[str, tuple[Container, str]], path: str
) -> None:
    lines: list[str] = []
    filled = {id(places[name]) for name in held if name in places}
    if missing := [name for name, tied in places.items() if id(tied) not in filled]:
        lines.append(f"not in the container: {some(missing)}")
    if unknown := [name for name in held if name not in places]:
        lines.append(f"not in the model: {some(unknown)}")
    shapes, dtypes = [], []
    for name, (container, stored) in held.items():
        if name in places:
            info, value = container.info(stored), places[name][0].value
            if info.shape != tuple(value.shape):
                shapes.append(f"{name} {info.shape} in the container, {tuple(value.shape)} in the model")
            elif not _fits(container, stored, value.dtype):
                dtypes.append(f"{name} {info.dtype} in the container, {value.dtype} in the model")
    if shapes:
        lines.append(f"shapes differ: {some(shapes)}")
    if dtypes:
        lines.append(f"dtypes differ: {some(dtypes)}")
    if lines:
        hint = "call model.to(torch.bfloat16) first" if dtypes and len(lines) == 1 else None
        if hint is None and hasattr(
            type(model), "from_pretrained"
        ):  # It renames and merges what old files and other programs name.
            hint = f"{type(model).__name__}.from_pretrained loads whatever its library can load into this model"
        raise MismatchError(f"the model and the container differ; {'; '.join(lines)}", file=path, hint=hint)


def _check_other_buffers(model: nn.Module) -> None:
    # Buffers that no container holds must have their values already.
    lost = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
    ]
    if lost:
        hint = "build the model with accelerate.init_empty_weights(include_buffers=False), or set them"
        raise MismatchError(f"buffers that are not stored are on the meta device: {some(lost)}", hint=hint)


def some(names: Iterable[str]) -> str:
    """The first names of a list, for an error message, and how many more there are."""
    listed = list(names)
    more = len(listed) - _LISTED
    return ", ".join(_plain(name) for name in listed[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _plain(text: str) -> str:
    # Names come from files: no control characters, and no more than a line.
    quoted = errors.shortened(text)
    return text if quoted == f"'{text}'" else quoted


def load_tensor(
    container: Container,
    name: str,
    device: torch.device,
    records: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A tensor of a container: a compressed weight, its record on ``records``, if it is large, else its values.

    ``dtype``: that of a model, which may be another one than the container's; see :func:`load_model`.
    """
    held = load.torch_dtype(container, name)
    if stays_compressed(container, name, dtype):
        return CompressedWeight.of(CompressedTensor.load(container, name, records).cast(dtype or held))
    array = container.tensor(name)
    values = torch.from_numpy(array.reshape(-1)).view(held)
    return values.reshape(container.info(name).shape).to(device=device, dtype=dtype)


def stays_compressed(container: Container, name: str, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor is coded, large enough to stay so, and smaller than its values in a dtype (its own, if None)."""
    info = container.info(name)
    is_smaller = dtype is None or info.stored_bytes < info.elements * dtype.itemsize
    return info.encoding == "df11" and info.elements >= SMALL and is_smaller


def _fits(container: Container, name: str, wanted: torch.dtype) -> bool:
    # Whether a model of this dtype takes the tensor. What was F32 and is held as BF16 was not changed.
    held = load.torch_dtype(container, name)
    is_widened = wanted == torch.float32 and container.info(name).exact is True
    return is_widened or held == wanted or (held, wanted) == (torch.float32, torch.bfloat16)


def loaded_size(container: Container, name: str, dtype: torch.dtype) -> int:
    """Bytes that a tensor takes once it is loaded into a model of this dtype."""
    info = container.info(name)
    return info.stored_bytes if stays_compressed(container, name, dtype) else info.elements * dtype.itemsize


def log_cast(path: str, casts: Collection[tuple[torch.dtype, torch.dtype]]) -> None:
    """Say, in a line, that tensors are cast as they are loaded. ``casts``: for each, its dtype and the new one."""
    if not casts:
        return
    held, wanted = max(set(casts), key=list(casts).count)
    hint = "; df11-convert --cast bf16 would keep them compressed" if wanted == torch.bfloat16 else ""
    log.warning(
        "%s: %d of the tensors are %s, cast to %s on loading, and not compressed in memory%s",
        path,
        len(casts),
        _short(held),
        _short(wanted),
        hint if held == torch.float32 else "",
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _put(places: list[_Place], value: torch.Tensor, device: torch.device) -> None:
    values = plain(value.to(device)) if any(place.is_buffer for place in places) else value
    parameter = nn.Parameter(value, requires_grad=False)
    for place in places:
        if place.is_buffer:
            place.module._buffers[place.name] = values
        else:
            setattr(place.module, place.name, parameter)


def plain(value: torch.Tensor) -> torch.Tensor:
    """Decoded, as modules need their buffers: they read and write them directly."""
    return value.decode() if isinstance(value, CompressedWeight) else value


@dataclass(frozen=True, slots=True)
class ModuleMemory:
    """Memory of one module's own tensors, in bytes.

    ``compressed``: records. ``verbatim``: everything else. ``scratch``: what its forward decodes at once. ``bf16``: all
    of it if nothing were compressed.
    """

    name: str
    compressed: int
    verbatim: int
    scratch: int
    bf16: int


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a model takes, in bytes. Tied weights count once."""

    modules: tuple[ModuleMemory, ...]

    @property
    def compressed(self) -> int:
        """Bytes of records."""
        return sum(module.compressed for module in self.modules)

    @property
    def verbatim(self) -> int:
        """Bytes of everything else."""
        return sum(module.verbatim for module in self.modules)

    @property
    def bf16(self) -> int:
        """Bytes of the model if nothing were compressed."""
        return sum(module.bf16 for module in self.modules)

    @property
    def scratch(self) -> int:
        """Bytes of the largest matrix or slice that is decoded at once, or of the prefetch buffers if larger."""
        return max((module.scratch for module in self.modules), default=0)

    def __str__(self) -> str:
        held = self.compressed + self.verbatim
        share = f", {held / self.bf16:.1%} of {self.bf16:,}" if self.bf16 else ""
        return f"{self.compressed:,} bytes compressed, {self.verbatim:,} verbatim{share}; scratch {self.scratch:,}"


def memory_report(model: nn.Module) -> MemoryReport:
    """Compressed, verbatim and scratch bytes per module."""
    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        compressed = verbatim = scratch = bf16 = 0
        for value in [*module._parameters.values(), *module._buffers.values()]:
            if value is None:
                continue
            size = value.numel() * value.element_size()
            if isinstance(value, CompressedWeight):
                scratch = max(scratch + _scratch(module, value), _buffers_of(value))
            if id(value) in seen:
                continue
            seen.add(id(value))
            bf16 += size
            if isinstance(value, CompressedWeight):
                compressed += value.record.numel()
            else:
                verbatim += size
        if compressed or verbatim or scratch:
            rows.append(ModuleMemory(name, compressed, verbatim, scratch, bf16))
    return MemoryReport(tuple(rows))


def _scratch(module: nn.Module, weight: CompressedWeight) -> int:
    if isinstance(module, nn.Embedding):  # which decodes only the rows it returns
        return 0
    elements = weight.numel()
    if isinstance(module, nn.Linear) and weight.dim() == 2 and elements > SLICE_WEIGHTS:
        elements = max(1, SLICE_WEIGHTS // weight.shape[1]) * weight.shape[1]
    return elements * weight.element_size()


def _buffers_of(weight: CompressedWeight) -> int:
    prefetcher = weight.compressed.prefetcher
    return 0 if prefetcher is None else prefetcher.scratch


report = memory_report
