"""What becomes of the files of a model folder: which are shards, which are copied, and their names in the target."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from df11.converter.index import read_shards, split_index_name
from df11.converter.manifest import FILE_NAME, is_relative
from df11.formats import errors
from df11.storage.entry import Entry
from df11.storage.local import LocalStore
from df11.storage.names import is_left_out
from df11.storage.store import open_source

SAFETENSORS: Final = ".safetensors"
SOURCE_SUFFIXES: Final = (SAFETENSORS, ".sft")
DF11: Final = ".df11"
CONFIG: Final = "config.json"
ATTRIBUTES: Final = ".gitattributes"
ATTRIBUTES_LINE: Final = b"\n*.df11 filter=lfs diff=lfs merge=lfs -text\n"
"""Added to the copy of a .gitattributes file, so that git keeps containers in LFS like shards."""

_BY_NAME: Final = re.compile(
    r"(adapter_model|pytorch_lora_weights|learned_embeds|ip-adapter)([._-].*)?\.(safetensors|sft)", re.DOTALL
)
"""Small files that peft and diffusers look up by these names and read themselves."""

Action = Literal["convert", "restore", "copy", "export"]
"""What happens to a model folder: shards into containers, containers into shards, or everything copied.

An export copies, too: its source shows the files of another layout, which are made while they are copied."""
Kind = Literal["convert", "restore", "copy", "index", "attributes"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A file of the source and what becomes of it."""

    kind: Kind
    entry: Entry
    name: str
    """Its name in the target."""


def is_shard(name: str) -> bool:
    """Whether a file's name makes it a shard to convert."""
    return name.endswith(SOURCE_SUFFIXES) and _BY_NAME.fullmatch(name.rpartition("/")[2]) is None


def container_name(name: str) -> str:
    """A shard's name after conversion; other names stay the same."""
    for suffix in SOURCE_SUFFIXES:
        if name.endswith(suffix) and is_shard(name):
            return name.removesuffix(suffix) + DF11
    return name


def folder_of(name: str) -> str:
    """The folder of a file, with a slash at its end, or ""."""
    return name[: name.rfind("/") + 1]


def original_name(name: str, originals: Mapping[str, str]) -> str:
    """A container's or its index's name before conversion; other names stay the same.

    ``originals``: names in a manifest, trusted only for the suffix.
    """
    stem, rest = split_index_name(name) or (name, "")
    if not stem.endswith(DF11):
        return name
    stem = stem.removesuffix(DF11)
    known = originals.get(name)
    return known if known in {stem + suffix + rest for suffix in SOURCE_SUFFIXES} else stem + SAFETENSORS + rest


def assign(entries: Iterable[Entry], action: Action, originals: Mapping[str, str] = {}) -> list[Assignment]:
    """Assign a target to each file of a folder: shards first, index files last.

    A manifest is left out of a conversion or restoration, as it describes one conversion only. Raises UsageError if two
    files would get the same name.
    """
    found: dict[str, Assignment] = {}
    for entry in entries:
        index = split_index_name(entry.name)
        is_ours = entry.name.endswith(DF11) or (index is not None and index[0].endswith(DF11))
        if action == "convert" and is_ours:  # On the way back it would be taken for what df11 has made.
            hint = "name the folder of the original model, or leave it out: --exclude '*.df11*'"
            raise errors.UsageError("this folder holds .df11 files already", file=entry.name, hint=hint)
        kind, name = _assign_one(entry.name, action, originals)
        if kind is None:
            continue
        if name in found:
            both = f"{found[name].entry.name} and {entry.name} would both be written to this file"
            hint = "leave one of them out: --exclude"
            raise errors.UsageError(both, file=name, hint=hint)
        found[name] = Assignment(kind, entry, name)
    order: tuple[Kind, ...] = ("convert", "restore", "copy", "attributes", "index")
    return sorted(found.values(), key=lambda one: order.index(one.kind))


def target_names(names: Iterable[str], action: Action, originals: Mapping[str, str]) -> set[str]:
    """The names that files would have in the target."""
    return {_assign_one(name, action, originals)[1] for name in names}


def _assign_one(name: str, action: Action, originals: Mapping[str, str]) -> tuple[Kind | None, str]:
    if action in ("copy", "export"):
        return "copy", name
    if name == FILE_NAME:
        return None, name
    if name.rpartition("/")[2] == ATTRIBUTES:
        return "attributes", name
    index = split_index_name(name)
    if action == "convert":
        if is_shard(name):
            return "convert", container_name(name)
        if index is not None and is_shard(index[0]):
            return "index", container_name(index[0]) + index[1]
    else:
        if name.endswith(DF11):
            return "restore", original_name(name, originals)
        if index is not None and index[0].endswith(DF11):
            return "index", original_name(name, originals)
    return "copy", name


def renamed(assignments: Iterable[Assignment], indexes: Mapping[str, bytes], where: str) -> dict[str, str]:
    """What converted files, and those that index files name, were called, unless their new names say it.

    With these, :func:`original_name` gives every name back. Raises UsageError for an index, given by name and content,
    whose names it would not. ``where``: the folder, for errors.
    """
    named = {(index, shard) for index, shard in named_files(indexes, where) if is_shard(shard)}
    before = {container_name(shard): shard for _, shard in sorted(named)}  # Some may be missing.
    before |= {one.name: one.entry.name for one in assignments if one.kind in ("convert", "index")}
    found = {name: old for name, old in before.items() if original_name(name, {}) != old and is_relative(old)}
    for index, shard in sorted(named):
        if original_name(container_name(shard), found) != shard:
            what = (
                f"it names {errors.shortened(shard)}, whose name could not be restored: two shards would get one name"
            )
            hint = "correct it, or leave it out: --exclude"
            raise errors.UsageError(what, file=f"{where}/{index}", hint=hint)
    return found


def named_files(indexes: Mapping[str, bytes], where: str) -> Iterator[tuple[str, str]]:
    """Each index file, given by name and content, with each file that it names, there or not."""
    for index, data in indexes.items():
        folder = folder_of(index)
        for shard in set(read_shards(data, f"{where}/{index}").values()):
            yield index, posixpath.normpath(folder + shard)


def with_attributes(data: bytes, action: Action) -> bytes:
    """The copy of a .gitattributes file: with containers in LFS, or, on the way back, as it was."""
    return data + ATTRIBUTES_LINE if action == "convert" else data.removesuffix(ATTRIBUTES_LINE)


@dataclass(frozen=True, slots=True)
class Completeness:
    """What the index files of a folder say about its shards."""

    missing: tuple[tuple[str, str], ...]
    """Index file, and a shard that it names but that does not exist."""
    unnamed: tuple[str, ...]
    """Shards beside an index that does not list them."""


def check_shards(indexes: Mapping[str, bytes], names: Collection[str], where: str) -> Completeness:
    """Compare index files, given by name and content, with all file ``names``. ``where``: the folder, for errors."""
    missing: list[tuple[str, str]] = []
    named: set[str] = set()
    folders: set[tuple[str, str]] = set()
    for index, data in indexes.items():
        folder = folder_of(index)
        shards = {shard for _, shard in named_files({index: data}, where)}
        named |= shards
        missing += [(index, shard) for shard in sorted(shards - set(names))]
        split = split_index_name(index)
        assert split is not None
        folders.add((folder, DF11 if split[0].endswith(DF11) else SAFETENSORS))
    unnamed = [
        name
        for name in sorted(names)
        if any(
            name.startswith(folder) and "/" not in name[len(folder) :]
            for folder, suffix in folders
            if name.endswith(suffix)
        )
        and name not in named
        and (is_shard(name) or name.endswith(DF11))
    ]
    return Completeness(tuple(missing), tuple(unnamed))


def index_names(names: Iterable[str]) -> list[str]:
    """The names that belong to index files of shards or containers."""
    found = []
    for name in names:
        index = split_index_name(name)
        if index is not None and (is_shard(index[0]) or index[0].endswith(DF11)) and not is_left_out(name):
            found.append(name)
    return found


def raise_if_missing(found: Completeness, where: str, *, may_allow: bool = True) -> None:
    """Raise a MissingError for the first shard that an index names but that does not exist.

    ``may_allow``: whether to suggest ``--allow-missing``.
    """
    if found.missing:
        index, shard = found.missing[0]
        more = f" and {len(found.missing) - 1} more" if len(found.missing) > 1 else ""
        what = f"this file is missing, but {index} names it{more}"
        hint = "get the file, for example by downloading again"
        if may_allow:
            hint += ", or pass --allow-missing to continue without it"
        raise errors.MissingError(what, file=f"{where}/{shard}", hint=hint)


def list_containers(path: Path) -> list[Path]:
    """The containers at ``path``: the file itself, or all `.df11` files in the folder."""
    store = open_source(path)
    assert isinstance(store, LocalStore)
    if store.is_file:
        return [path]
    files = [store.root / entry.name for entry in store.list() if entry.name.endswith(DF11)]
    if not files:
        raise errors.UsageError(f"no {DF11} file in this folder", file=path, hint="check the path")
    return files


_OTHER_FORMS: Final = re.compile(
    r"consolidated.*\.(safetensors|pth|pt)|pytorch_model.*\.bin|(tf_model|flax_model).*\.(h5|msgpack)|.*\.(gguf|ckpt)"
)


def second_copies(names: Sequence[str]) -> list[str]:
    """Files whose names suggest that they are another copy of the model, beside its shards."""

    def folder_of(name: str) -> str:
        return name.rpartition("/")[0]

    others = [name for name in names if _OTHER_FORMS.fullmatch(name.rpartition("/")[2])]
    folders = {folder_of(name) for name in names if is_shard(name) and name not in others}
    return [name for name in others if folder_of(name) in folders]
