"""The original of a model that was imported: the same tensors, in other files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from df11.converter.dfloat11.architectures import tied_units
from df11.converter.files import CONFIG, folder_of, is_shard
from df11.converter.source import Source
from df11.formats import errors, framing, json_text
from df11.formats.container import Container
from df11.storage.entry import Entry
from df11.storage.store import Store


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the original model, and the tensor of a container that it must equal."""

    file: Entry
    entry: framing.Entry
    container: Entry
    name: str


def paired_tensors(store: Store, containers: Sequence[Entry], originals: Store) -> list[Pair]:
    """All tensors of both, by their names in their folders. Weights that are tied are in the containers once.

    Raises a DifferenceError if one of them lacks a tensor of the other, or has it with another dtype or shape.
    """
    found = []
    for folder in dict.fromkeys(folder_of(entry.name) for entry in containers):
        mine: dict[str, tuple[Entry, str, tuple[int, ...]]] = {}
        for entry in containers:
            if folder_of(entry.name) == folder:
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
            found.append(Pair(file, place, here, names[name]))
    return found


def _places(originals: Store, folder: str) -> dict[str, tuple[Entry, framing.Entry]]:
    # Where the original has its tensors: in the folder of the same name, or in the only one.
    shards = [entry for entry in originals.list() if is_shard(entry.name)]
    same = [entry for entry in shards if folder_of(entry.name) == folder]
    if not same and len({folder_of(entry.name) for entry in shards}) == 1:
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
