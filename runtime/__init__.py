"""Load containers into torch; decode compressed tensors on a GPU or on the CPU, to the same bits.

Nothing is imported before it is used, and only `df11.formats` is known here. Importing this package lets
``from_pretrained`` of transformers and diffusers load `.df11` files too, in whatever order they are imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from df11.runtime.compressed import CompressedTensor, check_errors, decode_many, warm_up
    from df11.runtime.load import load_file
    from df11.runtime.model import load_model, memory_report
    from df11.runtime.modules import materialize

__all__ = [
    "CompressedTensor",
    "check_errors",
    "decode_many",
    "load_file",
    "load_model",
    "materialize",
    "memory_report",
    "warm_up",
]

_HOMES = {
    "CompressedTensor": "df11.runtime.compressed",
    "decode_many": "df11.runtime.compressed",
    "load_file": "df11.runtime.load",
    "load_model": "df11.runtime.model",
    "materialize": "df11.runtime.modules",
    "memory_report": "df11.runtime.model",
    "report": "df11.runtime.model",  # Its first name, which programs still call.
    "check_errors": "df11.runtime.compressed",
    "warm_up": "df11.runtime.compressed",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "omnigen2":
        return importlib.import_module("df11.runtime.omnigen2")
    raise AttributeError(f"module 'df11.runtime' has no attribute {name!r}")


_EXTENDED = {
    "transformers.modeling_utils": ("df11.runtime.for_transformers", "install"),
    "diffusers.models.modeling_utils": ("df11.runtime.for_diffusers", "install"),
    "diffusers.pipelines.pipeline_utils": ("df11.runtime.for_diffusers", "install_pipelines"),
    "diffusers.hooks.group_offloading": ("df11.runtime.for_diffusers", "install_group_offloading"),
    "accelerate.utils.modeling": ("df11.runtime.for_others", "install_sizes"),
    "accelerate.utils.offload": ("df11.runtime.for_others", "install_disk"),
    "peft.tuners.lora.layer": ("df11.runtime.for_others", "install_lora"),
    "peft.tuners.tuners_utils": ("df11.runtime.for_others", "install_merging"),
    "peft.utils.other": ("df11.runtime.for_others", "install_peft"),
    "safetensors.torch": ("df11.runtime.for_others", "install_safetensors"),
    "sentence_transformers.base.modules.module": ("df11.runtime.for_others", "install_sentence_transformers"),
    "sentence_transformers.models.Module": ("df11.runtime.for_others", "install_sentence_transformers"),
    "torch.distributed.fsdp._flat_param": ("df11.runtime.for_others", "install_flat_fsdp"),
    "torch.distributed.fsdp._fully_shard._fsdp_param": ("df11.runtime.for_others", "install_fsdp"),
}


class _Extender(importlib.abc.MetaPathFinder):
    """Extends a library's module right after it has been imported, with a function of one of our modules."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the next finders give, with a loader that also extends the module."""
        if name not in _EXTENDED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _extend(module)

            loader.exec_module = exec_module  # type: ignore[method-assign] # this loader belongs to the module alone
        return spec


def _extend(module: ModuleType) -> None:
    home, install = _EXTENDED[module.__name__]
    function = getattr(importlib.import_module(home), install)
    try:
        function(module)
    except AttributeError as error:  # The library must remain usable.
        import warnings

        library = module.__name__.partition(".")[0]
        warnings.warn(f"df11 does not know this version of {library}: {error}", stacklevel=2)


sys.meta_path.insert(0, _Extender())
for _name in _EXTENDED:
    if _name in sys.modules:
        _extend(sys.modules[_name])
