"""Find out what has to be done. Nothing is changed here.

Whatever can be known is found out now. It is better to report what is missing, in the way or too large before the
first byte is written than after the last shard.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from df11.converter.compare import Comparison
from df11.converter.files import (
    DF11,
    SOURCE_SUFFIXES,
    Action,
    Assignment,
    Kind,
    assign,
    check_shards,
    container_name,
    index_names,
    is_shard,
    raise_if_missing,
    second_copies,
    target_names,
)
from df11.converter.index import read_shards
from df11.converter.manifest import FILE_NAME, Manifest, Origin
from df11.converter.plan import Options, Plan
from df11.converter.source import Progress, ignore
from df11.formats import errors
from df11.storage.entry import Entry
from df11.storage.journal import Mark
from df11.storage.names import is_wanted
from df11.storage.store import Store

log: Final = logging.getLogger("df11")

_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER: Final = 1024


def make_plan(
    source: Store,
    target: Store,
    action: Action,
    options: Options,
    *,
    name: str | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> Plan:
    """Compare a source with a target. ``name``: of the target file, if the source is a file.

    ``on_total`` gets the bytes of all files except rewritten ones, ``on_progress`` those of shards that had to be read
    to find out whether they are kept. Raises a Df11Error if the work cannot be done.
    """
    listed = source.list()
    if source.contains(target):
        raise errors.UsageError("the target lies in the source", file=target.label, hint="choose another folder")
    if name is not None:
        manifest, indexes, originals = None, {}, {}
        kinds: dict[Action, Kind] = {"restore": "restore", "export": "copy"}
        one: Assignment = Assignment(kinds.get(action, "convert"), listed[0], name)
        assignments = [one]
    else:
        if target.is_file:
            raise errors.UsageError("the target is a file", file=target.label, hint="name a folder")
        target.refresh()
        # A folder that is restored to has none: what lies there by this name is about another one.
        manifest = None if action in ("restore", "export") else _known_manifest(target)
        check_foreign(target, manifest)
        originals = _originals(source, listed) if action == "restore" else {}
        entries = [entry for entry in listed if is_wanted(entry.name, options.include, options.exclude)]
        assignments = assign(entries, action, originals)
        names = {one.entry.name: one.entry for one in assignments}
        indexes = {name: source.read(names[name]) for name in index_names(names)}
        kept = _kept_before(listed, manifest, action)
        _check_assignments(source, assignments, indexes, action, options, kept, [entry.name for entry in listed])
        if manifest is not None and not options.force:
            _check_origin(manifest, Origin.of(source), target)
    begun = {} if name is not None else _begun(target)
    builder = Comparison(source, target, action, options, manifest, on_progress, indexes, originals, begun)
    builder.hold(assignments)
    stamp = {} if name is not None else target.stamp({*builder.names, FILE_NAME})
    on_total(sum(one.entry.size for one in assignments if one.kind not in ("index", "attributes")))
    steps = builder.steps(assignments)
    builder.check_also({entry.name: entry for entry in listed})
    everything = set() if name is not None else target_names(listed, action, originals)
    everything |= {container_name(shard) if action == "convert" else shard for shard in _named(indexes, source.label)}
    ours = builder.removable()
    stale = tuple(name for name in ours if name not in everything)
    planned = {step.name for step in steps}
    origin = Origin.of(source)
    rows = {} if manifest is None else {row.file: row for row in manifest.files}
    left_out = tuple(name for name in ours if name in rows and name in everything and name not in planned)
    if left_out and manifest is not None and (manifest.cast, _place(manifest.origin)) != (options.cast, _place(origin)):
        what = "this run leaves out a container of another conversion, by its source or cast"
        hint = "convert all of the model, or choose another target"
        raise errors.UsageError(what, file=target.locate(left_out[0]), hint=hint)
    known = Manifest(origin, options.cast, "", (), ()) if manifest is None else manifest
    return Plan(
        source,
        target,
        action,
        options,
        origin,
        tuple(steps),
        builder.held,
        known,
        manifest is not None,
        stale,
        builder.check_free,
        left_out,
        stamp,
        tuple(begun),
    )


def _place(origin: Origin) -> tuple[str | None, str]:
    return origin.repository, origin.path


def _check_origin(manifest: Manifest, origin: Origin, target: Store) -> None:
    # Two repositories are two models: one would take the other's place.
    mine, theirs = _place(origin), _place(manifest.origin)
    if manifest.files and None not in (mine[0], theirs[0]) and mine != theirs:
        what = "the target holds another model"
        found = f"hf://{theirs[0]}" + (f"/{theirs[1]}" if theirs[1] else "")
        raise errors.UsageError(what, file=target.label, found=found, hint="choose another target, or pass --force")


def _named(indexes: Mapping[str, bytes], where: str) -> set[str]:
    # The shards that index files name, there or not.
    return {
        posixpath.normpath(index[: index.rfind("/") + 1] + shard)
        for index, data in indexes.items()
        for shard in read_shards(data, f"{where}/{index}").values()
    }


def check_foreign(target: Store, manifest: Manifest | None) -> None:
    """Raise UsageError for a repository with weights but no manifest of ours: it is probably a mistake."""
    if target.versioned and (manifest is None or not manifest.files):
        for name in target.find(()):
            if name.endswith((DF11, *SOURCE_SUFFIXES)):
                what = "the target holds weights that df11 did not put there"
                raise errors.UsageError(what, file=target.locate(name), hint="choose another repository")


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a store; None if it has none. Raises ManifestError if it cannot be read."""
    entry = store.find([FILE_NAME]).get(FILE_NAME)
    if entry is None:
        return None
    from df11.converter import parquet  # It imports pyarrow, which takes memory.

    return parquet.from_bytes(_read_large(store, entry, parquet.MAX_BYTES), store.locate(FILE_NAME))


def _known_manifest(target: Store) -> Manifest | None:
    # The target's manifest. In a folder, an unreadable one counts as none: a new one is made from the containers.
    try:
        return read_manifest(target)
    except (errors.ManifestError, errors.MissingExtraError):
        if target.versioned:
            raise
        return None


def _begun(target: Store) -> Mapping[str, tuple[Mark, ...]]:
    journal = target.journal()
    return {} if journal is None else journal.left()


def _read_large(store: Store, entry: Entry, most: int) -> bytes:
    if entry.size > most:
        what = "too large for a manifest"
        raise errors.ManifestError(what, file=store.locate(entry.name), expected=f"at most {most} bytes")
    with store.open(entry) as file:
        data = b"".join(chunk.tobytes() for chunk in file.chunks())
    if entry.is_hashed:
        entry.check(Entry.of(entry.name, data), store.locate(entry.name))
    return data


def _originals(source: Store, listed: Sequence[Entry]) -> dict[str, str]:
    # The names of the shards that this folder's containers were made from.
    if not any(entry.name == FILE_NAME for entry in listed):
        return {}
    try:
        manifest = read_manifest(source)
    except (errors.ManifestError, errors.MissingExtraError):
        return {}  # Restoring does not need it.
    return {} if manifest is None else {row.file: row.source_file for row in manifest.files}


def _kept_before(listed: Sequence[Entry], manifest: Manifest | None, action: Action) -> list[str]:
    # Shards of the source whose containers the target has from an earlier run, whether or not this one leaves them out.
    files = set() if manifest is None else {row.file for row in manifest.files}
    rename = container_name if action == "convert" else str
    return [entry.name for entry in listed if rename(entry.name) in files]


def _check_assignments(
    source: Store,
    assignments: Sequence[Assignment],
    indexes: Mapping[str, bytes],
    action: Action,
    options: Options,
    kept: Collection[str],
    all_names: Collection[str],
) -> None:
    wanted = DF11 if action in ("restore", "copy") else ".safetensors"
    names = [one.entry.name for one in assignments]
    is_one = is_shard if wanted != DF11 else lambda name: name.endswith(DF11)
    if not any(map(is_one, names)) and not (action == "convert" and any(one.endswith(".safetensors") for one in names)):
        hint = "check the path"
        if options.include or options.exclude:
            hint += ", and the patterns to include and exclude"
        raise errors.SafetensorsError(f"no {wanted} file in this folder", file=source.label, hint=hint)
    for name, error in source.refused.items():
        if is_wanted(name, options.include, options.exclude):
            raise error
    if action == "convert" and any(entry == FILE_NAME for entry in all_names):
        log.warning("%s: left out, as it is about another conversion", source.locate(FILE_NAME))
    for remark in source.remarks:
        log.warning("%s: %s", source.label, remark)
    copies = second_copies(names) if action == "convert" else []
    if copies:
        more = f" and {len(copies) - 1} more" if len(copies) > 1 else ""
        what = "by its name, the model in another format, beside its shards"
        log.warning("%s%s: %s; --exclude leaves it out", source.locate(copies[0]), more, what)
    _check_pointers(source, assignments)
    found = check_shards(indexes, [*names, *kept], source.label)
    if not options.allow_missing:
        raise_if_missing(found, source.label)
    for index, shard in found.missing:
        log.warning("%s: names %s, which does not exist", source.locate(index), shard)
    for name in sorted({*found.unnamed} & {*names} - {*copies}):
        log.warning("%s: the index beside it does not name this file", source.locate(name))


def _check_pointers(source: Store, assignments: Sequence[Assignment]) -> None:
    # What git leaves in place of a file that it has not fetched. The Hub never lists one.
    if source.address is not None:
        return
    for one in assignments:
        if len(_POINTER) <= one.entry.size <= _LONGEST_POINTER and source.read(one.entry).startswith(_POINTER):
            hint = "fetch the files themselves: git lfs pull"
            raise errors.SafetensorsError(
                "this is a Git LFS pointer, not the file", file=source.locate(one.entry.name), hint=hint
            )
