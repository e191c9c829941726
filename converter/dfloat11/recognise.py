"""Find DFloat11 checkpoints among the files of a source, and show the models that they decode to in their place."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from df11.converter.dfloat11.architectures import tied_units
from df11.converter.dfloat11.imported import Hashes, Shard
from df11.converter.dfloat11.layout import (
    ALONE,
    CODES,
    CONFIG_KEY,
    Checkpoint,
    Config,
    Place,
    Shapes,
    Unit,
    check_headers,
    read_checkpoint,
    read_config,
)
from df11.converter.files import CONFIG, SAFETENSORS, SOURCE_SUFFIXES, folder_of, is_shard
from df11.converter.index import split_index_name
from df11.converter.source import Source
from df11.formats import errors, framing
from df11.storage.entry import Entry
from df11.storage.file import CHUNK
from df11.storage.local import LocalStore
from df11.storage.overlay import Overlay
from df11.storage.store import MAX_WHOLE_BYTES, Store, open_source

log: Final = logging.getLogger("df11")

SHARD_BYTES: Final = 5_000_000_000
"""Decoded bytes of a file, about; a unit is not divided."""


def decoded(
    store: Store,
    *,
    shapes: str | os.PathLike[str] | None = None,
    known: Shapes | None = None,
    max_memory: int | None = None,
) -> Store:
    """The same store, or, if it holds DFloat11 checkpoints, one with the models that they decode to.

    ``shapes``: the original model, whose headers say what shapes its tensors have. ``known``: shapes that are known
    otherwise. Raises a Df11Error if a checkpoint breaks a rule of its layout, or if nothing tells a shape.
    """
    found = checkpoints(store)
    if not found:
        if shapes is not None:
            raise errors.UsageError("--shapes is for DFloat11 checkpoints", file=store.label, hint="leave it out")
        return store
    originals = None if shapes is None else _Originals(shapes, max_memory)
    made: dict[str, Shard] = {}
    hashes: Hashes = {}
    texts: dict[str, bytes] = {}
    hidden: list[str] = []
    for folder, (files, config) in found.items():
        wanted = (known or {}) if originals is None else originals.shapes(folder)
        checkpoint = _without_copies(store, read_checkpoint(files, config, wanted, store.open, max_memory))
        stem = _stem(files, config)
        shards = _shards(checkpoint, None if store.is_file else SHARD_BYTES, hashes)
        names = [f"{stem}-{number:05}-of-{len(shards):05}{SAFETENSORS}" for number in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = [files[0].name if store.is_file else stem + SAFETENSORS]
        made |= {folder + name: shard for name, shard in zip(names, shards, strict=True)}
        hidden += [file.name for file in files]
        if store.is_file:
            continue
        texts[folder + CONFIG] = _plain_config(config)
        if len(shards) > 1:
            texts[f"{folder}{stem}{SAFETENSORS}.index.json"] = _index(names, shards)
        hidden += [
            entry.name
            for entry in store.list()
            if folder_of(entry.name) == folder and split_index_name(entry.name) is not None
        ]
    return Overlay(store, made, texts, hidden)


def checkpoints(store: Store) -> dict[str, tuple[list[Entry], Config]]:
    """The DFloat11 checkpoints in a store: by folder (with a slash at its end, or ""), their files and config.json."""
    listed = store.list()
    if store.is_file:
        is_one = is_shard(listed[0].name) and _has_codes(store, listed[0])
        return {"": (list(listed), _config_beside(store) or ALONE)} if is_one else {}
    found: dict[str, tuple[list[Entry], Config]] = {}
    for entry in listed:
        folder, name = folder_of(entry.name), posixpath.basename(entry.name)
        if name != CONFIG or entry.size > MAX_WHOLE_BYTES:
            continue
        files = [
            one
            for one in listed
            if folder_of(one.name) == folder and one.name.endswith(SAFETENSORS) and is_shard(one.name)
        ]
        config = read_config(store.read(entry), store.locate(entry.name)) if files else None
        if config is not None:
            found[folder] = files, config
    return found


def _config_beside(store: Store) -> Config | None:
    # The config.json in the folder of a file on a disk.
    if not isinstance(store, LocalStore):
        return None
    beside = LocalStore(store.root)
    entry = beside.find([CONFIG]).get(CONFIG)
    if entry is None or entry.size > MAX_WHOLE_BYTES:
        return None
    return read_config(beside.read(entry), beside.locate(CONFIG))


def _has_codes(store: Store, entry: Entry) -> bool:
    with Source(store.open(entry)) as source:
        return any(one.name.rpartition(".")[2] == CODES and one.dtype == "U8" for one in source.header.entries)


class _Originals:
    # The shapes in the headers of the original model: for each, 256 KB are read.

    def __init__(self, place: str | os.PathLike[str], max_memory: int | None) -> None:
        store = open_source(place)
        self._label = str(place)
        self._by_folder: dict[str, dict[str, tuple[int, ...]]] = {}
        size = 0
        for entry in store.list():
            if entry.name.endswith(SOURCE_SUFFIXES):
                with Source(store.open(entry), max_memory=max_memory) as source:
                    size += len(source.header.raw)
                    check_headers(size, source, max_memory)
                    known = self._by_folder.setdefault(folder_of(entry.name), {})
                    known |= {one.name: one.shape for one in source.header.entries}

    def shapes(self, folder: str) -> Shapes:
        # Those of the folder of the same name, or of the only one.
        found = self._by_folder.get(folder)
        if found is None and len(self._by_folder) == 1:
            found = next(iter(self._by_folder.values()))
        if found is None:
            what = f"no safetensors file in the folder {folder or '.'!r} of the original, for --shapes"
            raise errors.UsageError(what, file=self._label)
        return found


def _stem(files: Sequence[Entry], config: Config) -> str:
    # What the files of such a model are called: a loader looks for that.
    names = {posixpath.basename(file.name) for file in files}
    is_diffusers = "_class_name" in config.document or "diffusion_pytorch_model.safetensors" in names
    return "diffusion_pytorch_model" if is_diffusers else "model"


def _plain_config(config: Config) -> bytes:
    document = {key: value for key, value in config.document.items() if key != CONFIG_KEY}
    return framing.indented_json(document)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,18})", name) if part]


def _shards(checkpoint: Checkpoint, most: int | None, hashes: Hashes) -> list[Shard]:
    # All tensors in the order of the model, in files of about `most` bytes.
    items: dict[str, Unit | Place] = {**checkpoint.units, **checkpoint.plain}
    groups: list[list[Unit | Place]] = [[]]
    size = 0
    for name in sorted(items, key=_natural):
        item = items[name]
        more = item.entry.size if isinstance(item, Place) else 2 * item.weights
        if groups[-1] and most is not None and size + more > most:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += more
    return [
        Shard.of(
            [one for one in group if isinstance(one, Unit)], [one for one in group if isinstance(one, Place)], hashes
        )
        for group in groups
    ]


def _index(names: Sequence[str], shards: Sequence[Shard]) -> bytes:
    pieces = [(name, piece.entry) for name, shard in zip(names, shards, strict=True) for piece in shard.pieces]
    total = sum(entry.size for _, entry in pieces)
    weights = {entry.name: name for name, entry in pieces}
    return framing.indented_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))})


def _without_copies(store: Store, checkpoint: Checkpoint) -> Checkpoint:
    # Of tied weights, which that layout stores under both names, the first alone.
    units: Mapping[str, Unit] = checkpoint.units
    copies = [
        second
        for first, second in tied_units(checkpoint.config.document)
        if first in units and second in units and _are_same(store, units[first], units[second])
    ]
    rest = {name: unit for name, unit in units.items() if name not in copies}
    return Checkpoint(checkpoint.config, rest, checkpoint.plain)


def _are_same(store: Store, one: Unit, other: Unit) -> bool:
    pairs = [(place, other.places[part]) for part, place in one.places.items()]
    if any(mine.entry.size != its.entry.size for mine, its in pairs):
        return False
    for mine, its in sorted(pairs, key=lambda pair: pair[0].entry.size):
        with store.open(mine.file) as first, store.open(its.file) as second:
            first.expect(mine.start, mine.start + mine.entry.size)
            second.expect(its.start, its.start + its.entry.size)
            for position in range(0, mine.entry.size, CHUNK):
                size = min(CHUNK, mine.entry.size - position)
                left, right = np.empty(size, np.uint8), np.empty(size, np.uint8)
                first.read(mine.start + position, left)
                second.read(its.start + position, right)
                if not np.array_equal(left, right):
                    return False
    return True
