"""Convert a safetensors file or a tree of them to `.df11`: plan, skip what is finished, convert, copy the rest, report."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from df11.converter.pipeline import Settings, convert_file
from df11.converter.plan import Cast
from df11.converter.source import Progress, Source, ignore
from df11.converter.tree import DF11, SAFETENSORS, FileJob, already_there, copy_file, plan_tree, read_index, write_index
from df11.formats import errors
from df11.formats.container import Container
from df11.formats.writer import AtomicWriter, make_parents

DEFAULT_MEMORY: Final = "256MiB"


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

    ``jobs``: encoding threads, by default one a core. ``max_memory``: bytes, or text such as ``"256MiB"``; of the whole process.
    ``cast="bf16"`` rounds F32 tensors to BF16. ``verify``: every segment is decoded and compared before it is written. ``resume``: a finished
    output of the same source and cast is kept (the source's SHA-256 decides). ``force``: replace whatever is there. ``dry_run``: write
    nothing. ``on_total`` and ``on_progress`` get bytes of source, ``on_file`` the report of each shard when it is done.

    Raises a :class:`~df11.formats.errors.Df11Error`. A file takes its name only when it is complete.
    """
    started = time.monotonic()
    if str(src).startswith("hf://"):
        raise errors.UsageError(
            "this version reads local files only", file=str(src), hint="download it first: hf download OWNER/NAME --local-dir DIR"
        )
    if cast not in (None, "bf16"):
        raise errors.UsageError("cast", expected="bf16", found=cast)
    threads = thread_count(jobs)
    memory = parse_size(max_memory)
    plan = plan_tree(Path(src), Path(dst), SAFETENSORS, DF11)
    shards = [job for job in plan if job.kind == "convert"]
    sizes = {}
    for job in shards:
        with Source(job.source) as source:  # Every header is checked before the first byte is written.
            sizes[job] = (source.size, len(source.header.entries))
    for job in plan:
        if job.kind == "index":
            read_index(job, SAFETENSORS, DF11)
    on_total(sum(size for size, _ in sizes.values()))
    reports = []
    for job in shards:
        if dry_run:
            size, tensors = sizes[job]
            report = FileReport(str(job.source), str(job.target), size, None, None, tensors, "planned", 0, 0)
        else:
            report = _convert_shard(job, threads, memory, cast, verify, resume, force, on_progress)
        on_file(report)
        reports.append(report)
    others = [job for job in plan if job.kind != "convert"]
    for job in others:
        if dry_run:
            continue
        if job.kind == "index":
            write_index(job, SAFETENSORS, DF11, force=force)
        else:
            copy_file(job, force=force)
    return ConversionReport(tuple(reports), len(others), time.monotonic() - started)


def _convert_shard(job: FileJob, jobs: int, memory: int, cast: Cast, verify: bool, resume: bool, force: bool, progress: Progress) -> FileReport:
    with Source(job.source) as source:
        if job.target.exists() and not force:
            report = _finished(job, source, cast, progress) if resume else None
            if report is None:
                raise already_there(job.target)
            return report
        make_parents(job.target)
        with AtomicWriter(job.target) as writer:
            result = convert_file(source, writer, Settings(jobs, memory, cast, verify), progress)
            if job.target.exists() and not force:
                raise errors.ConflictError("this file has appeared meanwhile", file=job.target, hint="run the same command again")
            writer.commit()
        casts = sum(cast is not None and entry.dtype == "F32" for entry in source.header.entries)
        return FileReport(
            str(job.source),
            str(job.target),
            result.source_bytes,
            result.output_bytes,
            result.source_sha256,
            result.tensors,
            "converted",
            casts,
            casts - len(result.inexact),
        )


def _finished(job: FileJob, source: Source, cast: Cast, progress: Progress) -> FileReport | None:
    # The report of a finished output of this source, or None. Only the source's bytes can tell, so they are hashed.
    try:
        with Container(job.target) as container:
            stored = container.source
            infos = [container.info(name) for name in container.keys()]
            output_bytes = container.size
    except (errors.FormatError, errors.SafetensorsError):
        return None
    if not any(entry.dtype == "F32" for entry in source.header.entries):
        cast = None  # As it would be written: there is nothing to cast.
    if stored.bytes != source.size or stored.cast != cast or stored.sha256 != source.sha256(progress):
        return None
    casts = sum(info.exact is not None for info in infos)
    exact = sum(info.exact is True for info in infos)
    return FileReport(str(job.source), str(job.target), source.size, output_bytes, stored.sha256, len(infos), "skipped", casts, exact)


def thread_count(jobs: int | None) -> int:
    """``jobs`` if it is given, else the cores that this process may use."""
    if jobs is not None and jobs < 1:
        raise errors.UsageError("--jobs", expected="at least 1", found=jobs)
    return jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def parse_size(value: int | str) -> int:
    """Bytes of a size such as ``268435456``, ``"256MiB"`` or ``"2GB"``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", str(value).strip(), re.IGNORECASE)
    if not match:
        raise errors.UsageError("not a size", expected="such as 256MiB", found=value)
    number, unit, binary = match.groups()
    power = 0 if unit is None else "KMGT".index(unit.upper()) + 1
    return int(min(float(number), 1e15) * (1024 if binary else 1000) ** power)
