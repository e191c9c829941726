"""All targets, and the folder of their corpora."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import containers, documents, foreign, manifests, programs
from tests.fuzz.oracle import Target
from tests.fuzz.programs import Program

CORPUS = Path(__file__).with_name("corpus")
FAILING = "failing-"
"""How the name of an input starts that has failed and has not been looked at."""
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(containers.CONTAINER, containers.DECODERS, containers.RECORD, containers.SOURCE),
        *(manifests.MANIFEST, manifests.DOCUMENT),
        foreign.CHECKPOINT,
        *(documents.INDEX, documents.JOB, documents.RESULTS, documents.ADDRESS),
    )
}
PROGRAMS: dict[str, Program] = {program.name: program for program in (programs.C, programs.CUDA)}


def corpus(name: str) -> list[Path]:
    """The committed inputs of a target."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())
