"""Make every golden and must-fail file and their index: ``python -m tests.vectors.generate`` writes them beside this file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from tests.vectors.make_golden import MAKERS
from tests.vectors.make_must_fail import CASES

FOLDER: Final = Path(__file__).parent
INDEX: Final = "index.json"


def build() -> dict[str, bytes]:
    """Every file: its path from this folder -> its bytes."""
    files: dict[str, bytes] = {}
    index: dict[str, list[dict[str, Any]]] = {"golden": [], "must_fail": []}
    for golden in [make() for make in MAKERS]:
        files[f"golden/{golden.name}.df11"] = golden.file
        tensors = {name: hashlib.sha256(content).hexdigest() for name, content in golden.tensors.items()}
        index["golden"].append(
            {
                "name": golden.name,
                "about": golden.about,
                "sha256": hashlib.sha256(golden.file).hexdigest(),
                "tensors": tensors,
            }
        )
    for case in CASES:
        files[f"must_fail/{case.name}.df11"] = case.file
        index["must_fail"].append(
            {
                "name": case.name,
                "rule": case.rule,
                "error": case.error.__name__,
                "reference": case.reference,
                "sha256": hashlib.sha256(case.file).hexdigest(),
            }
        )
    files[INDEX] = json.dumps(index, ensure_ascii=False, indent=1).encode() + b"\n"
    return files


def main() -> None:
    """Write the files, and remove those that are no longer made."""
    files = build()
    for path in stored():
        if path not in files:
            (FOLDER / path).unlink()
    for path, data in files.items():
        (FOLDER / path).parent.mkdir(exist_ok=True)
        (FOLDER / path).write_bytes(data)


def stored() -> set[str]:
    """The paths of the files that are there."""
    return {path.relative_to(FOLDER).as_posix() for path in [*FOLDER.glob("*/*.df11"), *FOLDER.glob(INDEX)]}


if __name__ == "__main__":
    main()
