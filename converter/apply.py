"""Carry out a plan: file by file, then the small files and the manifest, in as many commits as requested.

The target and its manifest are the only record of what is done. So a run that was killed continues when run again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from df11.converter.engine import Engine, InTurn, Overlapping
from df11.converter.files import DF11
from df11.converter.manifest import FILE_NAME, TOOL, Manifest
from df11.converter.plan import Plan, Step
from df11.converter.settings import Settings
from df11.converter.source import Progress, ignore
from df11.converter.work import Done, Task
from df11.formats import errors
from df11.formats.container import Container
from df11.storage.atomic import ANY_MODE
from df11.storage.entry import Entry
from df11.storage.journal import Mark, append
from df11.storage.store import Put, Store, has_content

SMALL: Final = 1 << 20
"""Files up to this size are read into memory and go to a repository with the last commit. Each larger one is a task."""
TOGETHER: Final = 16 << 20
"""Bytes of small files held in memory until a commit."""
MANIFEST_EVERY: Final = 256 << 20
"""Bytes of finished files after which a folder gets a manifest again; later, an eighth of all. What it does not name
yet is in the journal: the next run only has to read it."""
COPIES_PER_COMMIT: Final = 64
COPIED_BYTES_PER_COMMIT: Final = 4 << 30
"""Copied files share commits: the Hub limits commits per hour."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that has been made."""

    names: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a plan."""

    manifest: Manifest | None
    """None if there is none: for a single file, and for what was restored or copied."""
    done: tuple[Done, ...]
    """The results of all steps that were carried out, in order."""
    written: Mapping[str, Entry]
    """All files that the target should hold, by name."""
    sent: int
    """Small files written by the last commits."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How files get to the target."""

    work: Path | None = None
    """Folder for files on their way to a repository."""
    disk: int | None = None
    """Bytes that these may take; None: as many as are free."""
    containers_per_commit: int | None = None
    """None: one commit at the end."""
    download: bool = False
    """Download shards to the disk first."""
    start: Callable[[], object] = lambda: None
    """Called before the first file is produced, if there is any."""
    last: Callable[[Manifest], Mapping[str, bytes]] = lambda _: {}
    """Files made from the manifest, such as the model card; they come last."""
    on_done: Callable[[Done], object] = ignore
    on_commit: Callable[[Commit], object] = ignore
    title: Callable[[str], str] = str
    """Returns the message of a commit, given what is in it."""


def apply_plan(
    plan: Plan,
    settings: Settings,
    delivery: Delivery = Delivery(),
    *,
    engine: Engine | None = None,
    progress: Progress = ignore,
) -> Outcome:
    """Do what a plan says. Raises a Df11Error; earlier commits stay, and the next run keeps them."""
    applied = _Applied(plan, settings, delivery, progress)
    steps = [step for step in plan.tasks if not applied.is_small(step)]
    _check_room(plan)
    two, one = staged_bytes(plan, steps)
    if engine is None:
        is_room = delivery.disk is None or two <= delivery.disk
        engine = Overlapping(ahead=is_room) if two else InTurn()
    with applied.alone(), plan.target.staging(delivery.work or Path(), one) as staging:
        folders = [None if staging is None else staging / f"{number:05}" for number in range(len(steps))]
        if steps or not plan.held:
            applied.begin()
            delivery.start()
        tasks = [
            Task.of(plan, step, folder, settings, download=delivery.download, journal=applied.journal_path)
            for step, folder in zip(steps, folders, strict=True)
        ]
        with closing(engine.run(tasks, progress)) as results:
            try:
                for _, done in results:
                    applied.add(done)
            except errors.Df11Error:
                applied.commit_waiting()  # These have been sent, and should not be sent again.
                raise
        applied.commit_waiting()
        return applied.finish()


def _check_room(plan: Plan) -> None:
    # A file that is replaced stays until its successor is complete.
    needed, free = sum(step.least for step in plan.tasks), plan.target.free_bytes()
    if free is not None and needed > free:
        raise errors.BudgetError(
            "not enough disk space",
            file=plan.target.label,
            expected=f"at least {needed:,} bytes",
            found=f"{free:,}",
            hint="free some, or choose another target",
        )


def staged_bytes(plan: Plan, steps: Sequence[Step]) -> tuple[int, int]:
    """Most bytes that finished files take while they wait for their upload: two at a time, and one at a time."""
    sizes = [plan.target.staged_bytes(step.most) for step in steps]
    one = max(sizes, default=0)
    return max((a + b for a, b in itertools.pairwise(sizes)), default=one), one


@dataclass
class _Applied:
    # What has been done of a plan
    plan: Plan
    settings: Settings
    delivery: Delivery
    progress: Progress
    done: list[Done] = field(default_factory=list)
    waiting: list[Done] = field(default_factory=list)
    unnamed: int = 0
    """Bytes of finished files that no manifest names yet."""
    is_done: bool = False

    def __post_init__(self) -> None:
        plan = self.plan
        self.journal = None if plan.source.is_file else plan.target.journal()
        # A copy of a repository has the manifest among its files.
        is_made = plan.action == "convert" or (plan.action == "copy" and plan.target.versioned)
        self.has_manifest = is_made and not plan.source.is_file
        self.order = [step.name for step in plan.steps if step.name.endswith(DF11)]
        renamed = tuple(sorted(plan.renamed.items()))
        self.manifest = dataclasses.replace(
            plan.manifest, origin=plan.origin, cast=plan.options.cast, tool=TOOL, renamed=renamed
        )
        # What is still to be replaced or removed is named until that has been done: the next run must know it.
        self.files = self.manifest.by_file()
        for step in plan.steps:
            if (
                step.kept and step.original is not None and step.name in self.files
            ):  # A shard may have got another name.
                row, tensors = self.files[step.name]
                self.files[step.name] = (dataclasses.replace(row, source_file=step.original), tensors)
        self.others = dict(self.manifest.others)
        self.named = sum(row.bytes for row in self.manifest.files)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this run writes to a folder, no other one does."""
        try:
            if self.journal is not None and self.journal.is_there:
                self.begin()
            yield
        finally:
            if self.journal is not None:
                self.journal.close(is_done=self.is_done)

    def begin(self) -> None:
        """From now on the target changes. Raises ConflictError if it is another one than was planned for."""
        plan = self.plan
        if self.journal is None or self.journal.is_open:
            return
        self.journal.open()
        if plan.target.stamp(plan.stamp) != plan.stamp:
            what = "somebody else has changed this folder in the meantime"
            raise errors.ConflictError(what, file=plan.target.label, hint="run the same command again")
        # The next run has to know what is to go, even if the manifest that names it has been replaced.
        stale = [_mark_there(plan.target, name) for name in plan.stale]
        self.journal.begin(plan.run, [*stale, *(Mark.begun(step.name) for step in plan.steps if not step.kept)])

    @property
    def journal_path(self) -> Path | None:
        """Where tasks note which file is about to take its name."""
        return None if self.journal is None else self.journal.path

    def is_small(self, step: Step) -> bool:
        """Whether a file comes with the last of several commits."""
        return self.delivery.containers_per_commit is not None and step.kind == "copy" and step.entry.size <= SMALL

    def add(self, done: Done) -> None:
        """Record the result of a task, and commit if it is time to."""
        self.done.append(done)
        self.waiting.append(done)
        self.delivery.on_done(done)
        if done.row is not None and self.has_manifest:
            self.files[done.row.file] = (done.row, done.tensors)
        elif done.entry.sha256 is not None:
            self.others[done.step.name] = done.entry.sha256
        self.unnamed += done.entry.size
        if self.delivery.containers_per_commit is not None and self._is_due(self.delivery.containers_per_commit):
            self.commit_waiting()

    def _is_due(self, containers: int) -> bool:
        if not self.plan.target.versioned:
            return self.unnamed >= max(MANIFEST_EVERY, self.named // 8)
        copies = [done.entry.size for done in self.waiting if done.row is None]
        return (
            len(self.waiting) - len(copies) >= containers
            or len(copies) >= COPIES_PER_COMMIT
            or sum(copies) >= COPIED_BYTES_PER_COMMIT
        )

    def commit_waiting(self) -> None:
        """Make the delivered files visible, together with the manifest so far."""
        if not self.waiting or self.delivery.containers_per_commit is None:
            return
        names = [done.step.name for done in self.waiting]
        puts = [done.put for done in self.waiting if done.put is not None]
        if any(done.row for done in self.waiting) and self.has_manifest:
            manifest = self.manifest.holding(self.files.values())
            manifest = dataclasses.replace(manifest, others=tuple(sorted(self.others.items())))
            puts.append(self.plan.target.put(FILE_NAME, _manifest_bytes(manifest)))
        self.waiting.clear()
        self.named, self.unnamed = self.named + self.unnamed, 0
        self._commit(puts, (), names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more")

    def _commit(self, puts: Sequence[Put], removed: Sequence[str], what: str) -> None:
        if self.journal is not None:
            self.begin()
            for name in removed:
                self.plan.target.check_stamp(name, self.plan.stamp.get(name))
            if marks := [_mark_of(put.entry) for put in puts if put.payload and put.entry.name != FILE_NAME]:
                append(self.journal.path, marks)
        self.plan.target.commit(puts, removed, self.delivery.title(what))
        self.delivery.on_commit(Commit(tuple(put.entry.name for put in puts), tuple(removed)))

    def finish(self) -> Outcome:
        """Send the small files that the target does not hold yet. The manifest and what is made from it come last."""
        plan, target = self.plan, self.plan.target
        sent: dict[str, Entry] = {}
        files: dict[str, bytes] = {}
        modes: dict[str, int] = {}
        for step in plan.tasks:
            if self.is_small(step):
                if sum(map(len, files.values())) + step.entry.size > TOGETHER:
                    self._commit(
                        [target.put(name, data, mode=modes[name]) for name, data in files.items()], (), "Other files"
                    )
                    files.clear()
                files[step.name] = plan.source.read(step.entry)
                self.progress(step.entry.size)
                modes[step.name] = plan.source.mode(step.entry)
                sent[step.name] = Entry.of(step.name, files[step.name])
        for step in plan.steps:
            if step.data is not None and not step.kept:
                files[step.name], modes[step.name] = step.data, plan.source.mode(step.entry)
                sent[step.name] = Entry.of(step.name, step.data)
        names = [*self.order, *plan.left_out]
        manifest = self.manifest.holding(self.files[name] for name in names if name in self.files)
        written = self._written(manifest) | sent
        if self.has_manifest:
            last = dict(self.delivery.last(manifest))
            written |= {name: Entry.of(name, data) for name, data in last.items()}
            manifest = dataclasses.replace(manifest, others=self._others(written))
            last[FILE_NAME] = _manifest_bytes(manifest)  # After what it names.
            written[FILE_NAME] = Entry.of(FILE_NAME, last[FILE_NAME])
            held = target.find(last)
            files |= {
                name: data
                for name, data in last.items()
                if name not in held or not has_content(target, held[name], written[name])
            }
            sent |= {name: written[name] for name in files}
        for name in files:
            plan.check_free(name)  # Somebody may have put a file there since.
        held = target.find(plan.stale)
        removed = [name for name in plan.stale if name in held]
        puts = [done.put for done in self.waiting if done.put is not None]
        puts += [target.put(name, data, mode=modes.get(name, ANY_MODE)) for name, data in files.items()]
        target.clean([*plan.stale, *plan.begun, *(step.name for step in plan.steps)])
        if puts or removed:
            self._commit(puts, removed, "Index, configuration and model card")
        self.is_done = True
        return Outcome(manifest if self.has_manifest else None, tuple(self.done), written, len(sent))

    def _written(self, manifest: Manifest) -> dict[str, Entry]:
        # All that the target should hold, except what is made from the manifest.
        found = {step.name: _kept_entry(step, self.plan.held[step.name]) for step in self.plan.steps if step.kept}
        found |= {row.file: Entry(row.file, row.bytes, row.sha256) for row in manifest.files}
        return found | {done.step.name: done.entry for done in self.done}

    def _others(self, written: Mapping[str, Entry]) -> tuple[tuple[str, str], ...]:
        target = self.plan.target
        found = {name: sha256 for name, sha256 in self.others.items() if name not in self.plan.stale}
        for name, entry in written.items():
            if name.endswith(DF11) or name == FILE_NAME:
                continue
            if entry.sha256 is None and target.versioned and name in found:
                continue  # A repository lists another hash for files outside LFS.
            sha256 = entry.sha256 or target.hashed(entry).sha256 or Entry.of(name, target.read(entry)).sha256
            assert sha256 is not None
            found[name] = sha256
        return tuple(sorted(found.items()))


def _kept_entry(step: Step, there: Entry) -> Entry:
    # With the SHA-256 that a folder does not list: that of the wanted file, which is known in most cases.
    if there.sha256 is not None or step.kind not in ("copy", "write"):
        return there
    wanted = step.source_sha256 or step.entry.sha256 if step.data is None else Entry.of(step.name, step.data).sha256
    return dataclasses.replace(there, sha256=wanted)


def _mark_of(entry: Entry) -> Mark:
    assert entry.sha256 is not None
    return Mark(entry.name, entry.size, entry.sha256, "content")


def _mark_there(target: Store, name: str) -> Mark:
    if not name.endswith(DF11):
        return _mark_of(target.hashed(target.entry(name)))
    with Container(target.locate(name)) as container:
        return Mark(name, container.size, container.source.sha256, "source")


def _manifest_bytes(manifest: Manifest) -> bytes:
    from df11.converter import parquet  # It imports pyarrow, whose memory a conversion may need first.

    return parquet.to_bytes(manifest)
