"""Prove that containers are intact: decode everything, check every checksum, compare with the source if available."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from df11.converter.dfloat11.originals import paired_tensors
from df11.converter.dfloat11.recognise import decoded
from df11.converter.files import (
    DF11,
    Completeness,
    check_shards,
    container_name,
    folder_of,
    index_names,
    is_shard,
    original_name,
    raise_if_missing,
)
from df11.converter.kernels import cast_f32, narrow_f32
from df11.converter.manifest import FILE_NAME, read_manifest
from df11.converter.ordered import ordered
from df11.converter.restore_file import restore_file, restored_layout
from df11.converter.scan import check_described
from df11.converter.settings import thread_count
from df11.converter.source import Progress, Source, ignore
from df11.formats import errors, framing
from df11.formats.container import Container, TensorInfo
from df11.formats.record import Bytes, Record, Scratch, Weights, weights_dtype
from df11.storage.entry import Entry
from df11.storage.store import Store, open_source

EDITED: Final = frozenset({"README.md", ".gitattributes"})
"""Files that people edit in a converted folder or on the Hub. No weights depend on them."""


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

    A container that an index or the manifest names must be there, and be of the source that the manifest says; all
    other files in the manifest must be as df11 wrote them, but for those in EDITED. With ``against``, the source file
    or folder, here or on the Hub, compare bit for bit (F32 tensors that were cast are cast again), and raise a
    DifferenceError at the first difference; each of its shards must have a container. What was imported from a DFloat11
    checkpoint is compared with the original model's tensors, by name. Progress is in stored bytes.
    """
    count = thread_count(threads)
    store = open_source(Path(path))
    listed = {entry.name: entry for entry in store.list()}
    manifest = None if store.is_file or FILE_NAME not in listed else read_manifest(store)
    containers = _containers(store, listed, Path(path))
    source = None if against is None else open_source(against)
    imported = [] if source is None else [entry for entry in containers if _is_imported(store, entry)]
    originals = {} if manifest is None else manifest.originals
    sources = {} if source is None else _pair_sources(store, containers, source, imported, originals)
    rows = {} if manifest is None else {row.file: row for row in manifest.files}
    others = {} if manifest is None else {name: sha256 for name, sha256 in manifest.others if name not in EDITED}
    found = Completeness(tuple((FILE_NAME, name) for name in sorted(rows.keys() | others) if name not in listed), ())
    raise_if_missing(found, store.label, may_allow=False)
    on_total(sum(entry.size for entry in containers) + sum(listed[name].size for name in others))
    tensors = size = 0
    for entry in containers:
        with ExitStack() as stack:
            container = stack.enter_context(Container(store.locate(entry.name)))
            check_described(rows.get(entry.name), container)
            if entry not in imported:
                file = None
                if source is not None:
                    file = stack.enter_context(Source(source.open(sources[entry])))
                verify_container(container, file, count, on_progress)
            tensors += len(container)
            size += sum(_decoded_size(container.info(name)) for name in container.keys())
    if source is not None and imported:
        shapes = {name: shape for entry in imported for name, shape in _shapes(store, entry)}
        source = decoded(source, known=shapes)  # It may be the checkpoint itself.
        _compare_originals(store, imported, source, count, on_progress)
    for name, sha256 in others.items():
        _check_other(store, listed[name], sha256, on_progress)
    return VerifyReport(len(containers), tensors, size, against is not None)


def _check_other(store: Store, entry: Entry, sha256: str, progress: Progress) -> None:
    def told(chunks: Iterator[Bytes]) -> Iterator[Bytes]:
        for chunk in chunks:
            yield chunk
            progress(len(chunk))

    with store.open(entry) as file:
        found = Entry.of_chunks(entry.name, file.size, told(file.chunks()))
    if found.sha256 != sha256:
        what = "this is not the file that df11 wrote, by the manifest"
        hint = "convert the model again, or get the file again"
        raise errors.DifferenceError(
            what, file=store.locate(entry.name), expected=f"SHA-256 {sha256}", found=found.sha256, hint=hint
        )


def _shapes(store: Store, entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
    with Container(store.locate(entry.name)) as container:
        for name in container.keys():
            yield name, container.info(name).shape


def _is_imported(store: Store, entry: Entry) -> bool:
    with Container(store.locate(entry.name)) as container:
        return bool(container.made_from)


def _containers(store: Store, listed: Mapping[str, Entry], path: Path) -> list[Entry]:
    # All containers at a path; they must be there as far as an index names them.
    if store.is_file:
        return list(listed.values())
    for name, error in store.refused.items():
        if name.endswith("/"):  # Files are read where they are: nothing of them gets anywhere.
            raise error
    containers = [entry for entry in listed.values() if entry.name.endswith(DF11)]
    if not containers:
        raise errors.UsageError(f"no {DF11} file in this folder", file=path, hint="check the path")
    indexes = {name: store.read(listed[name]) for name in index_names(listed)}
    raise_if_missing(check_shards(indexes, listed, store.label), store.label, may_allow=False)
    return containers


def _pair_sources(
    store: Store,
    containers: Sequence[Entry],
    source: Store,
    imported: Collection[Entry],
    originals: Mapping[str, str],
) -> dict[Entry, Entry]:
    # For each container, but for imported ones, the file of the source to compare it with.
    listed = source.list()
    plain = [entry for entry in containers if entry not in imported]
    if plain and source.is_file != store.is_file:
        what = "--against names a file, but what is verified is a folder"
        if store.is_file:
            what = "--against names a folder, but what is verified is a file"
        raise errors.UsageError(what, file=source.label)
    if store.is_file:
        return dict.fromkeys(plain, listed[0])
    shards = {container_name(entry.name): entry for entry in listed if is_shard(entry.name)}
    # Where something was imported, the original has other files: that they are all here is known by their tensors.
    other = {folder_of(entry.name) for entry in imported}
    if other and len({folder_of(name) for name in shards}) == 1:  # It may have another name there.
        other = {folder_of(name) for name in shards}
    for name in sorted(shards.keys() - {entry.name for entry in containers}):
        if folder_of(name) not in other:
            what = f"this file is missing, but the source has {shards[name].name}"
            raise errors.MissingError(what, file=store.locate(name), hint="convert it, or compare file by file")
    for entry in plain:
        if entry.name not in shards:
            where = source.locate(original_name(entry.name, originals))
            raise errors.MissingError("no such file or folder", file=where, hint="check the path")
    return {entry: shards[entry.name] for entry in plain}


def _decoded_size(info: TensorInfo) -> int:
    return info.elements * framing.DTYPE_BITS[info.dtype] // 8


def verify_container(container: Container, source: Source | None, threads: int, progress: Progress) -> None:
    """The same for one open container and, unless it is None, its source."""
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
            left = container.size - compare_tensors(
                container, source, container.source_header.entries, threads, progress
            )
            progress(left)
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


def compare_tensors(
    container: Container, source: Source, entries: Iterable[framing.Entry], threads: int, progress: Progress
) -> int:
    """Compare tensors of a container with those of a source that are in ``entries``: positions there, names here.

    Returns the stored bytes that ``progress`` was told of. Raises a DifferenceError at the first difference.
    """
    entries = list(entries)

    def tasks() -> Iterator[_Task]:
        for entry in entries:
            info = container.info(entry.name)
            if info.encoding == "df11":
                record = container.record(entry.name)
                for index in range(len(record.segments)):
                    yield _Task(record, index, entry.start, info.exact)

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

    told = 0
    for task, _ in ordered(check, tasks(), threads):
        size = task.record.segments[task.index].size
        told += size
        progress(size)
    for entry in entries:
        if container.info(entry.name).encoding == "verbatim":
            _compare_verbatim(container, source, entry.name, entry.start)
    return told


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


# What was imported: the original model has the same tensors, in other files.


def _compare_originals(
    store: Store, containers: Sequence[Entry], originals: Store, threads: int, progress: Progress
) -> None:
    # Each file of the original is read once, in its own order, as it may come from the Hub.
    tensors = paired_tensors(store, containers, originals)
    told: dict[Entry, int] = dict.fromkeys(containers, 0)
    for file in dict.fromkeys(one.file for one in tensors):
        with Source(originals.open(file)) as source:
            for entry in containers:
                mine = [one for one in tensors if (one.file, one.container) == (file, entry)]
                places = [
                    framing.Entry(one.name, one.entry.dtype, one.entry.shape, one.entry.start, one.entry.end)
                    for one in sorted(mine, key=lambda one: one.entry.start)
                ]
                with Container(store.locate(entry.name)) as container:
                    told[entry] += compare_tensors(container, source, places, threads, progress)
            source.check_unchanged()
    progress(max(sum(entry.size - told[entry] for entry in containers), 0))
