"""LoRAs on compressed weights: applied as a layer runs, to what it has decoded, so that nothing is ever held twice.

ComfyUI would replace the weights that a LoRA changes by patched ones, in BF16. Here they stay records, and the patched
values are the same to the bit: computed in F32 and rounded as ComfyUI rounds them.
"""

from __future__ import annotations

from typing import Any

import comfy.float
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch


class PatchOnUse:
    """Patches of a weight, in the list of functions that its layer applies to what it has decoded."""

    def __init__(self, key: str, patches: dict[str, Any]) -> None:
        self.key = key
        self.patches = patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Decoded values, of any dtype that holds BF16, to patched ones of the same dtype."""
        changed = comfy.lora.calculate_weight(self.patches[self.key], weight.to(torch.float32, copy=True), self.key)
        seed = comfy.model_patcher.string_to_seed(self.key)
        return comfy.float.stochastic_rounding(changed, torch.bfloat16, seed=seed).to(weight.dtype)


class CompressedPatcher:
    """What :func:`keep_compressed` adds to a ModelPatcher."""

    model: torch.nn.Module
    patches: dict[str, Any]

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Patch a weight as ComfyUI does, unless it is compressed."""
        if self._compressed(key) is None:
            return super().patch_weight_to_device(key, *args, **kwargs)  # type: ignore[misc]
        return None

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Load, and let the layers patch what they decode; some may do already, by functions of ComfyUI's own."""
        result = super().load(*args, **kwargs)  # type: ignore[misc]
        for key in self.patches:
            module = self._compressed(key)
            if module is not None and all(getattr(found, "key", None) != key for found in module.weight_function):
                module.weight_function = [PatchOnUse(key, self.patches), *module.weight_function]
        return result

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Unload some layers; those get functions of ComfyUI's own, which take the place of ours."""
        result = super().partially_unload(*args, **kwargs)  # type: ignore[misc]
        for key in self.patches:
            module = self._compressed(key)
            if module is not None:
                same = [found for found in module.weight_function if getattr(found, "key", None) == key]
                extra = {id(found) for found in same if isinstance(found, PatchOnUse)} if len(same) > 1 else set()
                module.weight_function = [found for found in module.weight_function if id(found) not in extra]
        return result

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        """Undo everything."""
        for module in self.model.modules() if unpatch_weights else ():
            functions: Any = getattr(module, "weight_function", ())
            if any(isinstance(found, PatchOnUse) for found in functions):
                vars(module)["weight_function"] = [found for found in functions if not isinstance(found, PatchOnUse)]
        return super().unpatch_model(device_to, unpatch_weights)  # type: ignore[misc]

    def _compressed(self, key: str) -> Any:
        # The layer whose weight is patched by this key, if that is compressed.
        name, _, part = key.rpartition(".") if isinstance(key, str) else ("", "", "")
        if part != "weight":
            return None
        module: Any = self.model.get_submodule(name)
        return module if hasattr(module.weight, "compressed") else None


def keep_compressed(patcher: Any) -> None:
    """Let a ModelPatcher, and all clones of it, leave compressed weights compressed when it patches them."""
    patcher.__class__ = type(f"Compressed{type(patcher).__name__}", (CompressedPatcher, type(patcher)), {})
