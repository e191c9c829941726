"""ComfyUI custom nodes: diffusion models from `.df11` files. ComfyUI imports this folder and reads two names."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: TID252 - ComfyUI chooses the name of a folder of nodes

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
