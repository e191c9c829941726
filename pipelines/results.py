"""Timings for a model card: only from a results file of ``make gpu-omnigen2`` or ``make gpu-bench``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from df11.formats import errors, json_text
from df11.storage.paths import read_file

SECTIONS: Final = ("image", "text", "sizes", "block")
"""The sections that matter to users of a model. A results file has many more, for work on the kernels."""
LARGEST: Final = 16 << 20
MOST_VALUE: Final = 1e18
"""Of a time, a size or a ratio; a whole number of any length is JSON."""
MOST_ROWS: Final = 200
_COLUMNS: Final = {
    "seconds": "time",
    "tokens_per_second": "tokens per second",
    "of_bf16": "of BF16's time",
    "bytes_per_second": "GB/s of weights",
    "of_floor": "of a plain copy's speed",
    "held_bytes": "model, GB",
    "peak_bytes": "peak, GB",
}
_HINT: Final = "pass the .json that make gpu-omnigen2 or make gpu-bench wrote"


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured on one device on one day.

    ``rows``: a cell per column; the first two say what was measured, and for which program. None: no figure.
    """

    device: str
    date: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a results file. Raises UsageError if it is not one, or was not measured on a GPU."""
    data = read_file(path, LARGEST)

    def refuse(what: str) -> NoReturn:
        raise errors.UsageError(f"not a results file for a model card: {what}", file=path, hint=_HINT)

    try:
        content = json_text.parse(data, what="it", where={})
        device, date, sections = content["machine"]["gpu"]["name"], content["machine"]["date"], content["sections"]
        found = [row for name in SECTIONS if name in sections for row in sections[name]["rows"]]
    except (errors.FormatError, KeyError, TypeError):
        refuse("it has no machine, gpu or sections")
    if not isinstance(device, str) or not isinstance(date, str) or not device or not date:
        refuse("it does not name its device and date")
    if "memory_bytes" not in content["machine"]["gpu"]:
        refuse("it was measured without a GPU")
    if not found:
        refuse(f"it has none of the sections {', '.join(SECTIONS)}")
    if len(found) > MOST_ROWS or not all(_is_row(row) for row in found):
        refuse("a row does not have the form that these programs write")
    known = [key for key in _COLUMNS if any(row.get(key) is not None for row in found)]
    rows = tuple((row["what"], row["name"], *(_cell(key, row.get(key)) for key in known)) for row in found)
    return Results(device, date[:10], ("what", "by", *(_COLUMNS[key] for key in known)), rows)


def _is_row(row: Any) -> bool:
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("what"), str)
        or not isinstance(row.get("name"), str)
        or "seconds" not in row
    ):
        return False
    return all(
        value is None or (type(value) in (int, float) and 0 <= value < MOST_VALUE)
        for key, value in row.items()
        if key in _COLUMNS
    )


def _cell(key: str, value: float | None) -> str | None:
    if value is None:
        return None
    if key == "seconds":
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"
    return f"{value / 1e9:.2f}" if "bytes" in key else f"{value:.3f}"
