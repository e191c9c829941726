"""Which file of a tree becomes which: shards are converted, index files rewritten, all others copied."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from df11.converter.files import SourceFile, Tree, missing, walk
from df11.converter.manifest import FILE_NAME as MANIFEST
from df11.formats import errors
from df11.formats.writer import AtomicWriter, make_parents

SAFETENSORS: Final = ".safetensors"
DF11: Final = ".df11"
_INDEX: Final = re.compile(r"\.index(\.[^.]+)?\.json$")
"""End of an index file's name after its shards' suffix; that of a variant has the variant's name in it."""

Kind = Literal["convert", "index", "copy"]


@dataclass(frozen=True, slots=True)
class FileJob:
    """One file of a tree. ``convert``: a shard, from or to df11."""

    kind: Kind
    source: SourceFile
    target: Path


def plan_tree(tree: Tree, target: Path, old: str, new: str) -> list[FileJob]:
    """Jobs for a file or a folder; ``old`` and ``new`` are the suffixes of shards in source and target.

    Folders keep their shape. Shards come first, the index files last. A manifest is left out: it describes one conversion only.
    """
    if tree.is_file:
        if target.is_dir():
            raise errors.UsageError("the target is a folder, but the source is a file", file=target, hint="name a file")
        if tree.path is not None and target.exists() and target.samefile(tree.path):
            raise errors.UsageError("source and target are the same file", file=target)
        return [FileJob("convert", file, target) for file in tree.files]
    if target.exists() and not target.is_dir():
        raise errors.UsageError("the target is a file, but the source is a folder", file=target, hint="name a folder")
    check_apart(tree, target)
    jobs = [FileJob(kind, file, target / name) for kind, file, name in plan_names(tree.files, old, new)]
    if not any(job.kind == "convert" for job in jobs):
        raise errors.SafetensorsError(f"no {old} file in this folder", file=tree.label, hint="check the path")
    return jobs


def check_apart(tree: Tree, target: Path) -> None:
    """Raise a UsageError if a folder is, or lies in, the one that is its source."""
    if tree.path is not None:
        inside, outside = target.resolve(), tree.path.resolve()
        if inside == outside or outside in inside.parents:
            raise errors.UsageError("the target lies in the source", file=target, hint="choose another folder")


def plan_names(files: Iterable[SourceFile], old: str, new: str) -> list[tuple[Kind, SourceFile, PurePosixPath]]:
    """What becomes of the files of a folder, and their names in the target; ``old``, ``new`` and the order as in :func:`plan_tree`."""
    plan: dict[PurePosixPath, tuple[Kind, SourceFile, PurePosixPath]] = {}
    for file in files:
        name = file.name.name
        kind: Kind = "copy"
        if name.endswith(old):
            kind, name = "convert", name.removesuffix(old) + new
        elif (index := _INDEX.search(name)) and name[: index.start()].endswith(old):
            kind, name = "index", name[: index.start()].removesuffix(old) + new + index[0]
        elif name == MANIFEST:
            continue
        target = file.name.with_name(name)
        if target in plan:
            raise errors.UsageError(
                f"{plan[target][1].label} and {file.label} would both be written as this file", file=target
            )
        plan[target] = (kind, file, target)
    order = ("convert", "copy", "index")
    return sorted(plan.values(), key=lambda item: order.index(item[0]))


def list_containers(path: Path) -> list[Path]:
    """The containers that ``path`` means: itself if it is a file, else all `.df11` files in the folder."""
    if not path.exists():
        raise missing(path)
    if path.is_file():
        return [path]
    files = [file for file in walk(path) if file.name.endswith(DF11)]
    if not files:
        raise errors.UsageError(f"no {DF11} file in this folder", file=path, hint="check the path")
    return files


_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')


def rewrite_index(text: str, old: str, new: str, path: str | os.PathLike[str]) -> str:
    """An index file with the suffix ``old`` of its shards replaced by ``new``, and every other character as it was.

    So the way back gives the same bytes again. Only the values of weight_map are touched.
    """
    try:
        shards = json.loads(text)["weight_map"]
        names = list(shards.values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise errors.SafetensorsError("not an index of safetensors shards", file=path) from None
    if any(name.endswith(new) for name in names):
        raise errors.SafetensorsError(f"the index names {new} files already", file=path)
    pieces = []
    position = 0
    for match in _weight_map_values(text):
        token = match.group()
        if token.endswith(old + '"'):
            pieces += [text[position : match.start()], token.removesuffix(old + '"'), new, '"']
            position = match.end()
    result = "".join([*pieces, text[position:]])
    if json.loads(result)["weight_map"] != {tensor: _renamed(name, old, new) for tensor, name in shards.items()}:
        raise errors.SafetensorsError("the index spells its shards in a way that cannot be rewritten", file=path)
    return result


def _weight_map_values(text: str) -> Iterator[re.Match[str]]:
    # The strings that are values of the top-level object weight_map, in text that is known to be JSON.
    tokens = list(_TOKEN.finditer(text))
    depth = 0
    inside = False
    for before, token in itertools.pairwise([*tokens[:1], *tokens]):
        kind = token.group()
        if kind in "{[":
            depth += 1
        elif kind in "}]":
            depth -= 1
            inside = inside and depth > 1
        elif kind != ":" and before.group() == ":" and inside:
            yield token
        elif kind == ":" and depth == 1:
            inside = json.loads(before.group()) == "weight_map"


def _renamed(name: str, old: str, new: str) -> str:
    return name.removesuffix(old) + new if name.endswith(old) else name


def read_index(file: SourceFile, old: str, new: str) -> bytes:
    """An index file as it is in the target. Raises SafetensorsError if it is none."""
    try:
        return rewrite_index(file.read_bytes().decode("utf-8"), old, new, file.label).encode("utf-8")
    except UnicodeDecodeError:
        raise errors.SafetensorsError("not an index of safetensors shards", file=file.label) from None


def write_index(job: FileJob, data: bytes, *, force: bool) -> None:
    """Carry out an ``index`` job: write what :func:`read_index` gave."""
    if _exists(job.target, force=force, same=lambda: job.target.read_bytes() == data):
        return
    make_parents(job.target)
    with AtomicWriter(job.target) as writer:
        writer.write(data)
        writer.commit()


def copy_file(job: FileJob, *, force: bool) -> None:
    """Carry out a ``copy`` job."""
    if _exists(job.target, force=force, same=lambda: job.source.has_content(job.target)):
        return
    make_parents(job.target)
    with AtomicWriter(job.target) as writer:
        job.source.copy_to(writer)
        writer.commit()


def _exists(target: Path, *, force: bool, same: Callable[[], bool]) -> bool:
    if force or not target.exists():
        return False
    if not target.is_file() or not same():
        raise already_there(target)
    return True


def already_there(target: Path) -> errors.UsageError:
    """The error for a target that is not to be replaced."""
    return errors.UsageError("this file is already there", file=target, hint="remove it, or give --force to replace it")
