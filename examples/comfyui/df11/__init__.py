"""ComfyUI custom nodes: models from `.df11` files, and their conversion. ComfyUI reads the two names below."""

# ruff: noqa: TID252 - ComfyUI chooses the name of a folder of nodes
from . import conversion, loaders, nodes

_MODULES = (nodes, loaders, conversion)
NODE_CLASS_MAPPINGS = {name: node for module in _MODULES for name, node in module.NODE_CLASS_MAPPINGS.items()}
NODE_DISPLAY_NAME_MAPPINGS = {
    name: shown for module in _MODULES for name, shown in module.NODE_DISPLAY_NAME_MAPPINGS.items()
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
