"""Carry out a job: for each model bring what is missing to the target, file by file, then the small files and the card, and read all of it back.

What has been done is known from the target and its manifest alone. So a job that was killed goes on when it is run again, on whatever machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from df11.converter.convert import thread_count
from df11.converter.manifest import FILE_NAME, Manifest
from df11.converter.pipeline import Settings
from df11.converter.source import Progress, ignore
from df11.converter.tree import DF11, SAFETENSORS, read_index
from df11.formats import errors, hub, writer
from df11.pipelines import summary
from df11.pipelines.card import plot_paths
from df11.pipelines.engine import Engine, InProcess, OnRay
from df11.pipelines.job import Job, Limits, Model, safe_name
from df11.pipelines.plan import CARD, ModelPlan, check_foreign, plan_model, render
from df11.pipelines.plots import draw_plots
from df11.pipelines.shards import Done, Task
from df11.pipelines.target import Delivery, Digest

Log = Callable[..., None]
"""Called with the name of an event and its values, which JSON has."""


def unheard(event: str, **values: Any) -> None:
    """A log that nobody keeps."""


_LOCK: Final = ".lock"
_NOTHING: Final = Digest(-1)
TOGETHER: Final = 16 << 20
"""Bytes of small files that are held in memory until a commit."""


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
    """What came of a job. ``failures``: models that could not be finished, and why."""

    models: tuple[ModelReport, ...]
    failures: tuple[tuple[Model, errors.Df11Error], ...]


def run_job(
    job: Job,
    *,
    on_ray: bool = False,
    log: Log = unheard,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> JobReport:
    """Do all models of a job, one after the other; one that fails does not keep the others from being done.

    ``log`` gets events; ``on_total`` and ``on_progress`` bytes of source. The plan of every model is made before the first one is begun.
    """
    reports: list[ModelReport] = []
    failures: list[tuple[Model, errors.Df11Error]] = []
    plans: list[ModelPlan] = []
    with _telling_of_retries(log):
        for model in job.models:
            with _failing(model, failures, log):
                plans.append(plan_model(model, job.limits))
                log("plan", **describe(plans[-1]))
        on_total(sum(item.file.size for plan in plans for item in plan.tasks))
        for plan in plans:
            with _failing(plan.model, failures, log):
                reports.append(
                    run_model(plan, job.limits, job.shards_per_commit, on_ray=on_ray, log=log, on_progress=on_progress)
                )
                log("model", **dataclasses.asdict(reports[-1]))
    return JobReport(tuple(reports), tuple(failures))


@contextmanager
def _telling_of_retries(log: Log) -> Iterator[None]:
    before = hub.on_pause
    hub.on_pause = lambda error, seconds: log("retry", message=str(error), seconds=round(seconds, 3))
    try:
        yield
    finally:
        hub.on_pause = before


@contextmanager
def _failing(model: Model, failures: list[tuple[Model, errors.Df11Error]], log: Log) -> Iterator[None]:
    try:
        yield
    except errors.Df11Error as error:
        failures.append((model, error))
        log("error", source=model.source, target=model.target, code=error.exit_code, message=str(error))


def describe(plan: ModelPlan) -> dict[str, Any]:
    """A plan as an event: what would be done, with sizes and needs."""
    return {
        "source": plan.model.source,
        "commit": plan.origin.commit,
        "target": plan.model.target,
        "files": [
            {"file": item.name, "source": item.file.name.as_posix(), "kind": item.kind, "source_bytes": item.file.size}
            | ({"status": "kept"} if item.kept else {"status": "planned", "expected_bytes": item.expected})
            for item in plan.items
        ],
        "removed": list(plan.stale),
        "source_bytes": sum(item.file.size for item in plan.items),
        "expected_bytes": sum(item.expected for item in plan.items if not item.kept),
        "disk_bytes": plan.disk,
    }


def run_model(
    plan: ModelPlan, limits: Limits, shards_per_commit: int, *, on_ray: bool, log: Log, on_progress: Progress
) -> ModelReport:
    """Do what a plan says, and prove it. Raises a Df11Error; what has been committed by then stays, and is kept by the next run."""
    started = time.monotonic()
    target = plan.target
    with _staging(plan, limits) as staging:
        if plan.tasks or not plan.held:
            target.create()
            if not plan.manifest.files:
                check_foreign(target.look(), target)  # A new branch has what the main one has.
        manifest = _bring_files(plan, limits, staging, shards_per_commit, on_ray, log, on_progress)
    wanted, sent = _send_small_files(plan, manifest, log)
    checked = _read_back(plan, wanted)
    log("checked", target=target.label, files=checked)
    delivered = len(plan.tasks) + sent
    total = summary.total(manifest)
    return ModelReport(
        plan.model.source,
        plan.model.target,
        target.head,
        total.source_bytes,
        total.container_bytes,
        delivered,
        len(wanted) - delivered,
        round(time.monotonic() - started, 3),
    )


def _short(plan: ModelPlan) -> str:
    return (
        f"{plan.origin.repository}@{plan.origin.commit[:8]}"
        if plan.origin.repository and plan.origin.commit
        else "a local source"
    )


@contextmanager
def _staging(plan: ModelPlan, limits: Limits) -> Iterator[Path]:
    # A folder for files on their way, which one job at a time has; what a killed one left is removed.
    if plan.target.folder is not None:
        yield plan.target.folder
        return
    digest = hashlib.sha256(f"{hub.endpoint()} {plan.target.label}".encode()).hexdigest()[:8]
    folder = limits.work / f"df11-job-{safe_name(plan.target.label.removeprefix(hub.SCHEME))}-{digest}"
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        if (
            folder.is_symlink() or folder.stat().st_uid != os.geteuid()
        ):  # Anybody can make one like it where temporary files are.
            raise errors.NotAllowedError(
                "this folder is somebody else's", file=folder, hint="name another folder: [limits] work"
            )
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise errors.from_os_error(error, file=folder) from None
    try:
        try:
            writer.lock(lock)
        except BlockingIOError:
            raise errors.ConflictError(
                "another job is filling this target", file=plan.target.label, hint="wait for it to end"
            ) from None
        _clear(folder)
        free = shutil.disk_usage(folder).free
        if plan.disk_for_one > free:
            raise errors.BudgetError(
                "too little disk space for one file",
                file=folder,
                expected=f"{plan.disk_for_one:,} bytes",
                found=f"{free:,}",
                hint="free some, or name another folder: [limits] work",
            )
        try:
            yield folder
        finally:
            _clear(folder)
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _bring_files(
    plan: ModelPlan,
    limits: Limits,
    staging: Path,
    shards_per_commit: int,
    on_ray: bool,
    log: Log,
    on_progress: Progress,
) -> Manifest:
    # Bring each file to the target; after every few of them comes a commit, with the manifest of what is there.
    settings = Settings(thread_count(limits.threads), limits.memory - plan.overhead, plan.model.cast, verify=True)
    carrier = plan.target.carrier()
    staged = plan.target.folder is None
    known = {row.file for row in plan.manifest.files}
    tasks = [
        Task(
            item.kind,
            item.file,
            item.name,
            staging / f"{number:05}" if staged else staging,
            staged,
            settings,
            carrier,
            replace=not staged and item.name in known,
        )
        for number, item in enumerate(plan.tasks)
        if item.kind != "index"  # None is a task; this tells its type.
    ]
    room = min(limits.disk or plan.disk, shutil.disk_usage(_existing(limits.work)).free)
    engine: Engine = OnRay(limits.memory) if on_ray else InProcess(overlap=plan.disk <= room)
    order = [item.name for item in plan.items if item.kind in ("convert", "container")]
    kept = {item.name for item in plan.items if item.kept}
    manifest = dataclasses.replace(
        plan.manifest.ordered([name for name in order if name in kept]), origin=plan.origin, cast=plan.model.cast
    )
    # Those that the last commit will remove are named until then: a job that goes on would not know of them otherwise.
    stale = tuple(row for row in plan.manifest.files if row.file in plan.stale)
    waiting: list[Done] = []

    def commit() -> None:
        batch = waiting.copy()
        waiting.clear()
        names = [one.delivery.name for one in batch]
        title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        so_far = dataclasses.replace(manifest, files=(*manifest.files, *stale))
        files = {FILE_NAME: so_far.to_bytes()} if any(one.row for one in batch) else {}
        _commit(plan, [one.delivery for one in batch], files, [], f"{title} ({_short(plan)})", log)

    with closing(engine.run(tasks, on_progress)) as results:
        try:
            for done in results:
                waiting.append(done)
                log("file", **_describe_done(plan, done))
                if done.row is not None:
                    manifest = manifest.with_file(done.row, done.tensors).ordered(order)
                if len(waiting) >= shards_per_commit:
                    commit()
        except errors.Df11Error:
            if waiting:
                commit()  # These have been sent, and need not be sent again.
            raise
    if waiting:
        commit()
    return manifest


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _describe_done(plan: ModelPlan, done: Done) -> dict[str, Any]:
    return {
        "source": done.task.file.label,
        "target": plan.target.label,
        "file": done.task.name,
        "status": "converted" if done.task.kind == "convert" else "copied",
        "source_bytes": done.task.file.size,
        "source_sha256": done.row.source_sha256 if done.row else done.delivery.digest.sha256,
        "output_bytes": done.delivery.digest.size,
        "output_sha256": done.delivery.digest.sha256,
        "seconds": {step: round(seconds, 3) for step, seconds in done.seconds.items()},
    }


def _commit(
    plan: ModelPlan, deliveries: list[Delivery], files: Mapping[str, bytes], removed: list[str], summary: str, log: Log
) -> None:
    started = time.monotonic()
    commit = plan.target.commit(deliveries, files, removed, summary)
    names = [delivery.name for delivery in deliveries] + list(files)
    log(
        "commit",
        target=plan.target.label,
        commit=commit,
        files=names,
        removed=removed,
        seconds=round(time.monotonic() - started, 3),
    )


def _send_small_files(plan: ModelPlan, manifest: Manifest, log: Log) -> tuple[dict[str, Digest], int]:
    # Send those small files that the target does not hold yet: configurations first, the card last, all in one commit if they are not too many.
    # Returns the digests of all files that the target is to hold, and the number of those that were sent.
    held = plan.target.look()
    wanted: dict[str, Digest] = {row.file: Digest(row.bytes, row.sha256) for row in manifest.files}
    files: dict[str, bytes] = {}
    sent = 0

    def want(name: str, data: bytes) -> None:
        wanted[name] = Digest.of(data)
        if name not in held or not wanted[name].agrees(held[name]):
            files[name] = data

    for item in plan.items:
        if item.digest is not None:
            wanted[item.name] = item.digest
        if item.kind == "copy" and not item.is_task and not item.kept:
            if sum(map(len, files.values())) + item.file.size > TOGETHER:
                _commit(plan, [], files, [], f"Other files ({_short(plan)})", log)
                sent += len(files)
                files.clear()
            want(item.name, item.file.read_bytes())
    for item in plan.items:
        if item.kind == "index":
            want(item.name, read_index(item.file, SAFETENSORS, DF11))
    want(FILE_NAME, manifest.to_bytes())
    card = render(plan, manifest).encode()
    # Pictures come with the card, which names every hash: if it is the one that is there, so are they those of this manifest.
    known = Digest.of(card).agrees(held.get(CARD, _NOTHING)) and wanted[FILE_NAME].agrees(
        plan.held.get(FILE_NAME, _NOTHING)
    )
    if not known or not set(plot_paths(manifest).values()) <= held.keys():
        for name, picture in draw_plots(manifest).items():
            want(name, picture)
    want(CARD, card)
    removed = [name for name in plan.stale if name in held]
    if files or removed:
        _commit(plan, [], files, removed, f"Index, configuration and card ({_short(plan)})", log)
    return wanted, sent + len(files)


def _read_back(plan: ModelPlan, wanted: Mapping[str, Digest]) -> int:
    # Every file of this job is in the target, with the content that was sent.
    held = plan.target.look()
    for name, digest in wanted.items():
        there = held.get(name)
        agrees = None if there is None else digest.agrees(there)
        if there is not None and agrees is None:
            agrees = digest.agrees(Digest.of(plan.target.read(name)))
        if not agrees:
            raise errors.DifferenceError(
                "the target does not hold what was sent",
                file=f"{plan.target.label}/{name}",
                expected=digest,
                found=there or "nothing",
                hint="run the same command again",
            )
    return len(wanted)
