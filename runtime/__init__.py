"""Load containers into torch. Light: nothing is imported before it is used. Knows `df11.formats` only."""

from __future__ import annotations

from df11.runtime.load import load_file

__all__ = ["load_file"]
