"""TorchScript, whose writer reads a tensor's memory: modules become scripts of their decoded weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from df11.runtime import modules


@contextmanager
def _decoded(module: nn.Module) -> Iterator[None]:
    held = [(part, name, weight) for part in module.modules() for name, weight in modules.weights_of(part).items()]
    modules.materialize(module)
    try:
        yield
    finally:
        for part, name, weight in held:
            setattr(part, name, weight)


def _of_decoded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make(subject: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(subject, nn.Module) or not modules.is_compressed(subject):
            return original(subject, *args, **kwargs)
        with _decoded(subject):
            return original(subject, *args, **kwargs)

    return make


for _name in ("script", "trace", "trace_module"):
    setattr(torch.jit, _name, _of_decoded(getattr(torch.jit, _name)))
