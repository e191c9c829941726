"""The nodes for everything else that a workflow loads: whole checkpoints, text encoders, VAEs."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths

from df11 import runtime
from df11.formats import errors
from df11.formats.container import Container

from .nodes import Df11Ops, accepted, list_folder, ready, state_dict  # noqa: TID252 - ComfyUI chooses the name of this folder

CHECKPOINTS = list_folder("checkpoints")
TEXT_ENCODERS = list_folder("text_encoders")
VAES = list_folder("vae")


def _metadata(path: str) -> dict[str, str] | None:
    with Container(path) as container:
        return dict(container.source_header.metadata) or None


class LoadCheckpointDf11:
    """Model, text encoder and VAE from one `.df11` file in ``models/checkpoints``."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "Loads a checkpoint whose weights stay compressed, without loss, in memory."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The files to choose from."""
        return {"required": {"ckpt_name": (folder_paths.get_filename_list(CHECKPOINTS),)}}

    def load(self, ckpt_name: str) -> tuple[Any, Any, Any]:
        """The three parts, as ComfyUI's own loader returns them; what the file lacks is None."""
        path = folder_paths.get_full_path_or_raise(CHECKPOINTS, ckpt_name)
        compressed = {"custom_operations": Df11Ops}
        # ComfyUI's VAE copies weights into layers of its own making, which decodes them.
        found = comfy.sd.load_state_dict_guess_config(
            state_dict(path),
            output_vae=True,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            model_options=compressed,
            te_model_options=compressed,
            **accepted(comfy.sd.load_state_dict_guess_config, metadata=_metadata(path), disable_dynamic=True),
        )
        if found is None or found[0] is None:
            raise errors.UsageError(
                "ComfyUI does not recognize this checkpoint",
                file=path,
                hint="for a diffusion model alone: Load Diffusion Model (df11)",
            )
        model, clip, vae = found[:3]
        ready(model)
        if clip is not None:
            ready(clip.patcher)
        return model, clip, vae


class LoadTextEncoderDf11:
    """One text encoder or two that belong together, from `.df11` files in ``models/text_encoders``."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "advanced/loaders"
    DESCRIPTION = "Loads text encoders whose weights stay compressed, without loss, in memory."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The files to choose from, and ComfyUI's names of the models that text encoders are for."""
        files = folder_paths.get_filename_list(TEXT_ENCODERS)
        types = [kind.name.lower() for kind in comfy.sd.CLIPType]
        return {
            "required": {"clip_name": (files,), "type": (types,)},
            "optional": {"clip_name2": (["none", *files],)},
        }

    def load(self, clip_name: str, type: str, clip_name2: str = "none") -> tuple[Any]:  # noqa: A002 - ComfyUI's name
        """The text encoder, as ComfyUI's own loaders return it."""
        names = [clip_name] if clip_name2 == "none" else [clip_name, clip_name2]
        paths = [folder_paths.get_full_path_or_raise(TEXT_ENCODERS, name) for name in names]
        clip = comfy.sd.load_text_encoder_state_dicts(
            [state_dict(path) for path in paths],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=comfy.sd.CLIPType[type.upper()],
            model_options={"custom_operations": Df11Ops},
            **accepted(comfy.sd.load_text_encoder_state_dicts, disable_dynamic=True),
        )
        ready(clip.patcher)
        return (clip,)


class LoadVaeDf11:
    """A VAE from a `.df11` file in ``models/vae``. It is decoded: convolutions do not stay compressed."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "Loads a VAE that is stored compressed, without loss."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The files to choose from."""
        return {"required": {"vae_name": (folder_paths.get_filename_list(VAES),)}}

    def load(self, vae_name: str) -> tuple[Any]:
        """The VAE, as ComfyUI's own loader returns it."""
        path = folder_paths.get_full_path_or_raise(VAES, vae_name)
        vae = comfy.sd.VAE(
            sd=runtime.load_file(path, "cpu"), **accepted(comfy.sd.VAE.__init__, metadata=_metadata(path))
        )
        vae.throw_exception_if_invalid()
        return (vae,)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LoadCheckpointDf11": LoadCheckpointDf11,
    "LoadTextEncoderDf11": LoadTextEncoderDf11,
    "LoadVaeDf11": LoadVaeDf11,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LoadCheckpointDf11": "Load Checkpoint (df11)",
    "LoadTextEncoderDf11": "Load Text Encoder (df11)",
    "LoadVaeDf11": "Load VAE (df11)",
}
