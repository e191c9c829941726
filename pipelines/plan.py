"""What a job has to do for one model: compare the source with what the target holds, and say what is needed. Nothing is changed."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from df11.converter.files import SourceFile, open_tree
from df11.converter.manifest import FILE_NAME, TOOL, FileRow, Manifest, Origin
from df11.converter.plan import plan_tensors
from df11.converter.tree import DF11, SAFETENSORS, plan_names, rewrite_index
from df11.formats import errors, layout
from df11.formats.hub import Address
from df11.pipelines.card import CONFIGS, CardFields, plot_paths, render_card
from df11.pipelines.job import Limits, Model
from df11.pipelines.plots import FOLDER
from df11.pipelines.target import IN_MEMORY, Digest, HubTarget, Target, open_target, read_manifest

CARD: Final = "README.md"
SMALL: Final = 1 << 20
"""Files up to this size are read into memory and go into the last commit; each larger one is a task of its own."""
OVERHEAD: Final = 48 << 20
"""Bytes that the job needs besides the conversion: the Hub's client, an upload under way, the manifest."""
_BOOKKEEPING: Final = frozenset({".gitattributes", ".gitignore", FILE_NAME})
_EXPECTED_RATIO: Final = 0.67
"""Of a container's size to BF16: for estimates only."""
_HEADERS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Item:
    """A file of the source and what becomes of it. ``kept``: the target has it already."""

    kind: Literal["convert", "container", "copy", "index"]
    file: SourceFile
    name: str
    kept: bool
    most: int
    """Bytes that it can have in the target, at most."""
    expected: int
    """Bytes that it will have, about."""
    digest: Digest | None = None
    """Of a file that is copied as it is."""

    @property
    def is_task(self) -> bool:
        """Whether it is brought to the target on its own, not with the small files of the last commit."""
        return self.kind in ("convert", "container") or (self.kind == "copy" and self.file.size > SMALL)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """All that is known before the work on one model begins."""

    model: Model
    origin: Origin
    target: Target
    held: Mapping[str, Digest]
    """What the target holds now."""
    manifest: Manifest
    """The target's, or an empty one; its rows of files that are kept hold on."""
    items: tuple[Item, ...]
    source_card: SourceFile | None
    stale: tuple[str, ...]
    """Files of an earlier run that this source has no longer."""
    disk: int
    """Bytes that finished files take at most while they wait for their upload, two at a time."""
    disk_for_one: int
    """The same one at a time."""

    @property
    def tasks(self) -> list[Item]:
        """Items that need work of their own."""
        return [item for item in self.items if item.is_task and not item.kept]


def plan_model(model: Model, limits: Limits) -> ModelPlan:
    """Look at source and target. Raises a Df11Error if the job cannot be done."""
    tree = open_tree(model.source)
    if tree.is_file:
        raise errors.UsageError("a job converts folders and repositories", file=model.source, hint="for one file: df11-convert")
    target = open_target(model.target, private=model.private)
    held = target.look()
    known = read_manifest(target, held)
    if known is None:
        _check_foreign(held, target)
    manifest = Manifest(tree.origin, model.cast, TOOL, (), ()) if known is None else known
    files = [file for file in tree.files if not _is_left_out(file.name, model.exclude)]
    card = next((file for file in files if file.name == PurePosixPath(CARD)), None)
    rows = {row.source_file: row for row in manifest.files} if manifest.cast == model.cast else {}
    items = []
    for kind, file, name in plan_names([file for file in files if file is not card], SAFETENSORS, DF11):
        if kind == "index":
            index_bytes(file)  # Better found now than after the shards.
        items.append(_plan_item(kind, file, name.as_posix(), target, held, rows.get(file.name.as_posix()), model))
    if not any(item.kind == "convert" for item in items):
        raise errors.SafetensorsError(f"no {SAFETENSORS} file", file=tree.label, hint="check the source, and what the job excludes")
    stale = [row.file for row in manifest.files if row.file in held and row.file not in {item.name for item in items}]
    plan = ModelPlan(model, tree.origin, target, held, manifest, tuple(items), card, tuple(stale), *_disk_needs(target, items))
    _check_disk(plan, limits)
    render(plan, manifest)  # What is wrong with the card is better found now.
    return plan


def plan_push(folder: Path, address: Address, *, private: bool) -> ModelPlan:
    """The plan for a converted folder that is there already. Raises a Df11Error if it is none."""
    tree = open_tree(folder)
    if tree.is_file or not any(file.name.name.endswith(DF11) for file in tree.files):
        raise errors.UsageError(
            f"no {DF11} file in this folder" if not tree.is_file else "this is a file", file=folder, hint="name a converted folder"
        )
    if address.path:
        raise errors.UsageError("the target is a repository without a folder in it", file=str(address))
    target = HubTarget(address, private)
    held = target.look()
    known = read_manifest(target, held)
    if known is None:
        _check_foreign(held, target)
    path = folder / FILE_NAME
    own = Manifest.from_bytes(path.read_bytes(), path) if path.is_file() else None
    origin, cast = (own.origin, own.cast) if own is not None else (Origin(), None)
    manifest = known or Manifest(origin, cast, TOOL, (), ())
    rows = {row.file: row for row in manifest.files}
    items = []
    for file in tree.files:
        name = file.name.as_posix()
        if _is_left_out(file.name, ()) or name == CARD or name.startswith(f"{FOLDER}/"):
            continue
        digest = Digest.of_source(file)
        kept = name in held and bool(digest.agrees(held[name]))
        if name.endswith(DF11):
            kept = kept and name in rows and rows[name].sha256 == digest.sha256
            items.append(Item("container", file, name, kept, file.size, file.size))
        else:
            items.append(Item("copy", file, name, kept, file.size, file.size, digest))
    items.sort(key=lambda item: item.kind == "copy")
    card = next((file for file in tree.files if file.name == PurePosixPath(CARD)), None)
    stale = [row.file for row in manifest.files if row.file in held and row.file not in {item.name for item in items}]
    model = Model(str(folder), str(address), cast, private, (), CardFields())
    plan = ModelPlan(model, origin, target, held, manifest, tuple(items), card, tuple(stale), 0, 0)
    render(plan, manifest)
    return plan


def _disk_needs(target: Target, items: Sequence[Item]) -> tuple[int, int]:
    # For two files at a time, and for one; a folder holds them in the end anyhow.
    sizes = [item.most for item in items if item.is_task and not item.kept] if target.folder is None else []
    one = max(sizes, default=0)
    return max([a + b for a, b in itertools.pairwise(sizes)], default=one), one


def render(plan: ModelPlan, manifest: Manifest) -> str:
    """The card of the target, once it holds what the manifest says."""
    source = None if plan.source_card is None else plan.source_card.read_bytes().decode("utf-8", "replace")
    configs = {item.name: item.file.read_bytes().decode("utf-8", "replace") for item in plan.items if item.name in CONFIGS}
    repository = plan.model.target.removeprefix("hf://") if plan.target.folder is None else None
    return render_card(manifest, plan.model.card, source, repository=repository, plots=plot_paths(manifest), configs=configs)


def index_bytes(file: SourceFile) -> bytes:
    """An index file as it is in the target. Raises SafetensorsError if it is none."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise errors.SafetensorsError("not an index of safetensors shards", file=file.label) from None
    return rewrite_index(text, SAFETENSORS, DF11, file.label).encode()


def _is_left_out(name: PurePosixPath, exclude: tuple[str, ...]) -> bool:
    return name.as_posix() in _BOOKKEEPING or any(fnmatch.fnmatchcase(name.as_posix(), pattern) for pattern in exclude)


def _check_foreign(held: Mapping[str, Digest], target: Target) -> None:
    # A repository of somebody's weights, without a manifest of ours, is most likely a mistake in the job.
    if target.folder is None:
        for name in held:
            if name.endswith((SAFETENSORS, DF11)):
                raise errors.UsageError(
                    "the target holds weights that no job has written", file=f"{target.label}/{name}", hint="name another repository"
                )


def _plan_item(kind: str, file: SourceFile, name: str, target: Target, held: Mapping[str, Digest], row: FileRow | None, model: Model) -> Item:
    there = held.get(name)
    if kind == "convert":
        kept = (
            there is not None
            and row is not None
            and row.file == name
            and _is_of(file, row)
            and _is_same(Digest(row.bytes, row.sha256), there, target, name)
        )
        most, expected = (0, 0) if kept else _container_size(file, model)
        return Item("convert", file, name, kept, most, expected)
    if kind == "index":
        return Item("index", file, name, False, file.size * 2, file.size)
    digest = Digest.of_source(file)
    kept = there is not None and _is_same(digest, there, target, name)
    return Item("copy", file, name, kept, file.size, file.size, digest)


def _is_of(file: SourceFile, row: FileRow) -> bool:
    # The manifest says that the container was made of this very file.
    return row.source_bytes == file.size and row.source_sha256 == (_hash(file) if file.sha256 is None else file.sha256)


def _is_same(wanted: Digest, there: Digest, target: Target, name: str) -> bool:
    agrees = wanted.agrees(there)
    if agrees is None and there.sha256 is None and there.size <= IN_MEMORY:  # The Hub lists a hash of another kind.
        agrees = wanted.agrees(Digest.of(target.read(name)))
    return bool(agrees)


def _hash(file: SourceFile) -> str:
    with file.open() as source:
        return source.sha256(lambda _: None)


def _container_size(file: SourceFile, model: Model) -> tuple[int, int]:
    # The most bytes that the container can have (nothing is coded), and about how many it will.
    with file.open() as source:
        plans = plan_tensors(source.header, model.cast)
        header = _HEADERS + 8 * len(source.header.raw)
    most = sum(plan.target_size + layout.RECORD_ALIGNMENT for plan in plans)
    coded = sum(plan.target_size for plan in plans if plan.target_dtype == "BF16")
    return most + header, int(most - coded * (1 - _EXPECTED_RATIO))


def _check_disk(plan: ModelPlan, limits: Limits) -> None:
    if limits.disk is not None and plan.disk_for_one > limits.disk:
        largest = max(plan.tasks, key=lambda item: item.most)
        raise errors.BudgetError(
            "the disk budget is too small for this file",
            file=largest.file.label,
            expected=f"[limits] disk of at least {largest.most:,} bytes",
            found=f"{limits.disk:,}",
        )
