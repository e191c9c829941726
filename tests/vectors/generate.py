"""Make every golden and must-fail file and their index: ``python -m tests.vectors.generate`` writes them here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import zstandard

from df11.formats import reference
from tests.vectors import make_kinds  # noqa: F401 - adds to the two lists below
from tests.vectors.make_golden import MAKERS
from tests.vectors.make_must_fail import CASES

FOLDER: Final = Path(__file__).parent
INDEX: Final = "index.json"
COMPRESSED: Final = ".zst"
MOST_UNCOMPRESSED: Final = 1 << 20
"""Bytes of a file that is stored as it is."""


def build() -> dict[str, bytes]:
    """Every file: its path in this folder -> its bytes, uncompressed."""
    files: dict[str, bytes] = {}
    index: dict[str, list[dict[str, Any]]] = {"golden": [], "must_fail": []}
    for golden in [make() for make in MAKERS]:
        path = f"golden/{golden.name}.df11" + (COMPRESSED if len(golden.file) > MOST_UNCOMPRESSED else "")
        files[path] = golden.file
        container = reference.open_file(golden.file)
        index["golden"].append(
            {
                "name": golden.name,
                "file": path,
                "about": golden.about,
                "sha256": hashlib.sha256(golden.file).hexdigest(),
                "source": {
                    "sha256": container.source["sha256"],
                    "restorable": all(value.get("exact", True) for value in container.tensors.values()),
                },
                "tensors": {
                    name: {
                        "dtype": container.tensors[name]["dtype"],
                        "shape": container.tensors[name]["shape"],
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
                    for name, content in golden.tensors.items()
                },
            }
        )
    for case in CASES:
        path = f"must_fail/{case.name}.df11"
        files[path] = case.file
        index["must_fail"].append(
            {
                "name": case.name,
                "file": path,
                "rule": case.rule,
                "stage": stage_of(case.file),
                "error": case.error.__name__,
                "sha256": hashlib.sha256(case.file).hexdigest(),
            }
        )
    files[INDEX] = json.dumps(index, ensure_ascii=False, indent=1).encode() + b"\n"
    return files


def stage_of(file: bytes) -> str:
    """When a file is to be refused: SPEC.md, section 12."""
    try:
        container = reference.open_file(file)
    except reference.FormatError:
        return "open"
    try:
        for name in container.entries:
            reference.decode_tensor(container, name)
    except reference.FormatError:
        return "decode"
    return "restore"


def read(path: str) -> bytes:
    """The bytes of a stored file, uncompressed."""
    data = (FOLDER / path).read_bytes()
    return zstandard.ZstdDecompressor().decompress(data) if path.endswith(COMPRESSED) else data


def main() -> None:
    """Write the files, and remove those that are no longer made."""
    files = build()
    for path in stored():
        if path not in files:
            (FOLDER / path).unlink()
    for path, data in files.items():
        (FOLDER / path).parent.mkdir(exist_ok=True)
        if path.endswith(COMPRESSED):
            data = zstandard.ZstdCompressor(level=19).compress(data)
        (FOLDER / path).write_bytes(data)


def stored() -> set[str]:
    """The paths of the existing files."""
    return {path.relative_to(FOLDER).as_posix() for path in [*FOLDER.glob("*/*.df11*"), *FOLDER.glob(INDEX)]}


if __name__ == "__main__":
    main()
