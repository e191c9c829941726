"""Prove that containers are intact: decode everything, check every checksum, compare with the source if available."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from df11.converter.dfloat11.architectures import tied_units
from df11.converter.dfloat11.recognise import decoded
from df11.converter.files import (
    CONFIG,
    DF11,
    check_shards,
    container_name,
    index_names,
    is_shard,
    raise_if_missing,
    shard_name,
)
from df11.converter.kernels import cast_f32
from df11.converter.ordered import ordered
from df11.converter.restore_file import restore_file, restored_layout
from df11.converter.settings import thread_count
from df11.converter.source import Progress, Source, ignore
from df11.formats import errors, framing, json_text
from df11.formats.container import Container, TensorInfo
from df11.formats.record import Bytes, Record, Scratch, Weights
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
    cast: bool


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> VerifyReport:
    """Decode all of a `.df11` file or model folder and check every checksum; raises a Df11Error at the first damage.

    An index that names a missing container is an error, too. With ``against``, the source file or folder, here or on
    the Hub, compare bit for bit (F32 tensors that were cast are cast again), and raise a DifferenceError at the first
    difference. What was imported from a DFloat11 checkpoint is compared with the original model's tensors, by name.
    Progress is in stored bytes.
    """
    count = thread_count(threads)
    store = open_source(Path(path))
    containers = _containers(store, Path(path))
    on_total(sum(entry.size for entry in containers))
    source = None if against is None else open_source(against)
    imported = [] if source is None else [entry for entry in containers if _is_imported(store, entry)]
    sources = _pair_sources(store, [entry for entry in containers if entry not in imported], source)
    tensors = size = 0
    for entry in containers:
        with ExitStack() as stack:
            container = stack.enter_context(Container(store.locate(entry.name)))
            if entry in sources:
                file = sources[entry]
                opened = None if source is None or file is None else stack.enter_context(Source(source.open(file)))
                _verify(container, opened, count, on_progress)
            tensors += len(container)
            size += sum(_decoded_size(container.info(name)) for name in container.keys())
    if source is not None and imported:
        shapes = {name: shape for entry in imported for name, shape in _shapes(store, entry)}
        source = decoded(source, known=shapes)  # It may be the checkpoint itself.
        _compare_originals(store, imported, source, count, on_progress)
    return VerifyReport(len(containers), tensors, size, against is not None)


def _shapes(store: Store, entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
    with Container(store.locate(entry.name)) as container:
        for name in container.keys():
            yield name, container.info(name).shape


def _is_imported(store: Store, entry: Entry) -> bool:
    with Container(store.locate(entry.name)) as container:
        return bool(container.made_from)


def _containers(store: Store, path: Path) -> list[Entry]:
    # All containers at a path; they must be there as far as an index names them.
    listed = store.list()
    if store.is_file:
        return list(listed)
    for name, error in store.refused.items():
        if name.endswith("/"):  # Files are read where they are: nothing of them gets anywhere.
            raise error
    containers = [entry for entry in listed if entry.name.endswith(DF11)]
    if not containers:
        raise errors.UsageError(f"no {DF11} file in this folder", file=path, hint="check the path")
    by_name = {entry.name: entry for entry in listed}
    indexes = {name: store.read(by_name[name]) for name in index_names(by_name)}
    raise_if_missing(check_shards(indexes, by_name, store.label), store.label, may_allow=False)
    return containers


def _pair_sources(store: Store, containers: Sequence[Entry], source: Store | None) -> dict[Entry, Entry | None]:
    # For each container the file of the source to compare it with.
    if source is None or not containers:
        return dict.fromkeys(containers)
    listed = source.list()
    if source.is_file != store.is_file:
        what = "--against names a file, but what is verified is a folder"
        if store.is_file:
            what = "--against names a folder, but what is verified is a file"
        raise errors.UsageError(what, file=source.label)
    if store.is_file:
        return {containers[0]: listed[0]}
    by_name = {container_name(entry.name): entry for entry in listed if is_shard(entry.name)}
    for entry in containers:
        if entry.name not in by_name:
            where = source.locate(shard_name(entry.name, {}))
            raise errors.MissingError("no such file or folder", file=where, hint="check the path")
    return {entry: by_name[entry.name] for entry in containers}


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
                    yield _Task(record, index, entry.start, info.exact is not None)

    def check(task: _Task, scratch: tuple[Scratch, ...]) -> None:
        place = task.record.segments[task.index]
        stored, weights, original = scratch
        segment = task.record.read_segment(task.index, stored)
        width = 4 if task.cast else 2
        data = original.take(width * place.elements)
        source.read(task.source_start + width * place.first_element, data)
        decoded = weights.take(2 * place.elements).view(np.uint16)
        segment.compare(_cast(data, decoded) if task.cast else data.view(np.uint16))

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
    cast = container.info(name).exact is not None
    for block in container.verbatim_blocks(name):
        data = np.empty(len(block) * (2 if cast else 1), np.uint8)
        source.read(start, data)
        start += len(data)
        found = _cast(data, np.empty(len(block) // 2, np.uint16)).view(np.uint8) if cast else data
        if not np.array_equal(found, block):
            raise errors.DifferenceError("the bytes differ from the source's", file=container.path, tensor=name)


def _cast(data: Bytes, out: Weights) -> Weights:
    # F32 bytes rounded to BF16
    cast_f32(data.view(np.uint32), out)
    return out


# What was imported: the original model has the same tensors, in other files.


@dataclass(frozen=True, slots=True)
class _Original:
    # A tensor of the original model, and the tensor here that it must equal.
    file: Entry
    entry: framing.Entry
    container: Entry
    name: str


def _compare_originals(
    store: Store, containers: Sequence[Entry], originals: Store, threads: int, progress: Progress
) -> None:
    # Each file of the original is read once, in its own order, as it may come from the Hub.
    tensors = _paired_tensors(store, containers, originals)
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


def _paired_tensors(store: Store, containers: Sequence[Entry], originals: Store) -> list[_Original]:
    # All tensors of both, by their names in their folders. Raises a DifferenceError if one has another shape.
    found = []
    for folder in dict.fromkeys(_folder(entry.name) for entry in containers):
        mine: dict[str, tuple[Entry, str, tuple[int, ...]]] = {}
        for entry in containers:
            if _folder(entry.name) == folder:
                with Container(store.locate(entry.name)) as container:
                    for one in container.source_header.entries:
                        mine[one.name] = entry, one.dtype, one.shape
        places = _places(originals, folder)
        tied = [(f"{first}.weight", f"{second}.weight") for first, second in _tied(store, folder)]
        copies = {second: first for first, second in tied if first in mine}
        names = {name: name if name in mine else copies.get(name, name) for name in places}
        for name in sorted({*mine} - {*places}):
            what = "the original has no such tensor"
            raise errors.DifferenceError(what, file=store.locate(mine[name][0].name), tensor=name)
        for name, (file, place) in places.items():
            if names[name] not in mine:
                where = store.locate(folder) if folder else store.label
                raise errors.DifferenceError("this tensor of the original is missing", file=where, tensor=name)
            here, dtype, shape = mine[names[name]]
            if (dtype, shape) != (place.dtype, place.shape):
                what = "the original has another dtype or shape"
                where = store.locate(here.name)
                expected, got = (place.dtype, place.shape), (dtype, shape)
                raise errors.DifferenceError(what, file=where, tensor=name, expected=expected, found=got)
            found.append(_Original(file, place, here, names[name]))
    return found


def _places(originals: Store, folder: str) -> dict[str, tuple[Entry, framing.Entry]]:
    # Where the original has its tensors: in the folder of the same name, or in the only one.
    shards = [entry for entry in originals.list() if is_shard(entry.name)]
    same = [entry for entry in shards if _folder(entry.name) == folder]
    if not same and len({_folder(entry.name) for entry in shards}) == 1:
        same = shards
    if not same:
        what = f"no safetensors file in the folder {folder or '.'!r} of the original"
        raise errors.MissingError(what, file=originals.label, hint="check the path")
    places: dict[str, tuple[Entry, framing.Entry]] = {}
    for file in same:
        with Source(originals.open(file)) as source:
            places |= {entry.name: (file, entry) for entry in source.header.entries}
    return places


def _tied(store: Store, folder: str) -> Sequence[tuple[str, str]]:
    entry = None if store.is_file else store.find([folder + CONFIG]).get(folder + CONFIG)
    if entry is None:
        return ()
    config = json_text.parse(store.read(entry), what="config.json", where={"file": store.locate(entry.name)})
    return tied_units(config) if isinstance(config, dict) else ()


def _folder(name: str) -> str:
    return name[: name.rfind("/") + 1]
