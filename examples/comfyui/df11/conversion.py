"""The node that converts a file of ComfyUI's model folders, with ComfyUI's progress bar."""

from __future__ import annotations

import os
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

import df11

KINDS = ("checkpoints", "diffusion_models", "text_encoders", "vae")


class ConvertToDf11:
    """A `.safetensors` file to a `.df11` file next to it, of the same name."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    FUNCTION = "convert"
    CATEGORY = "advanced/model_merging"
    OUTPUT_NODE = True
    DESCRIPTION = "Compresses a model without loss. What was converted before, and has not changed, is kept."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The files to choose from, as folder/file; whether weights in FP32 are rounded to BF16."""
        names = [
            f"{kind}/{name}"
            for kind in KINDS
            for name in folder_paths.get_filename_list(kind)
            if name.lower().endswith((".safetensors", ".sft"))
        ]
        return {"required": {"file": (names,), "round_fp32": ("BOOLEAN", {"default": False})}}

    def convert(self, file: str, round_fp32: bool) -> dict[str, Any]:
        """Convert, unless it has been done; show the sizes. An interrupt in ComfyUI leaves nothing behind."""
        kind, _, name = file.partition("/")  # The name may be in a subfolder; on Windows, behind a backslash.
        source = folder_paths.get_full_path_or_raise(kind, name)
        target = f"{os.path.splitext(source)[0]}.df11"  # noqa: PTH122 - a path as ComfyUI gives it
        bar = comfy.utils.ProgressBar(1)

        def begin(total: int) -> None:
            bar.total = max(total, 1)

        def advance(size: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(size)

        report = df11.convert(source, target, cast="bf16" if round_fp32 else None, on_total=begin, on_progress=advance)
        said = f"{report.source_bytes:,} -> {report.output_bytes:,} bytes ({report.ratio:.4f}): {target}"
        return {"ui": {"text": [said]}, "result": (target,)}


NODE_CLASS_MAPPINGS: dict[str, type] = {"ConvertToDf11": ConvertToDf11}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"ConvertToDf11": "Convert to df11"}
