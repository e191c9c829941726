"""Write the source file or tree back, byte for byte, and prove it by its SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from df11.converter.convert import thread_count
from df11.converter.files import LocalTree
from df11.converter.ordered import ordered
from df11.converter.source import Progress, ignore
from df11.converter.tree import DF11, SAFETENSORS, FileJob, already_there, copy_file, plan_tree, read_index, write_index
from df11.formats import errors, framing
from df11.formats.container import Container
from df11.formats.record import Bytes, Record, Scratch, Weights
from df11.formats.writer import AtomicWriter, make_parents


@dataclass(frozen=True, slots=True)
class RestoredFile:
    """One shard that was written back. ``sha256`` is that of the file, and, unless ``bf16``, that of the source."""

    source: str
    output: str
    bytes: int
    sha256: str
    bf16: bool
    """Whether F32 tensors were written as BF16, because the cast had changed some of them."""
    status: Literal["restored", "skipped"]


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What :func:`restore` did."""

    files: tuple[RestoredFile, ...]
    copied: int


def restore(
    path: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    bf16: bool = False,
    force: bool = False,
    jobs: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> RestoreReport:
    """Write the source of a `.df11` file or tree to ``dst``; its SHA-256 must be the one of the source, or nothing is written.

    Where a cast has changed values the source cannot be written back: that is an error, or, with ``bf16``, a BF16 safetensors file is
    written instead. ``force`` replaces other files at the target. Progress is in bytes written.
    """
    threads = thread_count(jobs)
    plan = plan_tree(LocalTree(Path(path)), Path(dst), DF11, SAFETENSORS)
    shards = [job for job in plan if job.kind == "convert"]
    total = 0
    for job in shards:
        with Container(job.source.label) as container:
            total += _layout(container, bf16=bf16).size
    on_total(total)
    files = tuple(_restore_shard(job, bf16, force, threads, on_progress) for job in shards)
    others = [job for job in plan if job.kind != "convert"]
    for job in others:
        if job.kind == "index":
            write_index(job, read_index(job.source, DF11, SAFETENSORS), force=force)
        else:
            copy_file(job, force=force)
    return RestoreReport(files, len(others))


@dataclass(frozen=True, slots=True)
class _Layout:
    # The file to write: its header, its tensors in order, its size, and its SHA-256 if that is known.
    header: bytes
    entries: tuple[framing.Entry, ...]
    size: int
    sha256: str | None


def _layout(container: Container, *, bf16: bool) -> _Layout:
    source = container.source_header
    changed = [entry.name for entry in source.entries if container.info(entry.name).exact is False]
    if not changed:
        return _Layout(source.raw, source.entries, container.source.bytes, container.source.sha256)
    if not bf16:
        raise errors.UsageError(
            f"the source cannot be written back: rounding to BF16 has changed {len(changed)} of its {len(source.entries)} tensors",
            file=container.path,
            tensor=changed[0],
            hint="give --bf16 to write a BF16 safetensors file instead",
        )
    entries = []
    position = 0
    for entry in source.entries:
        info = container.info(entry.name)
        size = entry.size if info.exact is None else entry.size // 2
        entries.append(framing.Entry(entry.name, info.dtype, entry.shape, position, position + size))
        position += size
    header = (
        framing.encode_header(entries, source.metadata)
        if source.metadata
        else framing.compact_json(_without_metadata(entries))
    )
    header += b" " * (-len(header) % 8)
    return _Layout(header, tuple(entries), 8 + len(header) + position, None)


def _without_metadata(entries: list[framing.Entry]) -> object:
    document = json.loads(framing.encode_header(entries, {}))
    del document["__metadata__"]
    return document


def _restore_shard(job: FileJob, bf16: bool, force: bool, jobs: int, progress: Progress) -> RestoredFile:
    with Container(job.source.label) as container:
        target = _layout(container, bf16=bf16)
        converted = target.sha256 is None
        existing = _sha256(job.target) if job.target.exists() and not force else None
        if existing is not None and existing == target.sha256:
            progress(target.size)
            return RestoredFile(job.source.label, str(job.target), target.size, existing, converted, "skipped")
        if existing is not None and not converted:
            raise already_there(job.target)
        make_parents(job.target)
        with AtomicWriter(job.target) as writer:
            sha256 = _write(container, target, writer, jobs, progress)
            if target.sha256 is not None and sha256 != target.sha256:
                raise errors.DifferenceError(
                    "what was restored is not the source",
                    file=job.source.label,
                    expected=f"SHA-256 {target.sha256}",
                    found=sha256,
                )
            if existing is None:
                writer.commit()
            elif existing != sha256:
                raise already_there(job.target)
    status: Literal["restored", "skipped"] = "restored" if existing is None else "skipped"
    return RestoredFile(job.source.label, str(job.target), target.size, sha256, converted, status)


def _write(container: Container, target: _Layout, writer: AtomicWriter, jobs: int, progress: Progress) -> str:
    digest = hashlib.sha256()

    def produce(task: tuple[Record, int, bool] | Bytes, scratch: tuple[Scratch, ...]) -> Bytes:
        # Decode one segment, or pass on what is stored as it is.
        if isinstance(task, np.ndarray):
            return task
        record, index, widen = task
        stored, decoded, widened = scratch
        weights = decoded.take(2 * record.segments[index].elements).view(np.uint16)
        record.read_segment(index, stored).decode(weights)
        return _widen(weights, widened.take(4 * len(weights)).view(np.uint32)) if widen else weights.view(np.uint8)

    def tasks() -> Iterator[tuple[Record, int, bool] | Bytes]:
        for entry in target.entries:
            info = container.info(entry.name)
            widen = info.exact is not None and entry.dtype == "F32"
            if info.encoding == "df11":
                record = container.record(entry.name)
                yield from ((record, index, widen) for index in range(len(record.segments)))
            else:
                for chunk in container.verbatim_chunks(entry.name):
                    yield _widen(chunk.view(np.uint16), np.empty(len(chunk) // 2, np.uint32)) if widen else chunk

    head = np.frombuffer(len(target.header).to_bytes(8, "little") + target.header, np.uint8)
    digest.update(head)
    writer.write(head)
    progress(len(head))
    with ThreadPoolExecutor(1, "df11-hash") as hasher:
        for _, data in ordered(produce, tasks(), jobs):
            hashing = hasher.submit(digest.update, data)
            writer.write(data)
            hashing.result()
            progress(len(data))
    return digest.hexdigest()


def _widen(weights: Weights, out: npt.NDArray[np.uint32]) -> Bytes:
    # BF16 weights as the bytes of F32 values.
    np.left_shift(weights, np.uint32(16), out=out, dtype=np.uint32)
    return out.view(np.uint8)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
