"""Load containers into torch, and decode compressed tensors on a GPU or on the processor, bit for bit the same.

Light: nothing is imported before it is used. Knows `df11.formats` only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from df11.runtime.compressed import CompressedTensor, decode_many, raise_damage, warm_up
    from df11.runtime.load import load_file
    from df11.runtime.model import load_model, report
    from df11.runtime.modules import materialize

__all__ = ["CompressedTensor", "decode_many", "load_file", "load_model", "materialize", "raise_damage", "report", "warm_up"]

_HOMES = {
    "CompressedTensor": "df11.runtime.compressed",
    "decode_many": "df11.runtime.compressed",
    "load_file": "df11.runtime.load",
    "load_model": "df11.runtime.model",
    "materialize": "df11.runtime.modules",
    "report": "df11.runtime.model",
    "raise_damage": "df11.runtime.compressed",
    "warm_up": "df11.runtime.compressed",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'df11.runtime' has no attribute {name!r}")
