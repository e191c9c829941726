"""Which file of a tree becomes which: shards are converted, index files rewritten, all others copied."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from df11.formats import errors
from df11.formats.writer import AtomicWriter, make_parents

SAFETENSORS: Final = ".safetensors"
DF11: Final = ".df11"
_INDEX: Final = re.compile(r"\.index(\.[^.]+)?\.json$")
"""End of an index file's name after its shards' suffix; that of a variant has the variant's name in it."""
SKIPPED_FOLDERS: Final = frozenset({".git", ".cache"})
"""Bookkeeping of git and of the Hub's client, not part of a model."""

_CHUNK: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class FileJob:
    """One file of a tree. ``convert``: a shard, from or to df11."""

    kind: Literal["convert", "index", "copy"]
    source: Path
    target: Path


def plan_tree(source: Path, target: Path, old: str, new: str) -> list[FileJob]:
    """Jobs for a file or a folder; ``old`` and ``new`` are the suffixes of shards in source and target.

    Folders keep their shape and links are followed, as the Hub's cache makes them. Shards come first, then the index files.
    """
    if not source.exists():
        raise errors.MissingError("no such file or folder", file=source, hint="check the path")
    if source.is_file():
        if target.is_dir():
            raise errors.UsageError("the target is a folder, but the source is a file", file=target, hint="name a file")
        if target.exists() and target.samefile(source):
            raise errors.UsageError("source and target are the same file", file=target)
        return [FileJob("convert", source, target)]
    if target.exists() and not target.is_dir():
        raise errors.UsageError("the target is a file, but the source is a folder", file=target, hint="name a folder")
    inside, outside = target.resolve(), source.resolve()
    if inside == outside or outside in inside.parents:
        raise errors.UsageError("the target lies in the source", file=target, hint="choose another folder")
    jobs = []
    for path in walk(source):
        relative = path.relative_to(source)
        name = relative.name
        if name.endswith(old):
            jobs.append(FileJob("convert", path, target / relative.with_name(name.removesuffix(old) + new)))
        elif (index := _INDEX.search(name)) and name[: index.start()].endswith(old):
            jobs.append(FileJob("index", path, target / relative.with_name(name[: index.start()].removesuffix(old) + new + index[0])))
        else:
            jobs.append(FileJob("copy", path, target / relative))
    if not any(job.kind == "convert" for job in jobs):
        raise errors.SafetensorsError(f"no {old} file in this folder", file=source, hint="check the path")
    by_target: dict[Path, FileJob] = {}
    for job in jobs:
        if job.target in by_target:
            raise errors.UsageError(f"{by_target[job.target].source} and {job.source} would both be written here", file=job.target)
        by_target[job.target] = job
    order = ("convert", "copy", "index")
    return sorted(jobs, key=lambda job: order.index(job.kind))


def walk(folder: Path) -> list[Path]:
    """All files of a folder and the folders in it, links followed, in the order of their paths."""
    return sorted(_walk(folder, frozenset()))


def list_containers(path: Path) -> list[Path]:
    """The containers that ``path`` means: itself if it is a file, else all `.df11` files in the folder."""
    if not path.exists():
        raise errors.MissingError("no such file or folder", file=path, hint="check the path")
    if path.is_file():
        return [path]
    files = [file for file in walk(path) if file.name.endswith(DF11)]
    if not files:
        raise errors.UsageError(f"no {DF11} file in this folder", file=path, hint="check the path")
    return files


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise errors.UsageError("a link leads back to a folder above it", file=folder)
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise errors.from_os_error(error, file=folder) from None
    for entry in entries:
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS:
                yield from _walk(folder / entry.name, above | {real})
        elif entry.is_file():
            if not (entry.name.startswith(".") and entry.name.endswith(".partial")):
                yield folder / entry.name
        else:
            raise errors.MissingError("neither a file nor a folder, or a link that leads nowhere", file=entry.path)


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


def read_index(job: FileJob, old: str, new: str) -> bytes:
    """The bytes that an ``index`` job is to write."""
    try:
        return rewrite_index(job.source.read_bytes().decode("utf-8"), old, new, job.source).encode("utf-8")
    except OSError as error:
        raise errors.from_os_error(error, file=job.source) from None
    except UnicodeDecodeError:
        raise errors.SafetensorsError("not an index of safetensors shards", file=job.source) from None


def write_index(job: FileJob, old: str, new: str, *, force: bool) -> None:
    """Carry out an ``index`` job."""
    data = read_index(job, old, new)
    if _exists(job.target, force=force, same=lambda: job.target.read_bytes() == data):
        return
    make_parents(job.target)
    with AtomicWriter(job.target) as writer:
        writer.write(data)
        writer.commit()


def copy_file(job: FileJob, *, force: bool) -> None:
    """Carry out a ``copy`` job."""
    if _exists(job.target, force=force, same=lambda: _same_content(job.source, job.target)):
        return
    make_parents(job.target)
    try:
        with job.source.open("rb") as file, AtomicWriter(job.target) as writer:
            while chunk := file.read(_CHUNK):
                writer.write(chunk)
            writer.commit()
    except OSError as error:
        raise errors.from_os_error(error, file=job.source) from None


def _exists(target: Path, *, force: bool, same: Callable[[], bool]) -> bool:
    if force or not target.exists():
        return False
    if not target.is_file() or not same():
        raise already_there(target)
    return True


def already_there(target: Path) -> errors.UsageError:
    """The error for a target that is not to be replaced."""
    return errors.UsageError("this file is already there", file=target, hint="remove it, or give --force to replace it")


def _same_content(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as file_a, b.open("rb") as file_b:
        while chunk := file_a.read(_CHUNK):
            if chunk != file_b.read(len(chunk)):
                return False
    return True
