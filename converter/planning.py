"""Find out what has to be done. Nothing is changed here.

Whatever can be known is found out now. It is better to report what is missing, in the way or too large before the
first byte is written than after the last shard.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Final

from df11.converter.compare import Comparison
from df11.converter.files import (
    DF11,
    SAFETENSORS,
    SOURCE_SUFFIXES,
    Action,
    Assignment,
    Kind,
    assign,
    check_shards,
    container_name,
    index_names,
    is_shard,
    named_files,
    raise_if_missing,
    renamed,
    second_copies,
    target_names,
)
from df11.converter.index import split_index_name
from df11.converter.manifest import FILE_NAME, Manifest, Origin, is_text, read_manifest
from df11.converter.plan import Options, Plan
from df11.converter.source import Progress, ignore
from df11.formats import errors
from df11.storage.entry import Entry
from df11.storage.journal import Mark, Run
from df11.storage.names import check_together, is_wanted
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
    own: Manifest | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> Plan:
    """Compare a source with a target.

    ``name``: of the target file, if the source is a file. ``own``: the source's manifest, if what is copied from there
    is to be described by it.

    ``on_total`` gets the bytes of all files except rewritten ones, ``on_progress`` those of shards that had to be read
    to find out whether they are kept. Raises a Df11Error if the work cannot be done.
    """
    listed = source.list()
    if source.contains(target):
        raise errors.UsageError("the target lies in the source", file=target.label, hint="choose another folder")
    if name is not None:
        manifest, indexes, originals, old_names = None, {}, {}, {}
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
        if action == "restore":
            own = _own_manifest(source, listed, options)
        entries = [entry for entry in listed if is_wanted(entry.name, options.include, options.exclude)]
        originals = {} if own is None else own.originals
        assignments = assign(entries, action, originals)
        if action == "convert" and not target.versioned:  # A repository says itself which names it cannot have.
            _check_text(source, assignments)
        made = [FILE_NAME] if action == "convert" else []
        check_together([*(one.name for one in assignments), *options.also, *made])
        names = {one.entry.name: one.entry for one in assignments}
        indexes = {name: source.read(names[name]) for name in index_names(names)}
        old_names = {} if own is None else dict(own.renamed)
        if action == "convert":
            old_names = renamed(assignments, indexes, source.label)
        kept = _kept_before(listed, manifest, action)
        all_names = {entry.name for entry in listed}
        _check_assignments(source, assignments, indexes, action, options, kept, all_names, own)
        if manifest is not None and not options.force:
            _check_origin(manifest, Origin.of(source), target)
    run = _run_of(source, action)
    begun = {} if name is not None else _begun(target, run)
    builder = Comparison(source, target, action, options, manifest, on_progress, indexes, own, begun)
    builder.hold(assignments)
    stamp = target.stamp({*builder.names, FILE_NAME})
    on_total(sum(one.entry.size for one in assignments if one.kind not in ("index", "attributes")))
    steps = builder.steps(assignments)
    builder.check_also({entry.name: entry for entry in listed})
    ours = builder.removable()
    named = {container_name(shard) if action == "convert" else shard for _, shard in named_files(indexes, source.label)}
    there = named | target_names(_names_there(source, listed), action, originals)
    stale = tuple(name for name in ours if there.isdisjoint({name, *_folders_of(name)}))
    planned = {step.name for step in steps}
    done_with = planned.union(stale)
    staying = [name for name in ours if name not in done_with]
    origin = Origin.of(source)
    rows = {} if manifest is None else {row.file: row for row in manifest.files}
    left_out = tuple(name for name in staying if name in rows)
    if left_out and manifest is not None and (manifest.cast, _place(manifest.origin)) != (options.cast, _place(origin)):
        what = "this run leaves out a container of another conversion, by its source or cast"
        hint = "convert all of the model, or choose another target"
        raise errors.UsageError(what, file=target.locate(left_out[0]), hint=hint)
    known = Manifest(origin, options.cast, "", (), ()) if manifest is None else manifest
    if any(map(split_index_name, staying)):  # Such an index needs what the manifest has said of it.
        named_now = planned | named
        old_names = {name: old for name, old in known.renamed if name not in named_now} | old_names
    described = {name for name in (*planned, *left_out) if name.endswith(DF11)}  # By rows.
    return Plan(
        source,
        target,
        action,
        options,
        origin,
        tuple(steps),
        builder.held,
        known,
        {name: old for name, old in old_names.items() if name not in described},
        manifest is not None,
        stale,
        builder.check_free,
        left_out,
        stamp,
        tuple(begun),
        run,
    )


def _place(origin: Origin) -> tuple[str | None, str]:
    return origin.repository, origin.path


def _names_there(source: Store, listed: Sequence[Entry]) -> list[str]:
    # All that has a name in the source, also what cannot be read now: a link may lead to a disk that is away.
    return [*(entry.name for entry in listed), *(name.removesuffix("/") for name in source.refused)]


def _folders_of(name: str) -> list[str]:
    return [str(folder) for folder in PurePosixPath(name).parents[:-1]]


def _check_origin(manifest: Manifest, origin: Origin, target: Store) -> None:
    # Two repositories are two models: one would take the other's place.
    mine, theirs = _place(origin), _place(manifest.origin)
    if manifest.files and None not in (mine[0], theirs[0]) and mine != theirs:
        what = "the target holds another model"
        found = f"hf://{theirs[0]}" + (f"/{theirs[1]}" if theirs[1] else "")
        raise errors.UsageError(what, file=target.label, found=found, hint="choose another target, or pass --force")


def check_foreign(target: Store, manifest: Manifest | None) -> None:
    """Raise UsageError for a repository with weights but no manifest of ours: it is probably a mistake."""
    if target.versioned and (manifest is None or not manifest.files):
        for name in target.find(()):
            if name.endswith((DF11, *SOURCE_SUFFIXES)):
                what = "the target holds weights that df11 did not put there"
                raise errors.UsageError(what, file=target.locate(name), hint="choose another repository")


def _known_manifest(target: Store) -> Manifest | None:
    # The target's manifest. In a folder, an unreadable one counts as none: a new one is made from the containers.
    try:
        return read_manifest(target)
    except (errors.ManifestError, errors.MissingExtraError) as error:
        if target.versioned:
            raise
        log.warning("%s: it counts as missing", error)
        return None


def _run_of(source: Store, action: Action) -> Run:
    # Another commit of a repository is the same source, changed.
    address = source.address
    where = Path(source.label).absolute() if address is None else dataclasses.replace(address, revision=None)
    return Run(action, str(where))


def _begun(target: Store, run: Run) -> Mapping[str, tuple[Mark, ...]]:
    journal = target.journal()
    return {} if journal is None else journal.left(run)


def check_ended(source: Store, action: Action) -> None:
    """Raise ConflictError if a run that fills a folder has not ended, so that this is not all of a model."""
    journal = source.journal()
    if journal is not None and journal.is_there:
        what = "a run that fills this folder has not ended"
        hint = f"run it again, or remove {journal.path.name} there to {action} what it has written"
        raise errors.ConflictError(what, file=source.label, hint=hint)


def _own_manifest(source: Store, listed: Sequence[Entry], options: Options) -> Manifest | None:
    # Of the folder that is restored: it alone knows a shard that was called .sft, or a container in another's place.
    check_ended(source, "restore")
    suffix = f"shards and indexes get the suffix {SAFETENSORS}, whatever it was"
    if not any(entry.name == FILE_NAME and is_wanted(FILE_NAME, (), options.exclude) for entry in listed):
        if any(entry.name.endswith(DF11) for entry in listed):
            log.warning("%s: without %s, %s", source.label, FILE_NAME, suffix)
        return None
    try:
        manifest = read_manifest(source)
    except (errors.ManifestError, errors.MissingExtraError) as error:
        error.hint = f"{error.hint or 'get it again'}, or leave it out: --exclude {FILE_NAME}; then {suffix}"
        raise
    assert manifest is not None
    return manifest


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
    all_names: Set[str],
    own: Manifest | None,
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
    if action == "convert" and FILE_NAME in all_names:
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
    rows = set() if own is None else {row.file for row in own.files}
    gone = rows - all_names - {name for _, name in found.missing}
    gone = {name for name in gone if is_wanted(name, options.include, options.exclude)}
    found = dataclasses.replace(found, missing=(*found.missing, *((FILE_NAME, name) for name in sorted(gone))))
    if not options.allow_missing:
        raise_if_missing(found, source.label)
    for index, shard in found.missing:
        log.warning("%s: names %s, which does not exist", source.locate(index), shard)
    for name in sorted({*found.unnamed} & {*names} - {*copies}):
        log.warning("%s: the index beside it does not name this file", source.locate(name))


def _check_text(source: Store, assignments: Sequence[Assignment]) -> None:
    # A manifest could not tell two of them apart, and nothing could give them back.
    for one in assignments:
        if not is_text(one.entry.name):
            what = "the name of this file is not UTF-8"
            hint = "rename it, or leave it out: --exclude"
            raise errors.UsageError(what, file=ascii(source.locate(one.entry.name)), hint=hint)


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
