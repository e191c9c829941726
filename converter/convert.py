"""Convert a safetensors file or a tree of them to `.df11`: plan, skip what is finished, convert, copy the rest, report."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from df11.converter import manifest
from df11.converter.files import SourceFile, Tree, open_tree
from df11.converter.manifest import FileRow, TensorRow
from df11.converter.options import DEFAULT_MEMORY
from df11.converter.pipeline import Settings, convert_file
from df11.converter.plan import Cast
from df11.converter.source import Progress, Source, ignore
from df11.converter.tree import DF11, SAFETENSORS, FileJob, already_there, copy_file, plan_tree, read_index, write_index
from df11.formats import errors
from df11.formats.container import Container
from df11.formats.hub import is_address
from df11.formats.writer import AtomicWriter, make_parents

if TYPE_CHECKING:
    from df11.converter.hub import HubFile

MOST_THREADS: Final = 1024
"""More than any machine can make use of; each takes some memory before it does anything."""


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
    """Tensors that were cast from F32 to BF16."""
    exact_tensors: int
    """Those of them whose every value was a BF16 value already."""
    rows: tuple[TensorRow, ...] = field(default=(), repr=False)
    """Of the manifest, for a file that was converted."""

    def as_event(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rows"}


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What :func:`convert` did."""

    files: tuple[FileReport, ...]
    copied: int
    """Files that are no shards: index files rewritten, others copied."""
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
        """Output bytes for each source byte."""
        return self.output_bytes / self.source_bytes if self.source_bytes else 0.0


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    max_disk: int | str | None = None,
    cast: Cast = None,
    verify: bool = True,
    resume: bool = True,
    force: bool = False,
    dry_run: bool = False,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
    on_file: Callable[[FileReport], None] = ignore,
) -> ConversionReport:
    """Convert ``src``, a `.safetensors` file or a folder, to ``dst``, a file or a folder.

    ``src`` may be on the Hub: ``"hf://owner/name[@revision][/path]"``. The revision is looked up once; shards are read as they are converted, and
    each must have the SHA-256 that the Hub lists. With ``max_disk``, bytes or text, each is downloaded first, beside its output, and removed after.

    ``jobs``: encoding threads, by default one a core. ``max_memory``: bytes, or text such as ``"256MiB"``; of the whole process.
    ``cast="bf16"`` rounds F32 tensors to BF16. ``verify``: every segment is decoded and compared before it is written. ``resume``: a finished
    output of the same source and cast is kept (the source's SHA-256 decides). ``force``: replace whatever is there. ``dry_run``: write
    nothing. ``on_total`` and ``on_progress`` get bytes of source, ``on_file`` the report of each shard when it is done.
    A folder gets a manifest; see docs/manifest.md.

    Raises a :class:`~df11.formats.errors.Df11Error`. A file takes its name only when it is complete.
    """
    started = time.monotonic()
    if is_address(dst):
        raise errors.UsageError(
            "the target must be on this machine",
            file=str(dst),
            hint="for one on the Hub: df11 job run, or df11 hub push",
        )
    if cast not in (None, "bf16"):
        raise errors.UsageError("cast", expected="bf16", found=cast)
    if max_disk is not None and not is_address(src):
        raise errors.UsageError("--max-disk is for sources on the Hub", file=src, hint="leave it out")
    settings = Settings(thread_count(jobs), parse_size(max_memory), cast, verify)
    disk = None if max_disk is None else parse_size(max_disk)
    tree = open_tree(src)
    plan = plan_tree(tree, Path(dst), SAFETENSORS, DF11)
    shards = [job for job in plan if job.kind == "convert"]
    kept = (
        {}
        if dry_run or force or not resume
        else {job: report for job in shards if (report := _kept(job, cast)) is not None}
    )
    tensors = {}
    for job in shards:
        if job not in kept:
            if disk is not None and job.source.sha256 is not None and job.source.size > disk:
                raise errors.BudgetError(
                    "--max-disk is too small for this file",
                    file=job.source.label,
                    expected=f"at least {job.source.size} bytes",
                    found=disk,
                )
            with job.source.open() as source:  # Every header is checked before the first byte is written.
                tensors[job] = len(source.header.entries)
    if not tree.is_file and not dry_run:
        manifest.check_installed()  # Better found now than when all is done.
    indexes = {job: read_index(job.source, SAFETENSORS, DF11) for job in plan if job.kind == "index"}
    on_total(sum(job.source.size for job in shards))
    reports = []
    for job in shards:
        if job in kept:
            report = kept[job]
            on_progress(job.source.size)
        elif dry_run:
            report = FileReport(
                job.source.label, str(job.target), job.source.size, None, None, tensors[job], "planned", 0, 0
            )
        else:
            report = convert_shard(
                job.source,
                job.target,
                settings,
                resume=resume,
                force=force,
                download=disk is not None,
                on_progress=on_progress,
            )
        on_file(report)
        reports.append(report)
    others = [job for job in plan if job.kind != "convert"]
    for job in others:
        if dry_run:
            continue
        if job in indexes:
            write_index(job, indexes[job], force=force)
        else:
            copy_file(job, force=force)
    if not tree.is_file and not dry_run:
        _write_manifest(tree, Path(dst), shards, reports, settings)
    return ConversionReport(tuple(reports), len(others), time.monotonic() - started)


def _write_manifest(
    tree: Tree, folder: Path, shards: Sequence[FileJob], reports: Sequence[FileReport], settings: Settings
) -> None:
    files = []
    for job, report in zip(shards, reports, strict=True):
        assert report.output_bytes is not None and report.source_sha256 is not None  # As this is no dry run.
        name = job.target.relative_to(folder).as_posix()
        row = FileRow(
            name, report.output_bytes, None, job.source.name.as_posix(), report.source_bytes, report.source_sha256
        )
        files.append((row, report.rows if report.status == "converted" else None))
    manifest.collect(folder, tree.origin, settings.cast, files, jobs=settings.jobs)


def convert_shard(
    file: SourceFile,
    target: Path,
    settings: Settings,
    *,
    resume: bool = True,
    force: bool = False,
    download: bool = False,
    on_progress: Progress = ignore,
) -> FileReport:
    """Convert one shard; options as of :func:`convert`, ``download``: to the disk first. ``file`` must have the SHA-256 that the Hub lists for it.

    Raises a :class:`~df11.formats.errors.Df11Error`. ``target`` takes its name only when it is complete and right.
    """
    if target.exists() and not force:
        report = _finished(file, target, settings.cast, on_progress) if resume else None
        if report is None:
            raise already_there(target)
        return report
    make_parents(target)
    with _source(file, target, download=download) as source, AtomicWriter(target) as writer:
        result = convert_file(source, writer, settings, on_progress)
        listed = _listed(file)
        if listed is not None and listed.sha256 != result.source_sha256:
            raise listed.differs(result.source_sha256)
        if target.exists() and not force:
            raise errors.ConflictError(
                "this file has appeared meanwhile", file=target, hint="run the same command again"
            )
        writer.commit()
        casts = sum(settings.cast is not None and entry.dtype == "F32" for entry in source.header.entries)
    return FileReport(
        file.label,
        str(target),
        result.source_bytes,
        result.output_bytes,
        result.source_sha256,
        result.tensors,
        "converted",
        casts,
        casts - len(result.inexact),
        result.rows,
    )


def _source(file: SourceFile, target: Path, *, download: bool) -> AbstractContextManager[Source]:
    listed = _listed(file) if download else None
    if listed is None:
        return file.open()
    from df11.converter.hub import downloaded

    return downloaded(listed, target)


def _listed(file: SourceFile) -> HubFile | None:
    # The file, if the Hub lists its hash. Local files have none: converting them does not import what speaks to the Hub.
    if file.sha256 is None:
        return None
    from df11.converter.hub import HubFile

    return file if isinstance(file, HubFile) else None


def _kept(job: FileJob, cast: Cast) -> FileReport | None:
    # The report of a finished output of a shard whose SHA-256 the Hub lists: nothing is fetched.
    return (
        _finished(job.source, job.target, cast, ignore)
        if job.source.sha256 is not None and job.target.exists()
        else None
    )


def _finished(file: SourceFile, target: Path, cast: Cast, progress: Progress) -> FileReport | None:
    # The report of a finished output of this source, or None. Only the SHA-256 can tell: the one that the Hub lists, or that of the bytes.
    try:
        with Container(target) as container:
            stored = container.source
            entries = container.source_header.entries
            infos = [container.info(name) for name in container.keys()]
            output_bytes = container.size
    except (errors.FormatError, errors.SafetensorsError):
        return None
    if not any(entry.dtype == "F32" for entry in entries):
        cast = None  # As it would be written: there is nothing to cast.
    if stored.bytes != file.size or stored.cast != cast:
        return None
    sha256 = file.sha256
    if sha256 is None:
        with file.open() as source:
            sha256 = source.sha256(progress)
    if stored.sha256 != sha256:
        return None
    casts = sum(info.exact is not None for info in infos)
    exact = sum(info.exact is True for info in infos)
    return FileReport(
        file.label, str(target), file.size, output_bytes, stored.sha256, len(infos), "skipped", casts, exact
    )


def thread_count(jobs: int | None) -> int:
    """``jobs`` if it is given, else the cores that this process may use."""
    if jobs is not None and not 1 <= jobs <= MOST_THREADS:
        raise errors.UsageError("--threads", expected=f"at least 1 and at most {MOST_THREADS}", found=jobs)
    return jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def parse_size(value: int | str) -> int:
    """Bytes of a size such as ``268435456``, ``"256MiB"`` or ``"2GB"``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", str(value).strip(), re.IGNORECASE)
    if not match:
        raise errors.UsageError("not a size", expected="such as 256MiB", found=value)
    number, unit, binary = match.groups()
    power = 0 if unit is None else "KMGT".index(unit.upper()) + 1
    return int(min(float(number), 1e15) * (1024 if binary else 1000) ** power)
