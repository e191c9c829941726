"""Checkpoints that are not df11's: what to say when somebody loads one of DFloat11, whose name is so similar."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from df11.formats import errors, json_text, layout
from df11.storage.address import is_address
from df11.storage.paths import read_file

KEY: Final = "dfloat11_config"
"""What the config.json of a DFloat11 checkpoint has."""


def refuse_dfloat11(source: object, config: object) -> None:
    """Raise UsageError if a config, an object or a mapping, is that of a DFloat11 checkpoint from ``source``."""
    value: Any = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
    if value is not None:
        name = str(source)
        is_here = is_address(name) or os.path.exists(name)  # noqa: PTH110 - Path.exists raises for a name too long
        origin = name if is_here else f"hf://{name}"
        target = f"{name.rstrip('/').rpartition('/')[2]}-df11"
        hint = f"import it: df11-convert {origin} {target}"
        raise errors.UsageError("this is a checkpoint of DFloat11, another layout", file=name, hint=hint)


def refuse_dfloat11_folder(folder: str | os.PathLike[str]) -> None:
    """The same for a folder, by its config.json; one that has none, or that cannot be read, is none."""
    try:
        data = read_file(Path(folder) / "config.json", layout.MAX_JSON_HEADER)
        config = json_text.parse(data, what="config.json", where={}) if KEY.encode() in data else None
    except errors.Df11Error:
        return
    refuse_dfloat11(folder, config)
