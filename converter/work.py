"""The work on one file, in any process: convert, restore, fetch or prove it, then bring it to its store."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from df11.converter.compare import already_there
from df11.converter.files import DF11
from df11.converter.manifest import FileRow, TensorRow
from df11.converter.pipeline import convert_file
from df11.converter.plan import Plan, Step
from df11.converter.restore_file import restore_file, restored_layout
from df11.converter.scan import scan
from df11.converter.settings import Settings
from df11.converter.source import Progress, Source
from df11.converter.verify import verify, verify_container
from df11.formats import errors
from df11.formats.container import Container
from df11.storage.atomic import AtomicWriter, open_folder
from df11.storage.entry import Entry
from df11.storage.file import File
from df11.storage.journal import Mark, append
from df11.storage.store import Put, Store


@dataclass(frozen=True, slots=True)
class Task:
    """A step to carry out. Can be pickled."""

    step: Step
    source: Store
    target: Store
    staging: Path | None
    """A folder for this task alone, removed at the end, from which its file is uploaded; None for files written in
    place."""
    settings: Settings
    bf16: bool = False
    prove: bool = False
    """Verify a container, and compute its hash, again from the disk."""
    force: bool = False
    """Whether whatever file is there may be replaced."""
    stamp: object = None
    """Of the file that the target had under this name when the work was planned."""
    download: bool = False
    """Download the shard to the disk first, beside its output."""
    journal: Path | None = None
    """Where it is noted which file is about to take its name."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        step: Step,
        staging: Path | None,
        settings: Settings,
        *,
        download: bool = False,
        journal: Path | None = None,
    ) -> Task:
        """The task of a step."""
        options = plan.options
        return cls(
            step,
            plan.source,
            plan.target,
            staging,
            settings,
            options.bf16,
            options.prove,
            options.force,
            plan.stamp.get(step.name),
            download,
            journal,
        )

    @property
    def label(self) -> str:
        """The file's name in messages."""
        return self.source.locate(self.step.entry.name)


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a task. Can be pickled."""

    step: Step
    path: Path
    """Where the file is, or was before its upload."""
    entry: Entry
    """The entry of the file in the target."""
    row: FileRow | None = None
    """Of a container."""
    tensors: tuple[TensorRow, ...] = ()
    put: Put | None = None
    """None until it has been delivered."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds for each part of the work: ``convert``, ``restore``, ``fetch``, ``verify``, ``deliver``."""


def produce(task: Task, progress: Progress) -> Done:
    """Bring the file to the disk and prove it there. ``progress`` gets bytes of source.

    Raises a Df11Error; then nothing is left behind.
    """
    work = {"convert": _convert, "restore": _restore, "copy": _copy, "prove": _prove}[task.step.kind]
    try:
        return work(task, progress)
    except BaseException:
        discard(task)
        raise


def deliver(task: Task, done: Done) -> Done:
    """Bring a finished file to the target and remove it from its staging folder."""
    started = time.monotonic()
    try:
        put = task.target.put(task.step.name, done.path)
        if task.prove and not put.entry.is_hashed:
            put = dataclasses.replace(put, entry=task.target.hashed(put.entry))
    finally:
        discard(task)
    row = done.row
    if put.entry.same_content(done.entry) is False:
        what = "the file changed before it was uploaded"
        raise errors.ConflictError(what, file=task.label, hint="run the same command again")
    if row is not None:
        row = dataclasses.replace(row, sha256=put.entry.sha256)
    entry = put.entry if put.entry.is_hashed else done.entry
    seconds = done.seconds | {"deliver": time.monotonic() - started}
    return dataclasses.replace(done, entry=entry, row=row, put=put, seconds=seconds)


def discard(task: Task) -> None:
    """Remove a task's files from its staging folder."""
    if task.staging is not None:
        import shutil  # It imports every kind of archive, which takes as long as a small conversion.

        # Whoever exchanges a folder on the way for a link must not have it removed where that leads.
        with contextlib.suppress(errors.Df11Error):
            place = open_folder(task.staging.parent, task.staging.parents[1])
            try:
                shutil.rmtree(task.staging.name, ignore_errors=True, dir_fd=place)
            finally:
                os.close(place)


def _convert(task: Task, progress: Progress) -> Done:
    step, (root, path) = task.step, _place(task)
    mode = task.source.mode(step.entry)
    started = time.monotonic()
    limit = task.settings.max_memory
    with (
        _opened(task, path, root) as file,
        Source(file, max_memory=limit) as source,
        AtomicWriter(path, root=root, mode=mode) as writer,
    ):
        result = convert_file(source, writer, task.settings, _once(step, progress))
        if step.entry.sha256 not in (None, result.source_sha256):
            raise step.entry.differs(result.source_sha256, task.label)
        if step.source_sha256 not in (None, result.source_sha256):
            raise source.changed()
        _commit(task, writer, Mark(step.name, result.output_bytes, result.source_sha256, "source"))
    seconds = {"convert": time.monotonic() - started}
    if task.prove:
        started = time.monotonic()
        verify(path, threads=task.settings.threads, on_progress=lambda _: progress(0))
        seconds["verify"] = time.monotonic() - started
    row = FileRow(
        step.name,
        result.output_bytes,
        None,
        step.original or step.entry.name,
        result.source_bytes,
        result.source_sha256,
        result.made_from,
    )
    rows = tuple(dataclasses.replace(row, file=step.name) for row in result.rows)
    return Done(step, path, Entry(step.name, result.output_bytes), row, rows, seconds=seconds)


@contextmanager
def _opened(task: Task, path: Path, root: Path) -> Iterator[File]:
    entry = task.step.entry
    with _open(task, path, root) as file:
        if file.size != entry.size:
            raise file.changed()
        yield file


def _open(task: Task, path: Path, root: Path) -> AbstractContextManager[File]:
    if not (task.download and task.step.entry.sha256):
        return task.source.open(task.step.entry)
    from df11.storage.download import downloaded  # Which imports what speaks to the Hub.

    return downloaded(task.source, task.step.entry, path, root)


def _restore(task: Task, progress: Progress) -> Done:
    step, (root, path) = task.step, _place(task)
    started = time.monotonic()
    where = task.source.locate(step.entry.name)
    with Container(where) as container:
        target = restored_layout(container, bf16=task.bf16)
        if target.sha256 != step.source_sha256:
            hint = "run the same command again"
            raise errors.ConflictError("this file has changed since the run began", file=where, hint=hint)
        with AtomicWriter(path, root=root, mode=task.source.mode(step.entry)) as writer:
            sha256 = restore_file(container, target, writer.write, task.settings.threads, progress)
            entry = Entry(step.name, target.size, sha256)
            there = task.target.find([step.name]).get(step.name)
            same = there is not None and bool(entry.same_content(task.target.hashed(there)))
            if not same:
                _commit(task, writer, Mark(step.name, target.size, sha256, "content"))
    return Done(dataclasses.replace(step, kept=same), path, entry, seconds={"restore": time.monotonic() - started})


def _copy(task: Task, progress: Progress) -> Done:
    step, (root, path) = task.step, _place(task)
    mode = task.source.mode(step.entry)
    started = time.monotonic()
    with _opened(task, path, root) as file, AtomicWriter(path, root=root, mode=mode) as writer:

        def chunks() -> Iterator[object]:
            for chunk in file.chunks():
                writer.write(chunk)
                progress(len(chunk))
                yield chunk

        found = Entry.of_chunks(step.name, file.size, chunks())
        if step.entry.is_hashed:
            step.entry.check(found, task.label)
        file.check_unchanged()
        if step.name.endswith(DF11):  # A damaged container does not get its name: nobody would look at it again.
            _verify_partial(writer, task, progress)
        assert found.sha256 is not None
        _commit(task, writer, Mark(step.name, found.size, found.sha256, "content"))
    return Done(step, path, found, seconds={"fetch": time.monotonic() - started})


def _verify_partial(writer: AtomicWriter, task: Task, progress: Progress) -> None:
    try:
        verify(writer.partial, threads=task.settings.threads, on_progress=_quiet(progress))
    except errors.Df11Error as error:
        error.file = str(writer.path)
        raise


def _prove(task: Task, progress: Progress) -> Done:
    # A container already on a disk: its whole content is decoded and checked, which also yields its rows. One that is
    # to be kept must hold the source, whatever it says of itself.
    step = task.step
    started = time.monotonic()
    from_source = step.name == step.entry.name
    store = task.source if from_source else task.target
    path = Path(store.locate(step.name))
    hashed = store.hashed(store.entry(step.name)) if from_source else None
    told = progress if from_source else _quiet(progress)
    try:
        if not from_source:
            _prove_kept(path, task, told)
        tensors = scan(path, step.name, threads=task.settings.threads, progress=told)
    except (errors.FormatError, errors.DifferenceError):
        if from_source:
            raise
        return _convert(dataclasses.replace(task, step=dataclasses.replace(step, kind="convert")), progress)
    if not from_source:
        _once(step, progress)(step.entry.size)
    with Container(path) as container:
        source, size, made_from = container.source, container.size, container.made_from
    name = step.original or step.entry.name
    row = FileRow(step.name, size, None, name, source.bytes, source.sha256, made_from)
    seconds = {"verify": time.monotonic() - started}
    return Done(step, path, hashed or Entry(step.name, size), row, tensors, seconds=seconds)


def _prove_kept(path: Path, task: Task, progress: Progress) -> None:
    with ExitStack() as stack:
        container = stack.enter_context(Container(path))
        source = None
        if task.source.address is None:
            file = task.source.open(task.step.entry)
            source = stack.enter_context(Source(file, max_memory=task.settings.max_memory))
        verify_container(container, source, task.settings.threads, progress)


def _place(task: Task) -> tuple[Path, Path]:
    return task.target.place(task.step.name, task.staging)


def _commit(task: Task, writer: AtomicWriter, mark: Mark) -> None:
    def check() -> None:
        if task.force:
            return
        task.target.check_stamp(task.step.name, task.stamp)
        if task.stamp is not None and not task.step.there:
            raise already_there(str(writer.path))

    check()
    if task.journal is not None:
        append(task.journal, [mark])
    writer.commit(check)  # Again, as much time may have passed until the bytes were on the disk.


def _once(step: Step, progress: Progress) -> Progress:
    # Progress that was already counted becomes calls with zero bytes.
    return _quiet(progress) if step.counted else progress


def _quiet(progress: Progress) -> Progress:
    return lambda _: progress(0)
