"""Convert a safetensors file or a model folder to `.df11`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from df11.converter.apply import Delivery, apply_plan
from df11.converter.cast import Cast, expand
from df11.converter.dfloat11.recognise import decoded
from df11.converter.files import is_shard
from df11.converter.manifest import TensorRow
from df11.converter.options import DEFAULT_MEMORY
from df11.converter.pipeline import PARQUET_MEMORY
from df11.converter.plan import Options, Plan, Step
from df11.converter.planning import make_plan
from df11.converter.scan import check_installed
from df11.converter.settings import Settings, parse_size, thread_count, too_little_memory
from df11.converter.source import Progress, ignore
from df11.converter.work import Done
from df11.formats import errors
from df11.formats.container import Container, TensorInfo
from df11.formats.layout import KINDS
from df11.storage.address import is_address
from df11.storage.local import LocalStore
from df11.storage.paths import kind_of, same
from df11.storage.store import Store, open_source

log: Final = logging.getLogger("df11")


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of one shard. ``output_bytes`` and ``source_sha256`` are None in a dry run."""

    source: str
    output: str
    source_bytes: int
    output_bytes: int | None
    source_sha256: str | None
    tensors: int
    status: Literal["converted", "skipped", "planned"]
    cast_tensors: int
    """F32 tensors that are stored as BF16."""
    exact_tensors: int
    """Those whose values were all BF16 values already, so that nothing is lost."""
    f32_tensors: int
    """Compressed tensors that are stored as F32."""


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What :func:`convert` did."""

    files: tuple[FileReport, ...]
    copied: int
    """Files other than shards: index files rewritten, others copied."""
    seconds: float

    @property
    def source_bytes(self) -> int:
        """Bytes of all source shards."""
        return sum(file.source_bytes for file in self.files)

    @property
    def output_bytes(self) -> int:
        """Bytes of all containers."""
        return sum(file.output_bytes or 0 for file in self.files)

    @property
    def ratio(self) -> float:
        """Output bytes per source byte."""
        return self.output_bytes / self.source_bytes if self.source_bytes else 0.0


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    threads: int | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    max_disk: int | str | None = None,
    cast: Cast = None,
    keep_f32: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: bool = False,
    shapes: str | os.PathLike[str] | None = None,
    verify: bool = True,
    resume: bool = True,
    force: bool = False,
    dry_run: bool = False,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
    on_file: Callable[[FileReport], None] = ignore,
) -> ConversionReport:
    """Convert ``src``, a `.safetensors` file or a model folder, to ``dst``, a file or a folder.

    ``src`` may be on the Hub: ``"hf://owner/name[@revision][/path]"``. The revision is resolved once. Shards are read
    while they are converted, and each must have the SHA-256 that the Hub lists. With ``max_disk``, in bytes or as text,
    each is downloaded first, beside its output, and removed afterwards. A DFloat11 checkpoint becomes the model that it
    decodes to; ``shapes`` names the original model, if nothing else tells the shapes of its tensors.

    ``threads``: encoder threads, by default one per core. ``max_memory``: of the whole process, in bytes or as text
    such as ``"256MiB"``. An F32 tensor of BF16 values alone is stored as BF16, which loses nothing. ``cast="bf16"``
    rounds all F32 tensors to BF16, except those with a name that matches ``keep_f32``: glob patterns, or names of
    presets (``df11.converter.cast.PRESETS``). ``include`` and ``exclude``: glob patterns of files, as in the Hub's
    client. ``allow_missing``: continue although an index names a shard that does not exist.
    ``verify``: decode and compare every segment before it is written. ``resume``: keep a finished output of the same
    source and cast; the source's SHA-256 decides. ``force``: replace files that df11 did not write. ``dry_run``: write
    nothing. ``on_total`` and ``on_progress`` get bytes of source, ``on_file`` the report of each shard when it is done.
    A folder gets a manifest; see docs/manifest.md. Anything odd about a source is logged as a warning of the logger
    ``df11``.

    Raises a :class:`~df11.formats.errors.Df11Error`. A file takes its name only when it is complete.
    """
    started = time.monotonic()
    if is_address(dst):
        hint = "for one on the Hub: df11 job run, or df11 hub push"
        raise errors.UsageError("the target must be on this machine", file=str(dst), hint=hint)
    if cast not in (None, "bf16"):
        raise errors.UsageError("cast", expected="bf16", found=cast)
    if max_disk is not None and not is_address(src):
        raise errors.UsageError("--max-disk is for sources on the Hub", file=src, hint="leave it out")
    if keep_f32 and cast is None:
        raise errors.UsageError("--keep-f32 is for --cast bf16", hint="leave it out: without a cast, F32 loses nothing")
    keep = expand(keep_f32)
    settings = Settings(thread_count(threads), parse_size(max_memory), cast, verify, keep)
    source = open_source(src)
    source.list()
    source = decoded(source, shapes=shapes, max_memory=settings.max_memory)
    target, name = open_target(source, Path(dst))
    if not source.is_file and not dry_run:
        check_installed()  # Better now than at the end.
    options = Options(
        cast, tuple(include), tuple(exclude), allow_missing, force, resume, max_memory=settings.max_memory, keep=keep
    )
    plan = make_plan(source, target, "convert", options, name=name, on_total=on_total, on_progress=on_progress)
    _check_budgets(plan, settings, None if max_disk is None else parse_size(max_disk))
    shards = [step for step in plan.steps if step.kind in ("convert", "prove")]
    others = len(plan.steps) - len(shards)
    reports = {step.name: _kept(plan, step) for step in shards if step.kept}
    for step in shards:
        if step.kept:
            on_file(reports[step.name])
    if kept := sum(step.entry.size for step in plan.steps if step.kept and step.kind != "write" and not step.counted):
        on_progress(kept)
    if dry_run:
        for step in shards:
            if not step.kept:
                reports[step.name] = _planned(plan, step)
                on_file(reports[step.name])
    else:

        def report(done: Done) -> None:
            if done.row is not None:
                reports[done.step.name] = _report(plan, done)
                on_file(reports[done.step.name])

        # The manifest now and then, so that the next run need not read all that this one has made; if there is memory.
        less = dataclasses.replace(settings, max_memory=settings.max_memory - PARQUET_MEMORY)
        is_room = not source.is_file and max(step.memory for step in plan.steps) <= less.max_memory
        delivery = Delivery(containers_per_commit=1 if is_room else None, download=max_disk is not None, on_done=report)
        outcome = apply_plan(plan, less if is_room else settings, delivery, progress=on_progress)
        rows = outcome.manifest.tensors if outcome.manifest else [row for done in outcome.done for row in done.tensors]
        tell_if_nothing_is_compressed(plan, rows)
    return ConversionReport(tuple(reports[step.name] for step in shards), others, time.monotonic() - started)


def open_target(source: Store, path: Path) -> tuple[LocalStore, str | None]:
    """The folder that a target path stands for, and, if the source is a file, the name of the target file."""
    if not source.is_file:
        if kind_of(path) not in (None, "folder"):
            raise errors.UsageError("the target is a file, but the source is a folder", file=path, hint="name a folder")
        return LocalStore(path), None
    if kind_of(path) == "folder":
        raise errors.UsageError("the target is a folder, but the source is a file", file=path, hint="name a file")
    if isinstance(source, LocalStore) and same(path, source.root / source.name):
        raise errors.UsageError("source and target are the same file", file=path)
    if not path.name:
        raise errors.UsageError("this cannot be the name of a file", file=repr(str(path)), hint="name the target")
    if kind_of(path.parent) not in (None, "folder"):
        raise errors.UsageError("this is a file, not a folder", file=path.parent, hint="choose another target")
    return LocalStore(path.parent), path.name


def _check_budgets(plan: Plan, settings: Settings, disk: int | None) -> None:
    for step in plan.tasks:
        if step.memory > settings.max_memory:
            raise too_little_memory(plan.locate(step), step.memory, settings.max_memory)
        if disk is not None and step.kind == "convert" and step.entry.sha256 is not None and step.entry.size > disk:
            raise errors.BudgetError(
                "--max-disk is too small for this file",
                file=plan.locate(step),
                expected=f"at least {step.entry.size} bytes",
                found=disk,
            )


def _kept(plan: Plan, step: Step) -> FileReport:
    with Container(plan.target.locate(step.name)) as container:
        infos = [container.info(name) for name in container.keys()]
        size, sha256 = container.size, container.source.sha256
    output, counts = plan.target.locate(step.name), _counts(infos)
    return FileReport(plan.locate(step), output, step.entry.size, size, sha256, len(infos), "skipped", *counts)


def _planned(plan: Plan, step: Step) -> FileReport:
    output = plan.target.locate(step.name)
    return FileReport(plan.locate(step), output, step.entry.size, None, None, step.tensors, "planned", 0, 0, 0)


def _report(plan: Plan, done: Done) -> FileReport:
    assert done.row is not None
    return FileReport(
        plan.locate(done.step),
        plan.target.locate(done.step.name),
        done.step.entry.size,
        done.row.bytes,
        done.row.source_sha256,
        len(done.tensors),
        "converted" if done.step.kind == "convert" else "skipped",
        *_counts(done.tensors),
    )


def _counts(tensors: Collection[TensorInfo | TensorRow]) -> tuple[int, int, int]:
    # The last three members of a report.
    casts = sum(tensor.exact is not None for tensor in tensors)
    exact = sum(tensor.exact is True for tensor in tensors)
    return casts, exact, sum((tensor.encoding, tensor.dtype) == ("df11", "F32") for tensor in tensors)


def tell_if_nothing_is_compressed(plan: Plan, rows: Sequence[TensorRow]) -> None:
    """Warn, with the reason, if no tensor has become smaller."""
    if any(row.encoding == "df11" for row in rows) or any(step.kept for step in plan.steps if step.kind == "convert"):
        return
    dtypes = Counter(row.dtype for row in rows)
    found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items(), key=lambda item: -item[1]))
    why = f"its tensors are {found}" if dtypes else "its shards have no tensors"
    if not any(is_shard(step.entry.name) for step in plan.steps) and not dtypes:
        why = "it holds only adapters, which peft and diffusers read themselves"
    elif not KINDS.keys().isdisjoint(dtypes):
        why += ", which are too small or have too many different exponents"
    elif dtypes:
        why += f", and only {', '.join(KINDS)} are compressed"
    hint = "; --cast bf16 would round F32 to it" if "F32" in dtypes and plan.options.cast is None else ""
    log.warning("%s: nothing was compressed: %s%s", plan.source.label, why, hint)
