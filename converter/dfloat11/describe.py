"""Describe DFloat11 checkpoints: units, and what each part of them takes, in bits for each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from df11.converter.dfloat11.layout import CODES, Checkpoint, read_checkpoint
from df11.converter.dfloat11.recognise import checkpoints
from df11.converter.inspect import WIDEST, as_table
from df11.formats import errors
from df11.storage.store import open_source

COLUMNS: Final = {
    CODES: "codes",
    "sign_mantissa": "signs",
    "gaps": "gaps",
    "output_positions": "positions",
    "luts": "tables",
    "split_positions": "splits",
}
"""The tensors of a unit, and what a table calls them."""


def describe(path: Path) -> list[dict[str, Any]]:
    """What ``df11 inspect --json`` prints of each checkpoint at a path; nothing if there is none."""
    store = open_source(path)
    found = []
    for folder, (files, config) in checkpoints(store).items():
        checkpoint = read_checkpoint(files, config, None, store.open, None)
        own = config.document.get("dfloat11_config", {})
        found.append(
            {
                "path": str(path) if store.is_file or not folder else store.locate(folder.rstrip("/")),
                "layout": "dfloat11",
                "layout_version": errors.printable(str(own.get("version", "")), WIDEST),
                "threads_per_block": config.threads,
                "files": len(files),
                "bytes": sum(file.size for file in files),
                **_units_of(checkpoint),
            }
        )
    return found


def _units_of(checkpoint: Checkpoint) -> dict[str, Any]:
    units = [
        {
            "name": unit.name,
            "tensors": [part.name for part in unit.parts],
            "weights": unit.weights,
            "stored_bytes": unit.stored_bytes,
            "bits_per_weight": round(8 * unit.stored_bytes / unit.weights, 4),
            "parts": {
                COLUMNS[part]: round(8 * place.entry.size / unit.weights, 4) for part, place in unit.places.items()
            },
        }
        for unit in checkpoint.units.values()
    ]
    plain = checkpoint.plain.values()
    return {"units": units, "plain": {"tensors": len(plain), "bytes": sum(place.entry.size for place in plain)}}


def as_text(description: dict[str, Any]) -> str:
    """The same for people: a table of the units, and the totals."""
    rows = [("unit", "tensors", "weights", "bytes", *COLUMNS.values(), "bits/weight")]
    units = description["units"]
    rows += [
        (
            errors.printable(unit["name"], WIDEST),
            str(len(unit["tensors"])),
            f"{unit['weights']:,}",
            f"{unit['stored_bytes']:,}",
            *(f"{unit['parts'][name]:.3f}" for name in COLUMNS.values()),
            f"{unit['bits_per_weight']:.2f}",
        )
        for unit in units
    ]
    weights, stored = (sum(unit[key] for unit in units) for key in ("weights", "stored_bytes"))
    plain = description["plain"]
    where = errors.printable(description["path"], errors.MOST_OF_A_PATH)
    version = f" {description['layout_version']}" if description["layout_version"] else ""
    lines = [
        *as_table(rows, left=1),
        f"{where}: DFloat11{version}, {description['files']} files, {description['bytes']:,} bytes",
        f"{len(units)} units, {weights:,} weights in {stored:,} bytes"
        + (f", {8 * stored / weights:.4f} bits each" if weights else "")
        + f"; {plain['tensors']} plain tensors, {plain['bytes']:,} bytes",
        "to convert it: df11-convert",
    ]
    return "\n".join(lines)
