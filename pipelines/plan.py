"""What a job has to do for one model: compare the source with what the target holds, and say what is needed. Nothing is changed."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from df11.converter import manifest as manifests
from df11.converter.files import SourceFile, Tree, open_tree
from df11.converter.manifest import FILE_NAME, TOOL, FileRow, Manifest, Origin
from df11.converter.pipeline import least_memory, mebibytes
from df11.converter.plan import Cast, plan_tensors
from df11.converter.tree import DF11, SAFETENSORS, check_apart, plan_names, read_index
from df11.formats import errors, layout
from df11.formats.container import Container
from df11.formats.hub import Address, is_safe_path
from df11.pipelines.card import CONFIGS, CardFields, plot_paths, render_card
from df11.pipelines.job import Limits, Model
from df11.pipelines.plots import FOLDER
from df11.pipelines.target import IN_MEMORY, Digest, HubTarget, Target, open_target, read_manifest

CARD: Final = "README.md"
SMALL: Final = 1 << 20
"""Files up to this size are read into memory and go into the last commit; each larger one is a task of its own."""
OVERHEAD: Final = 40 << 20
"""Bytes that the job needs besides the conversion: an upload under way, pyarrow."""
ROW_MEMORY: Final = 2 << 10
"""Bytes that a tensor takes in the manifest, which is held until the model is done: 1,600 measured of a large one."""
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
    memory: int = 0
    """Bytes that converting it takes at least."""
    tensors: int = 0
    """In a shard that is to be converted."""

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
    overhead: int
    """Bytes of memory that the job needs besides the conversion of a shard."""

    @property
    def tasks(self) -> list[Item]:
        """Items that need work of their own."""
        return [item for item in self.items if item.is_task and not item.kept]


def plan_model(model: Model, limits: Limits) -> ModelPlan:
    """Look at source and target. Raises a Df11Error if the job cannot be done."""
    _check_installed()
    tree = open_tree(model.source)
    if tree.is_file:
        raise errors.UsageError(
            "a job converts folders and repositories", file=model.source, hint="for one file: df11-convert"
        )
    target = open_target(model.target, private=model.private)
    if target.folder is not None:
        check_apart(tree, target.folder)
    held = target.look()
    known = read_manifest(target, held)
    if known is None:
        check_foreign(held, target)
    manifest = Manifest(tree.origin, model.cast, TOOL, (), ()) if known is None else known
    files = [file for file in tree.files if not _is_left_out(file.name, model.exclude)]
    card = next((file for file in files if file.name == PurePosixPath(CARD)), None)
    rows = {row.source_file: row for row in manifest.files} if manifest.cast == model.cast else {}
    items = []
    for kind, file, name in plan_names([file for file in files if file is not card], SAFETENSORS, DF11):
        items.append(_plan_item(kind, file, name.as_posix(), target, held, rows.get(file.name.as_posix()), model))
    if not any(item.kind == "convert" for item in items):
        raise errors.SafetensorsError(
            f"no {SAFETENSORS} file", file=tree.label, hint="check the source, and what the job excludes"
        )
    _check_names(items, target)
    if known is None and target.folder is not None:
        _check_in_the_way(items, card, held, target)
    stale = _stale(manifest, held, items)
    overhead = OVERHEAD + ROW_MEMORY * (len(manifest.tensors) + sum(item.tensors for item in items))
    plan = ModelPlan(
        model, tree.origin, target, held, manifest, tuple(items), card, stale, *_disk_needs(target, items), overhead
    )
    _check_memory(plan, limits)
    _check_disk(plan, limits)
    render(plan, manifest)  # What is wrong with the card is better found now.
    return plan


def plan_push(folder: Path, address: Address, *, private: bool) -> ModelPlan:
    """The plan for a converted folder that is there already. Raises a Df11Error if it is none."""
    _check_installed()
    tree = open_tree(folder)
    if tree.is_file or not any(file.name.name.endswith(DF11) for file in tree.files):
        raise errors.UsageError(
            f"no {DF11} file in this folder" if not tree.is_file else "this is a file",
            file=folder,
            hint="name a converted folder",
        )
    if address.path:
        raise errors.UsageError("the target is a repository without a folder in it", file=str(address))
    target = HubTarget(address, private)
    held = target.look()
    known = read_manifest(target, held)
    if known is None:
        check_foreign(held, target)
    own = manifests.read(folder) if (folder / FILE_NAME).is_file() else None
    if own is not None and not _describes(own, tree):
        own = None
    origin, cast = (own.origin, own.cast) if own is not None else (Origin(), _cast_of(tree))
    manifest = known or Manifest(origin, cast, TOOL, (), ())
    rows = {row.file: row for row in manifest.files}
    items = []
    for file in tree.files:
        name = file.name.as_posix()
        if _is_left_out(file.name, ()) or name == CARD:
            continue
        digest = Digest.of_source(file)
        kept = name in held and bool(digest.agrees(held[name]))
        if name.endswith(DF11):
            kept = kept and name in rows and rows[name].sha256 == digest.sha256
            items.append(Item("container", file, name, kept, file.size, file.size))
        else:
            items.append(Item("copy", file, name, kept, file.size, file.size, digest))
    items.sort(key=lambda item: item.kind == "copy")
    _check_names(items, target)
    card = next((file for file in tree.files if file.name == PurePosixPath(CARD)), None)
    stale = _stale(manifest, held, items)
    model = Model(str(folder), str(address), cast, private, (), CardFields())
    plan = ModelPlan(model, origin, target, held, manifest, tuple(items), card, stale, 0, 0, OVERHEAD)
    render(plan, manifest)
    return plan


def _check_installed() -> None:
    # What is needed only at the end is better missed now. Nothing is imported: that takes memory.
    for module in ("huggingface_hub", "pyarrow", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise errors.missing_extra(module, "jobs")


def _check_names(items: Sequence[Item], target: Target) -> None:
    # Names that are not UTF-8, or of more than a line, which a disk can hold.
    for item in items:
        if target.folder is None and not is_safe_path(item.name):
            hint = "rename it, or leave it out: exclude of the job"
            raise errors.UsageError(
                "no file on the Hub can have this name", file=errors.shortened(item.name), hint=hint
            )


def _check_in_the_way(
    items: Sequence[Item], card: SourceFile | None, held: Mapping[str, Digest], target: Target
) -> None:
    # In a folder that no job has filled, a file may be somebody's only copy. Containers are compared when their turn comes.
    wanted = {CARD: None if card is None else Digest.of_source(card)}
    for item in items:
        if item.kind != "convert":
            wanted[item.name] = (
                Digest.of(read_index(item.file, SAFETENSORS, DF11)) if item.kind == "index" else item.digest
            )
    for name, digest in wanted.items():
        if name in held and (digest is None or not digest.agrees(held[name])):
            hint = "remove it, or name another folder"
            raise errors.UsageError(
                "this file is already there, and no job has written it", file=f"{target.label}/{name}", hint=hint
            )


def _stale(manifest: Manifest, held: Mapping[str, Digest], items: Sequence[Item]) -> tuple[str, ...]:
    # Containers only, whatever else the manifest may name: what a forged one says must not remove other files.
    names = {item.name for item in items}
    return tuple(
        row.file for row in manifest.files if row.file in held and row.file not in names and row.file.endswith(DF11)
    )


def _describes(manifest: Manifest, tree: Tree) -> bool:
    # Whether a folder's manifest is of the containers that are there now: else they are from another source than it says.
    known = {row.file: row.source_sha256 for row in manifest.files}
    for file in tree.files:
        if file.name.name.endswith(DF11):
            with Container(file.label) as container:
                if known.get(file.name.as_posix()) != container.source.sha256:
                    return False
    return True


def _cast_of(tree: Tree) -> Cast:
    # Of a folder without a manifest: any container that was cast says so.
    for file in tree.files:
        if file.name.name.endswith(DF11):
            with Container(file.label) as container:
                if container.source.cast is not None:
                    return "bf16"
    return None


def _disk_needs(target: Target, items: Sequence[Item]) -> tuple[int, int]:
    # For two files at a time, and for one; a folder holds them in the end anyhow.
    sizes = [item.most for item in items if item.is_task and not item.kept] if target.folder is None else []
    one = max(sizes, default=0)
    return max([a + b for a, b in itertools.pairwise(sizes)], default=one), one


def render(plan: ModelPlan, manifest: Manifest) -> str:
    """The card of the target, once it holds what the manifest says."""
    source = None if plan.source_card is None else plan.source_card.read_bytes().decode("utf-8", "replace")
    configs = {
        item.name: item.file.read_bytes().decode("utf-8", "replace") for item in plan.items if item.name in CONFIGS
    }
    repository = Address.parse(plan.model.target).repository if plan.target.folder is None else None
    return render_card(
        manifest, plan.model.card, source, repository=repository, plots=plot_paths(manifest), configs=configs
    )


def _is_left_out(name: PurePosixPath, exclude: tuple[str, ...]) -> bool:
    # Plots of the source, if it has some, are of other files.
    return (
        name.as_posix() in _BOOKKEEPING
        or name.parts[0] == FOLDER
        or any(fnmatch.fnmatchcase(name.as_posix(), pattern) for pattern in exclude)
    )


def check_foreign(held: Mapping[str, Digest], target: Target) -> None:
    """Raise UsageError for a repository of somebody's weights: without a manifest of ours it is most likely a mistake in the job."""
    if target.folder is None:
        for name in held:
            if name.endswith((SAFETENSORS, DF11)):
                raise errors.UsageError(
                    "the target holds weights that no job has written",
                    file=f"{target.label}/{name}",
                    hint="name another repository",
                )


def _plan_item(
    kind: str,
    file: SourceFile,
    name: str,
    target: Target,
    held: Mapping[str, Digest],
    row: FileRow | None,
    model: Model,
) -> Item:
    there = held.get(name)
    if kind == "convert":
        kept = (
            there is not None
            and row is not None
            and row.file == name
            and _is_of(file, row)
            and _is_same(Digest(row.bytes, row.sha256), there, target, name)
        )
        return Item("convert", file, name, True, 0, 0) if kept else _plan_shard(file, name, model)
    if kind == "index":
        digest = Digest.of(
            read_index(file, SAFETENSORS, DF11)
        )  # One that is none is better found now than after the shards.
        return Item(
            "index",
            file,
            name,
            there is not None and _is_same(digest, there, target, name),
            digest.size,
            digest.size,
            digest,
        )
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


def _plan_shard(file: SourceFile, name: str, model: Model) -> Item:
    with file.open() as source:
        plans = plan_tensors(source.header, model.cast)
        most = sum(plan.target_size + layout.RECORD_ALIGNMENT for plan in plans)  # If nothing is coded.
        coded = sum(plan.target_size for plan in plans if plan.target_dtype == "BF16")
        header = _HEADERS + 8 * len(source.header.raw)
        memory = least_memory(source, plans)
    return Item(
        "convert",
        file,
        name,
        False,
        most + header,
        int(most - coded * (1 - _EXPECTED_RATIO)),
        memory=memory,
        tensors=len(plans),
    )


def _check_memory(plan: ModelPlan, limits: Limits) -> None:
    largest = max(plan.items, key=lambda item: item.memory)
    if largest.memory and largest.memory + plan.overhead > limits.memory:
        raise errors.BudgetError(
            "the memory budget is too small for this file",
            file=largest.file.label,
            expected=f"[limits] memory of at least {mebibytes(largest.memory + plan.overhead)}",
            found=mebibytes(limits.memory),
        )


def _check_disk(plan: ModelPlan, limits: Limits) -> None:
    if limits.disk is not None and plan.disk_for_one > limits.disk:
        largest = max(plan.tasks, key=lambda item: item.most)
        raise errors.BudgetError(
            "the disk budget is too small for this file",
            file=largest.file.label,
            expected=f"[limits] disk of at least {largest.most:,} bytes",
            found=f"{limits.disk:,}",
        )
