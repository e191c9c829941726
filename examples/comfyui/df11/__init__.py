"""ComfyUI custom nodes: diffusion models from `.df11` files. ComfyUI imports this folder and looks for the two names below."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: TID252 - a folder of nodes has whatever name ComfyUI gives it

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
