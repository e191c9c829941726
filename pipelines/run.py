"""Carry out a job: for each model, bring what is missing to the target, then the model card, and read it all back.

The target and its manifest are the only record of what is done. So a job that was killed continues when it is run
again, on any machine.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from df11.converter.apply import Commit, Delivery, Outcome, apply_plan
from df11.converter.convert import tell_if_nothing_is_compressed
from df11.converter.engine import Engine
from df11.converter.manifest import FILE_NAME, Manifest
from df11.converter.plan import Plan
from df11.converter.planning import check_foreign
from df11.converter.settings import Settings, thread_count
from df11.converter.source import Progress, ignore
from df11.converter.work import Done
from df11.formats import errors
from df11.pipelines import summary
from df11.pipelines.card import plot_paths
from df11.pipelines.job import Job, Limits, Model
from df11.pipelines.plots import draw_plots
from df11.pipelines.prepare import CARD, Prepared, check_visibility, is_to_be_private, prepare, render
from df11.storage.entry import Entry
from df11.storage.paths import existing
from df11.storage.store import has_content

Log = Callable[..., None]
"""Called with the name of an event and its values, which must be JSON types."""


def null_log(event: str, **values: Any) -> None:
    """A log that is discarded."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What was done for one model."""

    source: str
    target: str
    commit: str | None
    """Of the target, if it is on the Hub."""
    source_bytes: int
    output_bytes: int
    delivered: int
    """Files converted or copied by this run."""
    kept: int
    """Files that were there already."""
    seconds: float


@dataclass(frozen=True, slots=True)
class JobReport:
    """The result of a job. ``failures``: models that could not be finished, and why."""

    models: tuple[ModelReport, ...]
    failures: tuple[tuple[Model, errors.Df11Error], ...]


def run_job(
    job: Job,
    *,
    on_ray: bool = False,
    log: Log = null_log,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> JobReport:
    """Do all models of a job, one after the other. A model that fails does not stop the others.

    ``log`` gets events; ``on_total`` and ``on_progress`` get bytes of source. All models are planned before the first
    one is begun. The logger ``df11`` reports retries and anything odd about a source.
    """
    reports: list[ModelReport] = []
    failures: list[tuple[Model, errors.Df11Error]] = []
    plans: list[Prepared] = []
    for model in job.models:
        with _failing(model, failures, log):
            plans.append(prepare(model, job.limits))
            log("plan", **describe(plans[-1]))
    on_total(sum(step.entry.size for prepared in plans for step in prepared.plan.tasks))
    for prepared in plans:
        with _failing(prepared.model, failures, log):
            reports.append(
                run_model(prepared, job.limits, job.shards_per_commit, on_ray=on_ray, log=log, on_progress=on_progress)
            )
            log("model", **dataclasses.asdict(reports[-1]))
    return JobReport(tuple(reports), tuple(failures))


@contextmanager
def _failing(model: Model, failures: list[tuple[Model, errors.Df11Error]], log: Log) -> Iterator[None]:
    try:
        yield
    except errors.Df11Error as error:
        failures.append((model, error))
        log("error", source=model.source, target=model.target, code=error.exit_code, message=str(error))


def describe(prepared: Prepared) -> dict[str, Any]:
    """A plan as an event: what would be done, with sizes and needs."""
    plan = prepared.plan
    return {
        "source": prepared.model.source,
        "commit": plan.origin.commit,
        "target": prepared.model.target,
        "files": [
            {"file": step.name, "source": step.entry.name, "kind": step.kind, "source_bytes": step.entry.size}
            | ({"status": "kept"} if step.kept else {"status": "planned", "expected_bytes": step.expected})
            for step in plan.steps
        ],
        "removed": list(plan.stale),
        "source_bytes": sum(step.entry.size for step in plan.steps),
        "expected_bytes": sum(step.expected for step in plan.steps if not step.kept),
        "disk_bytes": prepared.disk,
    }


def run_model(
    prepared: Prepared, limits: Limits, shards_per_commit: int, *, on_ray: bool, log: Log, on_progress: Progress
) -> ModelReport:
    """Do what a plan says, and prove it. Raises a Df11Error; earlier commits stay, and the next run keeps them."""
    started = last = time.monotonic()
    plan, target = prepared.plan, prepared.plan.target

    def on_done(done: Done) -> None:
        log("file", **_describe_done(plan, done))

    def on_commit(commit: Commit) -> None:
        nonlocal last
        now = time.monotonic()
        log(
            "commit",
            target=target.label,
            commit=target.head,
            files=commit.names,
            removed=commit.removed,
            seconds=round(now - last, 3),
        )
        last = now

    delivery = Delivery(
        work=limits.work,
        disk=limits.disk if limits.disk is not None else shutil.disk_usage(existing(limits.work)).free,
        containers_per_commit=shards_per_commit,
        start=lambda: _start(prepared),
        last=lambda manifest: _card_and_plots(prepared, manifest),
        on_done=on_done,
        on_commit=on_commit,
        title=lambda what: f"{what} ({_short(plan)})",
    )
    settings = Settings(
        thread_count(limits.threads),
        limits.memory - prepared.overhead,
        plan.options.cast,
        verify=True,
        keep=plan.options.keep,
    )
    outcome = apply_plan(plan, settings, delivery, engine=_engine(limits) if on_ray else None, progress=on_progress)
    assert outcome.manifest is not None
    tell_if_nothing_is_compressed(plan, outcome.manifest.tensors)
    _read_back(plan, outcome.written)
    log("checked", target=target.label, files=len(outcome.written))
    return _report(prepared, outcome, time.monotonic() - started)


def _engine(limits: Limits) -> Engine:
    from df11.pipelines.ray import OnRay

    return OnRay(limits.memory)


def _report(prepared: Prepared, outcome: Outcome, seconds: float) -> ModelReport:
    assert outcome.manifest is not None
    total = summary.total(outcome.manifest)
    delivered = len(outcome.done) + outcome.sent
    return ModelReport(
        prepared.model.source,
        prepared.model.target,
        prepared.plan.target.head,
        total.source_bytes,
        total.container_bytes,
        delivered,
        len(outcome.written) - delivered,
        round(seconds, 3),
    )


def _short(plan: Plan) -> str:
    return (
        f"{plan.origin.repository}@{plan.origin.commit[:8]}"
        if plan.origin.repository and plan.origin.commit
        else "a local source"
    )


def _start(prepared: Prepared) -> None:
    # Check the target before the first file: whatever the Hub would refuse at the end is refused now.
    plan, target = prepared.plan, prepared.plan.target
    if target.address is not None:
        from df11.storage import client

        client.check_card(render(prepared, plan.manifest), f"{target.label}/{CARD}")
    is_new = target.head is None
    target.create(private=is_to_be_private(plan, prepared.model))
    check_visibility(plan, prepared.model)
    if is_new:
        check_foreign(target, plan.manifest)  # A new branch starts with the contents of main.


def _describe_done(plan: Plan, done: Done) -> dict[str, Any]:
    return {
        "source": plan.locate(done.step),
        "target": plan.target.label,
        "file": done.step.name,
        "status": "converted" if done.step.kind == "convert" else "copied",
        "source_bytes": done.step.entry.size,
        "source_sha256": done.row.source_sha256 if done.row else done.entry.sha256,
        "output_bytes": done.entry.size,
        "output_sha256": done.entry.sha256,
        "seconds": {step: round(seconds, 3) for step, seconds in done.seconds.items()},
    }


def _card_and_plots(prepared: Prepared, manifest: Manifest) -> Mapping[str, bytes]:
    # The model card comes last: it names every hash, so if it is up to date, the pictures are, too.
    plan = prepared.plan
    card = render(prepared, manifest).encode()
    paths = set(plot_paths(manifest).values())
    held = plan.target.find({CARD, FILE_NAME, *paths})
    is_known = (manifest.files, manifest.tensors) == (plan.manifest.files, plan.manifest.tensors)
    is_known = is_known and CARD in held and has_content(plan.target, held[CARD], Entry.of(CARD, card))
    drawn = {} if is_known and paths <= held.keys() else draw_plots(manifest)
    return {**drawn, CARD: card}


def _read_back(plan: Plan, wanted: Mapping[str, Entry]) -> None:
    # Check that every file of this job is in the target, with the content that was sent.
    plan.target.refresh()
    held = plan.target.find(wanted)
    for name, entry in wanted.items():
        there = held.get(name)
        if there is None or not has_content(plan.target, there, entry):
            raise errors.DifferenceError(
                "the target does not hold what was sent",
                file=plan.target.locate(name),
                expected=entry,
                found=there or "nothing",
                hint="run the same command again",
            )
