"""Compare a source file with what the target has: keep it, replace it, or report that it is in the way."""

from __future__ import annotations

import dataclasses
import logging
import posixpath
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Literal

from df11.converter.batches import list_tensors
from df11.converter.cast import agrees
from df11.converter.files import (
    DF11,
    Action,
    Assignment,
    container_name,
    folder_of,
    index_names,
    is_shard,
    original_name,
    with_attributes,
)
from df11.converter.index import rewrite_index
from df11.converter.manifest import FILE_NAME, FileRow, Manifest
from df11.converter.output import original_files
from df11.converter.pipeline import least_memory
from df11.converter.plan import Options, Step
from df11.converter.restore_file import restored_layout
from df11.converter.scan import check_described, up_to_date
from df11.converter.source import Progress, Source
from df11.formats import errors, layout
from df11.formats.container import Container, OriginalFile
from df11.storage.entry import Entry
from df11.storage.journal import Mark
from df11.storage.overlay import Overlay
from df11.storage.store import Store, has_content, same_content

log: Final = logging.getLogger("df11")

EXPECTED_RATIOS: Final[Mapping[str, float]] = {
    "BF16": 0.67,
    "F16": 0.855,
    "F32": 0.84,
    "F8_E4M3": 0.84,
    "F8_E5M2": 0.72,
}
"""Size of a record relative to the decoded tensor, by dtype, for estimates only."""
LEAST_RATIOS: Final[Mapping[str, float]] = {
    kind.dtype: kind.least_size(256) / (256 * kind.bytes) for kind in layout.KINDS.values()
}
"""The least that it can be: signs, and the mantissa bits beside them, are not compressed."""
_HEADERS: Final = 1 << 16


class Comparison:
    """Makes the steps of one plan."""

    def __init__(
        self,
        source: Store,
        target: Store,
        action: Action,
        options: Options,
        manifest: Manifest | None,
        progress: Progress,
        indexes: Mapping[str, bytes],
        own: Manifest | None,
        begun: Mapping[str, tuple[Mark, ...]],
    ) -> None:
        self._source, self._target, self._action, self._options = source, target, action, options
        self._progress = progress
        self._indexes = indexes
        self._originals = {} if own is None else own.originals
        self._described = {} if own is None else {row.file: row for row in own.files}
        known = {} if manifest is None else manifest.by_file()
        self._files = {name: row for name, (row, _) in known.items()}
        self._rows = {name: rows for name, (_, rows) in known.items()}
        self._others = {} if manifest is None else dict(manifest.others)
        self._begun = begun
        self.names: Collection[str] = ()
        self.held: Mapping[str, Entry] = {}

    def hold(self, assignments: Sequence[Assignment]) -> None:
        """Look up what the target has."""
        ours = self._files.keys() | self._others.keys() | self._begun.keys()
        self.names = {one.name for one in assignments} | ours | {*self._options.also}
        self.held = self._target.find(self.names)

    def steps(self, assignments: Sequence[Assignment]) -> list[Step]:
        """A step per assignment; those that write from memory come last. Raises if a file is in the way."""
        make = {
            "convert": self._convert,
            "restore": self._restore,
            "copy": self._copy,
            "attributes": self._attributes,
            "index": self._index,
        }
        named = [one for one in assignments if self._check_name(one)]
        steps = [step for one in named if (step := make[one.kind](one)) is not None]
        # A manifest that is copied comes after what it names.
        return sorted(steps, key=lambda step: (step.kind == "write", step.name == FILE_NAME))

    def _check_name(self, one: Assignment) -> bool:
        # One invalid name does not block the other files, unless the model is incomplete without it.
        if self._target.check_name(one.name):
            return True
        name = errors.shortened(one.name)
        if one.kind != "copy" or one.name.endswith(DF11):
            hint = "rename it, or leave it out: --exclude"
            raise errors.UsageError("no file on the Hub can have this name", file=name, hint=hint)
        log.warning("%s: left out, as no file on the Hub can have this name", name)
        return False

    def check_also(self, listed: Mapping[str, Entry]) -> None:
        """Raise if one of the caller's own files would replace somebody's file, unless that is the source's."""
        for name in self._options.also:
            there = self.held.get(name)
            if there is None or (name in listed and same_content(self._source, listed[name], self._target, there)):
                continue
            self.check_free(name)

    def removable(self) -> list[str]:
        """Containers that exist and are df11's, and their index files unless somebody has edited them.

        Nothing else, whatever a manifest names: a forged one must not remove other files.
        """
        known = {**self._files, **self._begun, **self._others}
        shards = [name for name in known if name.endswith(DF11)]
        if self._action in ("restore", "export"):  # Of what is finished nothing is known: it is the user's.
            shards += [name for name in self._begun if is_shard(name)]
        names = [*shards, *(name for name in index_names(known) if DF11 in name)]
        return [name for name in names if name in self.held and self._is_ours(name, self.held[name])]

    def _is_ours(self, name: str, there: Entry) -> bool:
        # By its content, not by its name: somebody may have put another file, or another container, in its place.
        if not self._target.is_direct(name):
            return False
        if any(self._is_marked(mark, there) for mark in self._begun.get(name, ())):
            return True
        row = self._files.get(name)
        if row is None:
            known = self._others.get(name)
            return known is not None and has_content(self._target, there, Entry(name, there.size, known))
        if self._target.versioned:
            return has_content(self._target, there, _entry_of(row))
        return self._is_made_from(name, row.bytes, row.source_sha256)

    def _is_made_from(self, name: str, size: int, sha256: str) -> bool:
        try:
            with Container(self._target.locate(name)) as container:
                return (container.size, container.source.sha256) == (size, sha256)
        except errors.Df11Error:
            return False

    def _is_marked(self, mark: Mark, there: Entry) -> bool:
        if mark.of == "source":
            return self._is_made_from(mark.name, mark.size, mark.sha256)
        return mark.of == "content" and has_content(self._target, there, Entry(mark.name, mark.size, mark.sha256))

    def _step(self, kind: Literal["convert", "restore", "prove", "copy"], one: Assignment) -> Step:
        size, original = one.entry.size, None
        if one.name.endswith(DF11):
            original = one.entry.name if kind == "convert" else original_name(one.entry.name, self._originals)
        there = one.name in self.held
        return Step(kind, one.entry, one.name, original, there=there, least=size, most=size, expected=size)

    # Whether an existing file may be replaced.

    def check_free(self, name: str) -> None:
        """Raise UsageError if the target has a file of this name now that must not be replaced."""
        if self._options.force or self._target.versioned or name == FILE_NAME:
            return
        there = self._target.find([name]).get(name)
        if there is None or self._is_ours(name, there):
            return
        # Of a pull the Hub's own history knows best what was copied from it.
        if self._action != "copy" or not self._source.had(name, self._target.hashed(there)):
            raise already_there(self._target.locate(name), may_force=self._options.may_force)

    # Shards and containers

    def _convert(self, one: Assignment) -> Step:
        step = self._step("convert", one)
        there = self.held.get(one.name)
        if there is not None and self._options.resume:
            if self._target.versioned:
                step = self._compare_by_manifest(step, there)
            else:
                step = self._compare_by_container(step, there)
            if step.kept or step.kind == "prove":
                return step
        self.check_free(one.name)
        with Source(self._source.open(one.entry), max_memory=self._options.max_memory) as source:
            tensors = list_tensors(source.header, self._options.cast, self._options.keep)
            most = sum(tensor.size_as(tensor.dtypes[0]) + layout.RECORD_ALIGNMENT for tensor in tensors)
            least = sum(
                tensor.size_as(dtype) * LEAST_RATIOS.get(dtype, 1) for tensor in tensors for dtype in tensor.dtypes[-1:]
            )
            expected = sum(
                tensor.size_as(dtype) * EXPECTED_RATIOS.get(dtype, 1)
                for tensor in tensors
                for dtype in tensor.dtypes[:1]
            )
            return dataclasses.replace(
                step,
                tensors=len(tensors),
                least=int(least),
                memory=least_memory(source, tensors),
                most=most + _HEADERS + 8 * len(source.header.raw),  # If nothing is compressed.
                expected=int(expected) + layout.RECORD_ALIGNMENT * len(tensors),
            )

    def _compare_by_manifest(self, step: Step, there: Entry) -> Step:
        # In a repository, the manifest says what a container was made from, and the listing that it is unchanged.
        row = self._files.get(step.name)
        if row is None or row.source_bytes != step.entry.size:
            return step
        rows = self._rows.get(step.name, ())
        if not all(self._agrees(row.name, row.exact) for row in rows if row.dtype == "F32" or row.exact is not None):
            return step
        if not has_content(self._target, there, _entry_of(row)):
            return step
        sha256, step = self._source_sha256(step, row.source_sha256, row.made_from, is_known=True)
        return dataclasses.replace(step, kept=True) if sha256 == row.source_sha256 else step

    def _compare_by_container(self, step: Step, there: Entry) -> Step:
        # In a folder, a container itself says what it was made from. It has its name only because it is complete.
        path = self._target.locate(step.name)
        try:
            with Container(path) as container:
                stored, made_from = container.source, container.made_from
                row = self._files.get(step.name)
                is_known = row is not None and _describes(row, step, there, container)
                is_known = is_known and up_to_date(self._rows.get(step.name, ()), container)
                names = [entry.name for entry in container.source_header.entries if entry.dtype == "F32"]
                is_right = all(self._agrees(name, container.info(name).exact) for name in names)
        except (errors.FormatError, errors.SafetensorsError):
            return step
        if stored.bytes != step.entry.size or not is_right:
            return step
        sha256, step = self._source_sha256(step, stored.sha256, made_from, is_known=is_known)
        if sha256 != stored.sha256:
            return step
        if self._options.prove and row is not None and row.sha256 is not None:
            is_known = is_known and self._target.hashed(there).sha256 == row.sha256
        if is_known:
            return dataclasses.replace(step, kept=True, source_sha256=sha256)
        return dataclasses.replace(step, kind="prove", source_sha256=sha256, least=0, expected=0, most=0)

    def _agrees(self, name: str, exact: bool | None) -> bool:
        return agrees(name, exact, self._options.cast, self._options.keep)

    def _source_sha256(
        self, step: Step, before: str, made_from: tuple[OriginalFile, ...], *, is_known: bool
    ) -> tuple[str | None, Step]:
        # Of a file that is made from others, ``before`` if these are the ones that it was made from before, by a
        # manifest that knows the container. What a container says of itself does not prove that it holds them.
        if step.entry.sha256 is not None:
            return step.entry.sha256, step
        if isinstance(self._source, Overlay) and (sources := self._source.made_from(step.entry)):
            if original_files(sources) != made_from:
                return None, step
            if is_known:
                return before, step
        with Source(self._source.open(step.entry), max_memory=self._options.max_memory) as source:
            sha256 = source.sha256(self._progress)
        return sha256, dataclasses.replace(step, counted=True, source_sha256=sha256)

    def _restore(self, one: Assignment) -> Step:
        step = self._step("restore", one)
        there = self.held.get(one.name)
        with Container(self._source.locate(one.entry.name)) as container:
            check_described(self._described.get(one.entry.name), container)
            wanted = restored_layout(container, bf16=self._options.bf16)
            size = wanted.size
            step = dataclasses.replace(step, least=size, most=size, expected=size, tensors=len(container))
            step = dataclasses.replace(step, source_sha256=wanted.sha256)
        if there is None:
            return step
        if there.size == wanted.size:
            if wanted.sha256 is None:
                return dataclasses.replace(step, there=False)  # Only the result tells whether this is the same.
            if self._target.hashed(there).sha256 == wanted.sha256:
                return dataclasses.replace(step, kept=True)
        self.check_free(one.name)
        return step

    # Other files

    def _copy(self, one: Assignment) -> Step:
        is_container = self._action == "copy" and one.name.endswith(DF11)
        step = self._step("prove" if is_container and self._source.address is None else "copy", one)
        there = self.held.get(one.name)
        if there is not None and there.size == one.entry.size:
            entry = self._source.hashed(one.entry)
            if same_content(self._source, entry, self._target, there):
                step = dataclasses.replace(step, source_sha256=entry.sha256)
                is_kept = step.kind == "copy" or self._is_in_manifest(one.name, there)
                return dataclasses.replace(step, kept=True) if is_kept else step
        self.check_free(one.name)
        return step

    def _is_in_manifest(self, name: str, there: Entry) -> bool:
        row = self._files.get(name)
        return row is not None and has_content(self._target, there, _entry_of(row))

    def _index(self, one: Assignment) -> Step:
        folder = folder_of(one.entry.name)

        def rename(shard: str) -> str:
            if self._action == "convert":
                if shard.endswith(DF11):
                    where = self._source.locate(one.entry.name)
                    raise errors.SafetensorsError(f"the index already names {DF11} files", file=where)
                return container_name(shard)
            known = original_name(posixpath.normpath(folder + shard), self._originals)
            return shard.removesuffix(DF11) + known[known.rindex(".") :] if shard.endswith(DF11) else shard

        data = rewrite_index(self._indexes[one.entry.name], rename, self._source.locate(one.entry.name))
        return self._write(one, data)

    def _attributes(self, one: Assignment) -> Step | None:
        # It belongs to its repository: an existing one stays, unless it is a copy.
        there = self.held.get(one.name)
        if self._target.versioned or (there is not None and not self._is_ours(one.name, there)):
            return None
        return self._write(one, with_attributes(self._source.read(one.entry), self._action))

    def _write(self, one: Assignment, data: bytes) -> Step:
        there = self.held.get(one.name)
        kept = there is not None and has_content(self._target, there, Entry.of(one.name, data))
        if not kept:
            self.check_free(one.name)
        size = len(data)
        is_there = there is not None
        return Step("write", one.entry, one.name, None, kept, is_there, data, most=size, expected=size)


def _describes(row: FileRow, step: Step, there: Entry, container: Container) -> bool:
    # Whether a row agrees with what the container itself says: files with the same tensors can have different headers.
    source = container.source
    found = (row.bytes, row.source_file, row.source_bytes, row.source_sha256)
    return found == (there.size, step.entry.name, source.bytes, source.sha256)


def _entry_of(row: FileRow) -> Entry:
    return Entry(row.file, row.bytes, row.sha256)


def already_there(where: str, *, may_force: bool = True) -> errors.UsageError:
    """The error for a file in the target that must not be replaced."""
    hint = "remove it, or pass --force to replace it" if may_force else "remove it, or choose another target"
    return errors.UsageError("this file already exists and was not written by df11", file=where, hint=hint)
