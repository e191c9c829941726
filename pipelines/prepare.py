"""What a job or a push has to do for one model: the plan, the model card, and their needs. Nothing is changed here."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from df11.converter import parquet
from df11.converter.apply import SMALL, staged_bytes
from df11.converter.cast import Cast
from df11.converter.dfloat11.recognise import decoded
from df11.converter.files import DF11
from df11.converter.manifest import FILE_NAME, Manifest, Origin
from df11.converter.pipeline import PARQUET_MEMORY
from df11.converter.plan import Options, Plan
from df11.converter.planning import make_plan
from df11.converter.settings import mebibytes
from df11.formats import errors
from df11.formats.container import Container
from df11.pipelines.card import CONFIGS, plot_paths, render_card
from df11.pipelines.job import Limits, Model
from df11.pipelines.plots import FOLDER, NAMES, path
from df11.storage.address import SCHEME
from df11.storage.entry import Entry
from df11.storage.store import Store, open_source, open_store

CARD: Final = "README.md"
ROW_MEMORY: Final = 2 << 10
"""Bytes per tensor of the manifest, which is kept until the model is done: 1,600 measured for a large tensor."""
_NOT_COPIED: Final = (CARD, FILE_NAME, ".gitattributes", ".gitignore", f"{FOLDER}/")
"""Files that describe only the source, or that the target gets its own version of."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is known before the work on one model begins."""

    model: Model
    plan: Plan
    source_card: str | None
    """README.md of the source, or of the repository that the source is a folder of; None if there is none."""
    disk: int
    """Most bytes that finished files take while they wait for their upload, two at a time."""
    overhead: int
    """Bytes of memory that the job needs, besides the conversion of a shard."""


def prepare(model: Model, limits: Limits) -> Prepared:
    """Look at source and target. Raises a Df11Error if the job cannot be done."""
    _check_installed()
    source = open_source(model.source)
    source.list()
    source = decoded(source, max_memory=limits.memory)
    if source.is_file:
        hint = "for one file: df11-convert"
        raise errors.UsageError("a job converts folders and repositories", file=model.source, hint=hint)
    target = open_store(model.target)
    options = Options(
        model.cast,
        model.include,
        (*model.exclude, *_NOT_COPIED),
        model.allow_missing,
        prove=True,
        may_force=False,
        max_memory=limits.memory,
        keep=model.keep,
        also=(CARD, *map(path, NAMES)),
    )
    plan = make_plan(source, target, "convert", options)
    check_visibility(plan, model)
    prepared = _prepared(model, plan)
    _check_memory(prepared, limits)
    _check_disk(prepared, limits)
    return prepared


def prepare_push(source: Store, model: Model) -> Prepared:
    """The same for a folder that is already converted. Raises a Df11Error if it is not."""
    _check_installed()
    listed = source.list()
    containers = [entry for entry in listed if entry.name.endswith(DF11)]
    if source.is_file or not containers:
        what = "this is a file" if source.is_file else f"no {DF11} file in this folder"
        raise errors.UsageError(what, file=source.label, hint="name a converted folder")
    own = parquet.read(source.locate(FILE_NAME)) if any(entry.name == FILE_NAME for entry in listed) else None
    if own is not None and _describes(own, source, containers):
        origin, cast = own.origin, own.cast
    else:  # Whatever else the manifest is about, what was private in this folder may still be.
        origin, cast = Origin(private=None if own is None else own.origin.private), _cast_of(source, containers)
        own = None
    options = Options(cast, model.include, (*model.exclude, *_NOT_COPIED), model.allow_missing, may_force=False)
    plan = make_plan(source, open_store(model.target), "copy", options, own=own)
    plan = dataclasses.replace(plan, origin=origin)
    check_visibility(plan, model)
    return _prepared(dataclasses.replace(model, cast=cast), plan)


def _prepared(model: Model, plan: Plan) -> Prepared:
    card = plan.source.find([CARD]).get(CARD)
    texts = [None if card is None else plan.source.read(card), plan.source.original_card()]
    # The model card of a folder in a repository often has no front matter, which is the part that is carried over.
    found = [text.decode("utf-8", "replace") for text in texts if text is not None]
    source_card = next((text for text in found if text.lstrip("\ufeff").startswith("---")), found[0] if found else None)
    steps = [step for step in plan.tasks if not (step.kind == "copy" and step.entry.size <= SMALL)]
    rows = len(plan.manifest.tensors) + sum(step.tensors for step in plan.steps)
    prepared = Prepared(model, plan, source_card, staged_bytes(plan, steps)[0], PARQUET_MEMORY + ROW_MEMORY * rows)
    render(prepared, plan.manifest)  # Finds mistakes in the model card early.
    return prepared


def _check_installed() -> None:
    # Better to find out now than at the end. Nothing is imported: that takes memory.
    for module in ("huggingface_hub", "pyarrow", "jinja2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise errors.missing_extra(module, "jobs")


def check_visibility(plan: Plan, model: Model) -> None:
    """Raise UsageError for a public repository that should be private, or whose private source nobody allowed."""
    if plan.target.private is not False:
        return
    if model.private:
        what = "the repository is public, but should be private"
        raise errors.UsageError(what, file=plan.target.label, hint="change one of them")
    if model.private is None and plan.origin.private:
        name = plan.source.label if plan.origin.repository is None else f"{SCHEME}{plan.origin.repository}"
        what = f"this repository is public, and the source, {name}, is private"
        hint = "make it private, or say that it may be public: --public, or private = false in the job"
        raise errors.UsageError(what, file=plan.target.label, hint=hint)


def is_to_be_private(plan: Plan, model: Model) -> bool | None:
    """Whether a new repository is created private; None leaves it to the Hub."""
    return True if model.private is None and plan.origin.private else model.private


def _describes(manifest: Manifest, source: Store, containers: Sequence[Entry]) -> bool:
    # Whether a folder's manifest describes its present containers. If not, they have another source than it says.
    known = {row.file: row.source_sha256 for row in manifest.files}
    for entry in containers:
        with Container(source.locate(entry.name)) as container:
            if known.get(entry.name) != container.source.sha256:
                return False
    return True


def _cast_of(source: Store, containers: Sequence[Entry]) -> Cast:
    # For a folder without a manifest: only a cast loses anything.
    for entry in containers:
        with Container(source.locate(entry.name)) as container:
            if any(container.info(name).exact is False for name in container.keys()):
                return "bf16"
    return None


def render(prepared: Prepared, manifest: Manifest) -> str:
    """The model card of the target, for the contents that the manifest describes."""
    plan = prepared.plan
    return render_card(
        manifest,
        prepared.model.card,
        prepared.source_card,
        repository=None if plan.target.address is None else plan.target.address.repository,
        plots=plot_paths(manifest),
        configs=_configs(plan),
    )


def _configs(plan: Plan) -> Mapping[str, str]:
    steps = [step for step in plan.steps if step.name in CONFIGS and step.kind == "copy"]
    return {step.name: plan.source.read(step.entry).decode("utf-8", "replace") for step in steps}


def _check_memory(prepared: Prepared, limits: Limits) -> None:
    largest = max(prepared.plan.steps, key=lambda step: step.memory)
    needed = largest.memory + prepared.overhead
    if largest.memory and needed > limits.memory:
        raise errors.BudgetError(
            "the memory budget is too small for this file",
            file=prepared.plan.locate(largest),
            expected=f"[limits] memory of at least {mebibytes(needed)}",
            found=mebibytes(limits.memory),
        )


def _check_disk(prepared: Prepared, limits: Limits) -> None:
    plan = prepared.plan
    if not plan.tasks:
        return
    largest = max(plan.tasks, key=lambda step: plan.target.staged_bytes(step.most))
    needed = plan.target.staged_bytes(largest.most)
    if limits.disk is not None and needed > limits.disk:
        raise errors.BudgetError(
            "the disk budget is too small for this file",
            file=plan.locate(largest),
            expected=f"[limits] disk of at least {needed:,} bytes",
            found=f"{limits.disk:,}",
        )
