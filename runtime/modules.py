"""Compressed weights in the modules of a model: find them, decode them for good, keep them elsewhere, decode ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from df11.runtime.compressed import CompressedTensor
from df11.runtime.prefetch import Prefetcher, Streams
from df11.runtime.weight import CompressedWeight
from df11.runtime.weight_operations import SLICE_WEIGHTS


@dataclass(frozen=True, slots=True)
class CompressedModule:
    """A module with compressed weights of its own. ``geometries``: their names, and what is held for each."""

    module: nn.Module
    geometries: dict[str, CompressedTensor]


def weights_of(module: nn.Module) -> dict[str, CompressedWeight]:
    """The compressed weights that a module itself has."""
    parameters: dict[str, Any] = dict(module._parameters)
    return {name: value for name, value in parameters.items() if isinstance(value, CompressedWeight)}


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """Names of the modules of a model that have compressed weights, and what they have."""
    for name, module in model.named_modules():
        if held := weights_of(module):
            yield name, CompressedModule(module, {part: weight.compressed for part, weight in held.items()})


def is_compressed(model: nn.Module) -> bool:
    """Whether a model has compressed weights."""
    return any(isinstance(value, CompressedWeight) for value in model.parameters())


def materialize(module: nn.Module) -> nn.Module:
    """Decode all weights in a module into ordinary parameters, which can be trained, fused and edited.

    Returns the module. Tied weights stay tied, to those of other modules, too. Memory grows to that of the plain model.
    """
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in weights_of(part).items():
            if id(weight) not in done:
                done[id(weight)] = _made_plain(weight)
            setattr(part, name, done[id(weight)])
    return module


def _made_plain(weight: CompressedWeight) -> nn.Parameter:
    parameter = nn.Parameter(weight.decode(), requires_grad=False)
    try:
        torch.utils.swap_tensors(weight, parameter)
    except RuntimeError:  # Autograd or a weak reference still needs the old one.
        return parameter
    return cast(nn.Parameter, weight)


def offload_records(model: nn.Module, device: torch.device) -> None:
    """Move all records to CPU memory, pinned if there is a GPU; they are copied to ``device`` as modules run."""
    moved: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, weight in weights_of(part).items():
            if id(weight) not in moved:
                kept = weight.compressed.to("cpu")
                if device.type == "cuda":
                    kept = kept.with_record(kept.record.pin_memory())
                moved[id(weight)] = nn.Parameter(CompressedWeight.of(kept, device), requires_grad=False)
            setattr(part, name, moved[id(weight)])


def enable_prefetch(model: nn.Module, device: torch.device, streams: Streams) -> Prefetcher:
    """Prefetch the linear layers that are not decoded in slices, into two buffers as large as the largest weight."""
    layers = [
        held.geometries["weight"]
        for _, held in compressed_modules(model)
        if isinstance(held.module, nn.Linear) and "weight" in held.geometries
    ]
    layers = [layer for layer in layers if layer.elements <= SLICE_WEIGHTS and layer.dtype == torch.bfloat16]
    prefetcher = Prefetcher(max((layer.elements for layer in layers), default=0), device, streams)
    for layer in layers:
        layer.prefetcher = prefetcher
    return prefetcher


def disable_prefetch(model: nn.Module) -> None:
    """Undo :func:`enable_prefetch`; its buffers are freed."""
    for _, held in compressed_modules(model):
        for compressed in held.geometries.values():
            compressed.prefetcher = None
