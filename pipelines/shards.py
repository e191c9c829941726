"""The work on one file of a job, in whatever process: convert or fetch it, verify what is on the disk, deliver it, forget it."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from df11.converter.convert import convert_shard
from df11.converter.files import SourceFile
from df11.converter.manifest import FileRow, TensorRow, scan
from df11.converter.pipeline import Settings
from df11.converter.source import Progress
from df11.converter.tree import DF11, SAFETENSORS
from df11.converter.verify import verify
from df11.formats import errors
from df11.formats.container import Container
from df11.formats.writer import AtomicWriter, make_parents
from df11.pipelines.target import Carrier, Delivery


@dataclass(frozen=True, slots=True)
class Task:
    """One file to bring to the target. Can be pickled.

    ``kind``: "convert" a shard; "copy" a file as it is; "container": a `.df11` file that is there already and is verified before it is copied.
    """

    kind: Literal["convert", "copy", "container"]
    file: SourceFile
    name: str
    """In the target."""
    folder: Path
    """Where the file is written: of a target on the Hub a folder for this task alone, which is removed in the end, else the target itself."""
    staged: bool
    """Which of the two."""
    settings: Settings
    carrier: Carrier
    replace: bool = False
    """Whether a container that is there is one of an earlier run, of another source."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished file on this machine's disk."""

    task: Task
    path: Path
    row: FileRow | None
    """Of a converted shard; without the SHA-256 of the container."""
    tensors: tuple[TensorRow, ...]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """A file that has been delivered. Can be pickled."""

    task: Task
    delivery: Delivery
    row: FileRow | None
    tensors: tuple[TensorRow, ...]
    seconds: dict[str, float]
    """Of each step: "convert" or "fetch", "verify", "deliver"."""


class _CopyWriter(AtomicWriter):
    # Tells of each piece; whoever is told can end it so.
    def __init__(self, path: Path, progress: Progress) -> None:
        self._progress = progress
        super().__init__(path)

    def write(self, data: object, offset: int | None = None) -> None:
        super().write(data, offset)
        self._progress(memoryview(data).nbytes)  # type: ignore[arg-type]


def produce(task: Task, progress: Progress) -> Staged:
    """Bring the file to the disk, and prove it there. ``progress`` gets bytes of source, or none. Raises a Df11Error; then nothing is left."""
    seconds: dict[str, float] = {}
    if task.kind == "container":
        return _prove_container(task, progress, seconds)
    path = task.folder / task.name
    started = time.monotonic()
    try:
        make_parents(path)
        if task.kind == "copy":
            with _CopyWriter(path, progress) as writer:
                task.file.copy_to(writer)
                writer.commit()
            return Staged(task, path, None, (), {"fetch": time.monotonic() - started})
        report = convert_shard(task.file, path, task.settings, force=task.replace, on_progress=progress)
        seconds["convert"] = time.monotonic() - started
        started = time.monotonic()
        if report.status == "converted":
            verify(path, jobs=task.settings.jobs, on_progress=lambda _: progress(0))
            tensors = report.rows
        else:  # What another run has finished; this decodes and checks everything, too.
            tensors = scan(path, task.name, jobs=task.settings.jobs, progress=lambda _: progress(0))
        seconds["verify"] = time.monotonic() - started
    except BaseException:
        discard(task)
        raise
    assert report.output_bytes is not None and report.source_sha256 is not None  # As it was not a dry run.
    row = FileRow(
        task.name, report.output_bytes, None, task.file.name.as_posix(), report.source_bytes, report.source_sha256
    )
    return Staged(task, path, row, tensors, seconds)


def deliver(staged: Staged) -> Done:
    """Bring a finished file to the target and remove it from the staging folder."""
    started = time.monotonic()
    try:
        delivery = staged.task.carrier.deliver(staged.path, staged.task.name)
    finally:
        discard(staged.task)
    seconds = staged.seconds | {"deliver": time.monotonic() - started}
    row = None if staged.row is None else _with_sha256(staged.row, delivery)
    return Done(staged.task, delivery, row, staged.tensors, seconds)


def discard(task: Task) -> None:
    """Remove what a task has in its staging folder."""
    if task.staged:
        shutil.rmtree(task.folder, ignore_errors=True)


def _prove_container(task: Task, progress: Progress, seconds: dict[str, float]) -> Staged:
    # A container of a local tree: everything in it is decoded and checked, and its rows come of that.
    started = time.monotonic()
    path = Path(task.file.label)
    tensors = scan(path, task.name, jobs=task.settings.jobs, progress=progress)
    seconds["verify"] = time.monotonic() - started
    with Container(path) as container:
        source = container.source
        name = task.name.removesuffix(DF11) + SAFETENSORS
        row = FileRow(task.name, container.size, None, name, source.bytes, source.sha256)
    return Staged(task, path, row, tensors, seconds)


def _with_sha256(row: FileRow, delivery: Delivery) -> FileRow:
    if delivery.digest.size != row.bytes:
        raise errors.ConflictError(
            "the file has changed before it was uploaded", file=row.file, expected=row.bytes, found=delivery.digest.size
        )
    return replace(row, sha256=delivery.digest.sha256)
