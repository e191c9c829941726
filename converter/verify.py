"""Prove that containers are intact: decode everything, check every checksum, compare with the source if it is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from df11.converter.convert import thread_count
from df11.converter.kernels import cast_f32
from df11.converter.ordered import ordered
from df11.converter.source import LocalSource, Progress, Source, ignore
from df11.converter.tree import DF11, SAFETENSORS, list_containers
from df11.formats import errors, framing
from df11.formats.container import Container, TensorInfo
from df11.formats.record import Bytes, Record, Scratch, Weights


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :func:`verify` has found to be intact."""

    files: int
    tensors: int
    bytes: int
    """Decoded bytes."""
    compared: bool
    """Whether they were compared with the source."""


@dataclass(frozen=True, slots=True)
class _Task:
    record: Record
    index: int
    source_start: int
    """Byte in the data of the source."""
    cast: bool


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    jobs: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> VerifyReport:
    """Decode all of a `.df11` file or tree and check every checksum; raises a Df11Error at the first damage.

    With ``against``, the source file or tree: compare bit for bit (F32 tensors that were cast are cast again), and raise a DifferenceError at the
    first difference. Progress is in stored bytes.
    """
    threads = thread_count(jobs)
    files = list_containers(Path(path))
    on_total(sum(file.stat().st_size for file in files))
    tensors = size = 0
    for file in files:
        with ExitStack() as stack:
            container = stack.enter_context(Container(file))
            source = (
                None
                if against is None
                else stack.enter_context(LocalSource(_source_path(file, Path(path), Path(against))))
            )
            _verify(container, source, threads, on_progress)
            tensors += len(container)
            size += sum(_decoded_size(container.info(name)) for name in container.keys())
    return VerifyReport(len(files), tensors, size, against is not None)


def _source_path(file: Path, root: Path, against: Path) -> Path:
    if file == root:
        return against
    relative = file.relative_to(root)
    return against / relative.with_name(relative.name.removesuffix(DF11) + SAFETENSORS)


def _decoded_size(info: TensorInfo) -> int:
    return info.elements * framing.DTYPE_BITS[info.dtype] // 8


def _verify(container: Container, source: Source | None, jobs: int, progress: Progress) -> None:
    entries = {entry.name: entry for entry in container.source_header.entries}
    if source is not None and source.header.raw != container.source_header.raw:
        raise errors.DifferenceError("the source has another header than the file that was converted", file=source.path)
    if source is not None and container.source.cast is not None:
        # Values that differ may round to the same weights: only the hash can tell.
        sha256 = source.sha256(ignore)
        if sha256 != container.source.sha256:
            raise errors.DifferenceError(
                "this is not the file that was converted",
                file=source.path,
                expected=f"SHA-256 {container.source.sha256}",
                found=sha256,
            )

    def tasks() -> Iterator[_Task]:
        for name in container.keys():
            info = container.info(name)
            if info.encoding == "df11":
                record = container.record(name)
                for index in range(len(record.segments)):
                    yield _Task(record, index, entries[name].start, info.exact is not None)

    def check(task: _Task, scratch: tuple[Scratch, ...]) -> None:
        place = task.record.segments[task.index]
        stored, weights, original = scratch
        segment = task.record.read_segment(task.index, stored)
        decoded = weights.take(2 * place.elements).view(np.uint16)
        if source is None:
            segment.decode(decoded)
            return
        width = 4 if task.cast else 2
        data = original.take(width * place.elements)
        source.read(task.source_start + width * place.first_element, data)
        segment.compare(_cast(data, decoded) if task.cast else data.view(np.uint16))

    left = container.size
    for task, _ in ordered(check, tasks(), jobs):
        size = task.record.segments[task.index].size
        left -= size
        progress(size)
    for name in container.keys():
        if container.info(name).encoding == "verbatim":
            _verify_verbatim(container, source, name, entries[name].start)
    progress(left)
    if source is not None:
        source.check_unchanged()


def _verify_verbatim(container: Container, source: Source | None, name: str, start: int) -> None:
    cast = container.info(name).exact is not None
    for chunk in container.verbatim_chunks(name):
        if source is not None:
            data = np.empty(len(chunk) * (2 if cast else 1), np.uint8)
            source.read(start, data)
            start += len(data)
            if not np.array_equal(
                _cast(data, np.empty(len(chunk) // 2, np.uint16)).view(np.uint8) if cast else data, chunk
            ):
                raise errors.DifferenceError("the bytes differ from the source's", file=container.path, tensor=name)


def _cast(data: Bytes, out: Weights) -> Weights:
    # F32 bytes rounded to BF16.
    cast_f32(data.view(np.uint32), out)
    return out
