"""Write a converted model in another layout: as DFloat11's loaders read it, or as plain safetensors files."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from df11.converter.apply import apply_plan
from df11.converter.convert import open_target
from df11.converter.dfloat11.exported import MadeFile, Tensor, count_unit, held_tensors, restored_tensors
from df11.converter.dfloat11.layout import CONFIG_KEY, THREAD_BYTES, THREADS, read_config
from df11.converter.dfloat11.selection import Patterns, Selection, select
from df11.converter.files import (
    CONFIG,
    DF11,
    SAFETENSORS,
    Completeness,
    folder_of,
    index_names,
    original_name,
    raise_if_missing,
)
from df11.converter.index import rewrite_index
from df11.converter.manifest import FILE_NAME, read_manifest
from df11.converter.options import DEFAULT_MEMORY
from df11.converter.plan import Options
from df11.converter.planning import check_ended, make_plan
from df11.converter.settings import Settings, parse_size, thread_count
from df11.converter.source import Progress, ignore
from df11.formats import errors, framing, json_text
from df11.storage.entry import Entry
from df11.storage.local import LocalStore
from df11.storage.overlay import Overlay
from df11.storage.paths import read_file
from df11.storage.store import MAX_WHOLE_BYTES, open_source

Layout = Literal["dfloat11", "safetensors"]
VERSION: Final = "0.5.0"
"""What dfloat11_config says: the release whose encoder writes this layout. No loader looks at it."""
MODEL_TYPE: Final = "llama"
"""Of a config.json that names none: DFloat11 0.2 and 0.3 ask transformers for it, and ignore the answer."""


_FILE_NAME: Final = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file that was written, or that was there already."""

    output: str
    bytes: int
    status: Literal["written", "kept"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What :func:`export` did."""

    files: tuple[ExportedFile, ...]
    units: int
    """Units in DFloat11's layout."""
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


def export(
    model: str | Path,
    out: str | Path,
    to: str,
    *,
    patterns: str | Path | None = None,
    file_per_unit: bool = False,
    threads: int | None = None,
    force: bool = False,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> ExportReport:
    """Write ``model``, a `.df11` file or a folder of them, to ``out`` in another layout.

    ``to="safetensors"``: a safetensors file for each container, with decoded tensors in the dtypes
    of the source, and index files that name them.
    ``to="dfloat11"``: what DFloat11's loaders read, from 0.2.0 to 0.5.0. Its units are those of a known model, or of
    ``patterns``, a JSON file with a ``pattern_dict`` like theirs, or a config.json that has one. All of a model go to
    one file; with ``file_per_unit``, each to one of its own.

    Nothing is rounded: the same tensors come back. Raises a Df11Error, with the tensor's name if that layout cannot
    hold it. Progress is in bytes, decoded or written.
    """
    started = time.monotonic()
    if to not in get_args(Layout):
        raise errors.UsageError("--to", expected=" or ".join(get_args(Layout)), found=to)
    if to != "dfloat11" and (patterns is not None or file_per_unit):
        raise errors.UsageError("--patterns and --file-per-unit are for --to dfloat11", hint="leave them out")
    settings = Settings(thread_count(threads), parse_size(DEFAULT_MEMORY), None, verify=True)
    store = open_source(Path(model))
    assert isinstance(store, LocalStore)
    if not any(entry.name.endswith(DF11) for entry in store.list()):
        what = f"no {DF11} file" if store.is_file else f"no {DF11} file in this folder"
        raise errors.UsageError(what, file=str(model), hint="convert the model first: df11-convert")
    if not store.is_file:
        _check_whole(store)
    target, name = open_target(store, Path(out))
    maker = _Maker(store, settings.threads, on_progress)
    if to == "safetensors":
        source = maker.plain()
    else:
        if store.is_file and file_per_unit:
            raise errors.UsageError("--file-per-unit is for model folders", file=str(model), hint="leave it out")
        wanted = None if patterns is None else _read_patterns(Path(patterns))
        source = maker.dfloat11(wanted, on_total, file_per_unit=file_per_unit)
    plan = make_plan(source, target, "export", Options(force=force), name=name, on_progress=on_progress)
    if to == "dfloat11" and not store.is_file:
        _check_others(target, {step.name for step in plan.steps})
    on_total(maker.counted + sum(step.entry.size for step in plan.steps))
    on_progress(sum(step.entry.size for step in plan.steps if step.kept))
    apply_plan(plan, settings, progress=on_progress)
    files = tuple(
        ExportedFile(target.locate(step.name), step.entry.size, "kept" if step.kept else "written")
        for step in plan.steps
        if step.name.endswith(SAFETENSORS) or name is not None
    )
    return ExportReport(files, maker.units, time.monotonic() - started)


def _check_whole(store: LocalStore) -> None:
    # Nobody would see that a container is missing in what is exported.
    check_ended(store, "export")
    manifest = read_manifest(store)
    if manifest is not None:
        gone = {row.file for row in manifest.files} - {entry.name for entry in store.list()}
        found = Completeness(tuple((FILE_NAME, name) for name in sorted(gone)), ())
        raise_if_missing(found, store.label, may_allow=False)


class _Maker:
    # Shows a converted model as the files that it is exported to.

    def __init__(self, store: LocalStore, threads: int, progress: Progress) -> None:
        self._store, self._threads, self._progress = store, threads, progress
        self._listed = store.list()
        self._folders: dict[str, list[Entry]] = {}
        for entry in self._listed:
            if entry.name.endswith(DF11):
                self._folders.setdefault(folder_of(entry.name), []).append(entry)
        self.units = 0
        self.counted = 0
        """Decoded bytes of all units, which are read to choose their codes."""

    def plain(self) -> Overlay:
        """With a safetensors file for each container."""
        made: dict[str, MadeFile] = {}
        texts: dict[str, bytes] = {}
        for folder in self._folders:
            made |= self._plain_files(folder)
            texts |= self._plain_indexes(folder)
        return self._overlay(made, texts)

    def dfloat11(self, patterns: Patterns | None, on_total: Callable[[int], None], *, file_per_unit: bool) -> Overlay:
        """With checkpoints of DFloat11, of models that are known or have tensors that ``patterns`` fit."""
        made: dict[str, MadeFile] = {}
        texts: dict[str, bytes] = {}
        configs = {folder: self._config(folder) for folder in self._folders}
        chosen = {folder: self._select(folder, configs[folder], patterns) for folder in self._folders}
        parts = [part for one in chosen.values() for unit in one.units.values() for part in unit]
        if not parts:
            what = "no model is known that has such BF16 tensors as this one"
            hint = "name its layers: --patterns FILE, with a pattern_dict as in DFloat11's config.json"
            raise errors.CheckpointError(what, file=self._store.label, hint=hint)
        self.counted = sum(part.size for part in parts)
        on_total(self.counted)
        for folder, selection in chosen.items():
            if not selection.units:
                made |= self._plain_files(folder)
                texts |= self._plain_indexes(folder)
                continue
            for name, file in self._files(folder, selection, file_per_unit=file_per_unit):
                if name in made:
                    raise errors.UsageError("two units would be written to this file", file=name)
                made[name] = file
            if not self._store.is_file:
                texts[folder + CONFIG] = _config_of(configs[folder], selection.patterns)
        return self._overlay(made, texts)

    def _overlay(self, made: Mapping[str, MadeFile], texts: Mapping[str, bytes]) -> Overlay:
        indexes = [name for name in index_names(entry.name for entry in self._listed) if DF11 in name]
        containers = [entry.name for files in self._folders.values() for entry in files]
        return Overlay(self._store, made, texts, [*containers, *indexes, FILE_NAME])

    def _plain_files(self, folder: str) -> dict[str, MadeFile]:
        return {
            original_name(entry.name, {}): MadeFile.of(restored_tensors(self._store, entry), (), self._threads)
            for entry in self._folders[folder]
        }

    def _plain_indexes(self, folder: str) -> dict[str, bytes]:
        texts = {}
        for entry in self._listed:
            if folder_of(entry.name) == folder and DF11 in entry.name and index_names([entry.name]):
                data = self._store.read(entry)
                where = self._store.locate(entry.name)
                name = entry.name.replace(DF11 + ".index", SAFETENSORS + ".index")
                texts[name] = rewrite_index(data, lambda shard: original_name(shard, {}), where)
        return texts

    def _config(self, folder: str) -> Mapping[str, Any]:
        entry = None if self._store.is_file else self._store.find([folder + CONFIG]).get(folder + CONFIG)
        if entry is None:
            return {}
        where = self._store.locate(entry.name)
        found = json_text.parse(
            self._store.read(entry), what="config.json", where={"file": where}, error=errors.CheckpointError
        )
        return found if isinstance(found, dict) else {}

    def _select(self, folder: str, config: Mapping[str, Any], patterns: Patterns | None) -> Selection:
        tensors: dict[str, Tensor] = {}
        for entry in self._folders[folder]:
            for tensor in held_tensors(self._store, entry):
                if tensor.entry.name in tensors:
                    what = "this tensor is in two files"
                    where = self._store.locate(entry.name)
                    raise errors.CheckpointError(what, file=where, tensor=tensor.entry.name)
                tensors[tensor.entry.name] = tensor
        return select(tensors, config, patterns, self._store.locate(folder or self._folders[folder][0].name))

    def _files(self, folder: str, selection: Selection, *, file_per_unit: bool) -> Iterator[tuple[str, MadeFile]]:
        units = [
            count_unit(self._store, name, parts, self._threads, self._progress)
            for name, parts in selection.units.items()
        ]
        self.units += len(units)
        rest = list(selection.plain)
        if file_per_unit:
            if odd := next((unit.name for unit in units if not _FILE_NAME.fullmatch(unit.name)), None):
                what, hint = "no file can have the name of this unit", "leave out --file-per-unit"
                raise errors.CheckpointError(what, file=self._store.label, tensor=odd, hint=hint)
            for unit in units:  # With all that is below its module, as DFloat11's own encoder does it.
                own = [one for one in rest if one.entry.name.startswith(unit.name + ".")]
                rest = [one for one in rest if one not in own]
                yield f"{folder}{unit.name.replace('.', '_')}{SAFETENSORS}", MadeFile.of(own, [unit], self._threads)
            units = []
        if units or rest:
            first = posixpath.basename(self._folders[folder][0].name)
            stem = "diffusion_pytorch_model" if first.startswith("diffusion_pytorch_model") else "model"
            yield f"{folder}{stem}{SAFETENSORS}", MadeFile.of(rest, units, self._threads)


def _check_others(target: LocalStore, names: Collection[str]) -> None:
    # DFloat11's loader takes every safetensors file in a folder for a part of the checkpoint.
    folders = {folder_of(name) for name in names if name.endswith(SAFETENSORS)}
    for entry in target.list():
        if entry.name.endswith(SAFETENSORS) and entry.name not in names and folder_of(entry.name) in folders:
            what = "DFloat11's loader would load this file, too"
            hint = "remove it, or choose another target"
            raise errors.UsageError(what, file=target.locate(entry.name), hint=hint)


def _config_of(config: Mapping[str, Any], patterns: Patterns) -> bytes:
    ours = {
        "version": VERSION,
        "threads_per_block": [THREADS],
        "bytes_per_thread": THREAD_BYTES,
        "pattern_dict": {pattern.text: list(parts) for pattern, parts in patterns},
    }
    return framing.indented_json({**config, CONFIG_KEY: ours, "model_type": config.get("model_type", MODEL_TYPE)})


def _read_patterns(path: Path) -> Patterns:
    # A pattern_dict, or a config.json that has one.
    data = read_file(path, MAX_WHOLE_BYTES)
    found = json_text.parse(data, what="the patterns", where={"file": path}, error=errors.CheckpointError)
    if isinstance(found, dict) and CONFIG_KEY not in found:
        found = {CONFIG_KEY: {"threads_per_block": [THREADS], "bytes_per_thread": 8, "pattern_dict": found}}
    config = read_config(framing.compact_json(found), str(path))
    if config is None or not config.patterns:
        raise errors.UsageError("there is no pattern_dict in this file", file=path)
    return config.patterns
