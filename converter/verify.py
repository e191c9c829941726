"""Prove that containers are intact: decode everything, check every checksum, compare with the source if available."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from df11.converter.files import DF11, check_shards, container_name, index_names, is_shard, raise_if_missing, shard_name
from df11.converter.kernels import cast_f32, narrow_f32
from df11.converter.ordered import ordered
from df11.converter.restore_file import restore_file, restored_layout
from df11.converter.settings import thread_count
from df11.converter.source import Progress, Source, ignore
from df11.formats import errors, framing
from df11.formats.container import Container, TensorInfo
from df11.formats.record import Bytes, Record, Scratch, Weights, weights_dtype
from df11.storage.entry import Entry
from df11.storage.store import Store, open_source


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :func:`verify` found to be intact."""

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
    """First byte, in the data of the source."""
    exact: bool | None
    """As in the tensor object: None unless it was F32."""


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> VerifyReport:
    """Decode all of a `.df11` file or model folder and check every checksum; raises a Df11Error at the first damage.

    An index that names a missing container is an error, too. With ``against``, the source file or folder, compare bit
    for bit (F32 tensors that were cast are cast again), and raise a DifferenceError at the first difference. Progress
    is in stored bytes.
    """
    count = thread_count(threads)
    store = open_source(Path(path))
    sources = _pair_sources(store, Path(path), against)
    on_total(sum(entry.size for entry, _ in sources))
    tensors = size = 0
    for entry, source_path in sources:
        with ExitStack() as stack:
            container = stack.enter_context(Container(store.locate(entry.name)))
            source = None if source_path is None else stack.enter_context(Source.local(source_path))
            _verify(container, source, count, on_progress)
            tensors += len(container)
            size += sum(_decoded_size(container.info(name)) for name in container.keys())
    return VerifyReport(len(sources), tensors, size, against is not None)


def _pair_sources(store: Store, path: Path, against: str | os.PathLike[str] | None) -> list[tuple[Entry, Path | None]]:
    # Each container, and the source to compare it with.
    listed = store.list()
    if store.is_file:
        return [(listed[0], None if against is None else Path(against))]
    for name, error in store.refused.items():
        if name.endswith("/"):  # Files are read where they are: nothing of them gets anywhere.
            raise error
    containers = [entry for entry in listed if entry.name.endswith(DF11)]
    if not containers:
        raise errors.UsageError(f"no {DF11} file in this folder", file=path, hint="check the path")
    by_name = {entry.name: entry for entry in listed}
    indexes = {name: store.read(by_name[name]) for name in index_names(by_name)}
    raise_if_missing(check_shards(indexes, by_name, store.label), store.label, may_allow=False)
    if against is None:
        return [(entry, None) for entry in containers]
    source = open_source(Path(against))
    if source.is_file:
        raise errors.UsageError("--against names a file, but what is verified is a folder", file=against)
    names = {container_name(entry.name): entry.name for entry in source.list() if is_shard(entry.name)}
    return [(entry, Path(source.locate(names.get(entry.name, shard_name(entry.name, {}))))) for entry in containers]


def _decoded_size(info: TensorInfo) -> int:
    return info.elements * framing.DTYPE_BITS[info.dtype] // 8


def _verify(container: Container, source: Source | None, threads: int, progress: Progress) -> None:
    if source is None:
        _prove(container, threads, progress)
    else:
        _compare(container, source, threads, progress)
        source.check_unchanged()


def _prove(container: Container, threads: int, progress: Progress) -> None:
    # Everything is decoded and checked in the source's order, and its SHA-256 must come out. Only a cast that has
    # changed values leaves nothing to compare.
    wanted = restored_layout(container, bf16=True)
    done = told = 0

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        now = container.size * done // wanted.size
        progress(now - told)
        told = now

    restore_file(container, wanted, ignore, threads, advance)


def _compare(container: Container, source: Source, threads: int, progress: Progress) -> None:
    if source.header.raw != container.source_header.raw:
        raise errors.DifferenceError("the source has another header than the file that was converted", file=source.path)
    is_cast = container.source.cast is not None
    if is_cast:  # Values that differ may round to the same weights: only the hash can tell.
        _check_sha256(container, source, source.sha256(ignore))
    stop = threading.Event()

    def heed(_: int) -> None:
        if stop.is_set():
            raise _Stopped

    with ThreadPoolExecutor(1, "df11-hash") as hasher:
        hashing = None if is_cast else hasher.submit(source.sha256, heed)
        try:
            _compare_tensors(container, source, threads, progress)
        except BaseException:
            stop.set()
            raise
        if hashing is not None:
            _check_sha256(container, source, hashing.result())


class _Stopped(Exception):  # noqa: N818 - not an error
    pass


def _check_sha256(container: Container, source: Source, found: str) -> None:
    if found != container.source.sha256:
        what = "this is not the file that was converted, by its hash"
        expected = f"SHA-256 {container.source.sha256}"
        raise errors.DifferenceError(what, file=source.path, expected=expected, found=found)


def _compare_tensors(container: Container, source: Source, threads: int, progress: Progress) -> None:
    entries = {entry.name: entry for entry in container.source_header.entries}

    def tasks() -> Iterator[_Task]:
        for name in container.keys():
            info = container.info(name)
            if info.encoding == "df11":
                record = container.record(name)
                for index in range(len(record.segments)):
                    yield _Task(record, index, entries[name].start, info.exact)

    def check(task: _Task, scratch: tuple[Scratch, ...]) -> None:
        place = task.record.segments[task.index]
        stored, weights, original = scratch
        segment = task.record.read_segment(task.index, stored)
        kind = task.record.kind
        width = kind.bytes if task.exact is None else 4
        data = original.take(width * place.elements)
        source.read(task.source_start + width * place.first_element, data)
        if task.exact is None:
            segment.compare(data.view(weights_dtype(kind)))
        else:
            decoded = weights.take(2 * place.elements).view(np.uint16)
            segment.compare(_to_bf16(data, decoded, exact=task.exact))

    left = container.size
    for task, _ in ordered(check, tasks(), threads):
        size = task.record.segments[task.index].size
        left -= size
        progress(size)
    for name in container.keys():
        if container.info(name).encoding == "verbatim":
            _compare_verbatim(container, source, name, entries[name].start)
    progress(left)


def _compare_verbatim(container: Container, source: Source, name: str, start: int) -> None:
    exact = container.info(name).exact
    for block in container.verbatim_blocks(name):
        data = np.empty(len(block) * (1 if exact is None else 2), np.uint8)
        source.read(start, data)
        start += len(data)
        found = data
        if exact is not None:
            found = _to_bf16(data, np.empty(len(block) // 2, np.uint16), exact=exact).view(np.uint8)
        if not np.array_equal(found, block):
            raise errors.DifferenceError("the bytes differ from the source's", file=container.path, tensor=name)


def _to_bf16(data: Bytes, out: Weights, *, exact: bool) -> Weights:
    # F32 bytes as BF16; a NaN keeps its payload if that loses nothing.
    (narrow_f32 if exact else cast_f32)(data.view(np.uint32), out)
    return out
