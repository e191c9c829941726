"""Describe the contents of a container."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from df11.formats import errors, layout
from df11.formats.container import Container


def describe(container: Container) -> dict[str, Any]:
    """Tensors, sizes and source of a container, as ``df11 inspect --json`` prints it."""
    tensors = []
    for name in container.keys():
        info = container.info(name)
        bits = info.bits_per_weight
        value: dict[str, Any] = {
            "name": name,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "encoding": info.encoding,
            "stored_bytes": info.stored_bytes,
            "bits_per_weight": None if bits is None else round(bits, 4),
        }
        if info.exact is not None:
            value["exact"] = info.exact
        tensors.append(value)
    return {
        "path": container.path,
        "format_version": layout.VERSION,
        "writer": container.writer,
        "bytes": container.size,
        "source": {"sha256": container.source.sha256, "bytes": container.source.bytes, "cast": container.source.cast},
        "tensors": tensors,
    } | ({"made_from": [asdict(file) for file in container.made_from]} if container.made_from else {})


WIDEST: Final = 80
"""Characters of a name or shape in a table: a stranger's name may have any length."""


def as_text(description: dict[str, Any]) -> str:
    """The same for people: a table of the tensors, and a line with the totals."""
    rows = [("tensor", "dtype", "shape", "encoding", "bytes", "bits/weight")]
    for tensor in description["tensors"]:
        bits = tensor["bits_per_weight"]
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        note = "" if tensor.get("exact", True) else " (rounded)"
        rows.append(
            (
                errors.printable(tensor["name"], WIDEST),
                tensor["dtype"] + note,
                errors.printable(shape, WIDEST),
                tensor["encoding"],
                f"{tensor['stored_bytes']:,}",
                "-" if bits is None else f"{bits:.2f}",
            )
        )
    lines = as_table(rows, left=4)
    source = description["source"]
    ratio = description["bytes"] / source["bytes"]
    cast = " cast to BF16" if source["cast"] else ""
    lines.append(
        f"{errors.printable(description['path'], errors.MOST_OF_A_PATH)}: {description['bytes']:,} bytes, "
        f"{ratio:.4f} of {source['bytes']:,} bytes of source{cast}"
    )
    what = "SHA-256 of what was decoded" if "made_from" in description else "source SHA-256"
    lines.append(f"{what} {source['sha256']}")
    for file in description.get("made_from", ()):
        name = errors.printable(file["file"], WIDEST)
        lines.append(f"decoded from DFloat11's {name}, {file['bytes']:,} bytes, SHA-256 {file['sha256']}")
    return "\n".join(lines)


def as_table(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Rows as lines with columns of the same width, the first ``left`` of which are aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
