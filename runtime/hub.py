"""Files on the Hub, through the cache that all its clients share. Only what is needed is downloaded, at one commit.

The runtime lives in other people's programs, so huggingface_hub is used as they set it up: endpoint, login, cache,
transfers, offline mode.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from df11.formats import errors
from df11.storage.address import SCHEME, Address, is_address, is_repository
from df11.storage.answers import explained
from df11.storage.client import library

StrPath = str | os.PathLike[str]

_OTHER_WEIGHTS: Final = re.compile(r"\.(safetensors|bin|pth?|ckpt|h5|msgpack|gguf|onnx(_data)?|pb)$")
_ABOUT: Final = re.compile(r"\.(md|parquet|png|jpe?g|gif|webp|svg|mp4|gitattributes)$", re.IGNORECASE)
"""Descriptions and pictures, which no component needs to load."""
_CACHED: Final = re.compile(r"/models--[^/]+/snapshots/[0-9a-f]+/")


def address_of(path: object) -> Address | None:
    """The address in ``path``: ``hf://…``, or ``owner/name`` if nothing local has that name. Else None."""
    if is_address(path):
        return Address.parse(str(path))
    try:
        is_plain = isinstance(path, str) and is_repository(path) and not os.path.lexists(path)
        return Address.parse(f"{SCHEME}{path}") if is_plain else None
    except errors.UsageError:  # Such as models/name: a folder that does not exist.
        return None


def local_file(path: StrPath) -> StrPath:
    """The path of a `.df11` file, downloaded if ``path`` is an address.

    Raises a Df11Error, like everything here, if it is not such a file, missing, not allowed or unreachable.
    """
    if not is_address(path):
        return path
    where = Address.parse(str(path))
    if not where.path.endswith(".df11"):
        raise errors.UsageError(
            "this does not name a .df11 file", file=path, expected=f"{SCHEME}{where.repository}/model.df11, for example"
        )
    client = library()
    with _asking(where):
        return Path(client.hf_hub_download(where.repository, where.path, revision=where.revision))


def local_weights(path: StrPath) -> StrPath:
    """The path of a `.df11` file or a folder of them. An address: downloads just these and their index."""
    if not is_address(path):
        return path
    where = Address.parse(str(path))
    if where.path.endswith(".df11"):
        return local_file(path)
    prefix = glob.escape(_prefix(where))
    root = _download(where, [f"{prefix}*.df11", f"{prefix}*.df11.index.json"], ignored=[f"{prefix}*/*"])
    if not any((root / where.path).glob("*.df11")):
        raise _missing(where, root.name, "no .df11 file here")
    return root / where.path


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A folder of a repository at one commit, in the cache as far as it has been requested."""

    where: Address
    """The address, with the commit as its revision."""
    folder: Path
    names: tuple[str, ...]
    """All files there, cached or not, relative to the folder."""

    @classmethod
    def open(cls, where: Address, first: str) -> Snapshot:
        """Look up what is there. The file ``first``, which must exist, and all code, which is small, are cached."""
        prefix = _prefix(where)
        root = _download(where, [glob.escape(prefix + first), f"{glob.escape(prefix)}*.py"])
        listed = _listed(where.repository, root.name)
        if listed is None:  # The list is not cached, and the Hub is out of reach.
            listed = [path.relative_to(root).as_posix() for path in root.rglob("*")]
        names = tuple(name.removeprefix(prefix) for name in listed if name.startswith(prefix))
        if first not in names:
            raise _missing(where, root.name, f"no {first} here")
        return cls(replace(where, revision=root.name), root / where.path, names)

    def has_df11(self, folders: Collection[str] = (".",)) -> bool:
        """Whether a `.df11` file lies in one of these folders."""
        return any(name.endswith(".df11") and str(PurePosixPath(name).parent) in folders for name in self.names)

    def fetch(self, folders: Collection[str] = (".",)) -> Path:
        """Download all that components in these folders load: configs, vocabularies, weights. Returns the folder."""
        names = [name for name in self.names if (name.partition("/")[0] if "/" in name else ".") in folders]
        for folder in sorted({PurePosixPath(name).parent for name in names if _OTHER_WEIGHTS.search(name)}):
            if not self.has_df11([str(folder)]):
                name = self.where.repository.partition("/")[2]
                hint = f"df11-convert --cast bf16 {SCHEME}{self.where.repository} {name}-df11"
                raise errors.MissingError(
                    "no .df11 file here", file="/".join([str(self.where), *folder.parts]), hint=hint
                )
        wanted = [name for name in names if not _OTHER_WEIGHTS.search(name) and not _ABOUT.search(name)]
        if wanted:
            _download(self.where, [glob.escape(_prefix(self.where) + name) for name in wanted])
        return self.folder


def opened(path: object, first: str) -> Snapshot | None:
    """The snapshot at an address, or of the repository that ``owner/name`` names; None for other paths."""
    where = address_of(path)
    try:
        return None if where is None else Snapshot.open(where, first)
    except errors.Df11Error as error:
        if not is_address(path):
            error.hint = "; ".join(filter(None, [error.hint, "there is no folder with this name either"]))
        raise


def found(
    path: object,
    first: str,
    folders: Collection[str] = (".",),
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Snapshot | None:
    """Like :func:`opened`, for a path that may not be meant for df11.

    Also None for an ``owner/name`` that is out of reach or not df11.
    """
    where = address_of(path)
    if where is None:
        return None
    try:
        where = replace(
            where, revision=revision or where.revision, path="/".join(filter(None, [where.path, subfolder]))
        )
        snapshot = Snapshot.open(where, first)
    except errors.Df11Error:
        if is_address(path):
            raise
        return None
    return snapshot if is_address(path) or snapshot.has_df11(folders) else None


def _prefix(where: Address) -> str:
    return f"{where.path}/" if where.path else ""


@contextmanager
def _asking(where: Address) -> Iterator[None]:
    try:
        with explained(str(where)):
            yield
    except OSError as error:
        # Of the cache, or the client's own, without a number, if a file's size is not the one that the Hub states.
        if error.errno is None:
            hint = "run the same command again"
            raise errors.RetryLaterError("the download is incomplete", file=str(where), hint=hint) from None
        raise errors.from_os_error(error, file=error.filename or str(where)) from None


def _download(where: Address, patterns: list[str], ignored: list[str] | None = None) -> Path:
    # The root folder of the snapshot; its name is the commit.
    client = library()
    with _asking(where):
        return Path(
            client.snapshot_download(
                where.repository, revision=where.revision, allow_patterns=patterns, ignore_patterns=ignored
            )
        )


def _listed(repository: str, commit: str) -> list[str] | None:
    # The names of all files at a commit; None if they are not cached.
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in library().get_cached_repo_tree(repository, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None


def _missing(where: Address, commit: str, what: str) -> errors.Df11Error:
    if _listed(where.repository, commit) is None:
        return errors.RetryLaterError(
            "not in the cache, and the Hub could not be reached", file=str(where), hint="run the same command again"
        )
    return errors.MissingError(what, file=str(where), hint="check the address")


@contextmanager
def naming_downloads() -> Iterator[None]:
    """Let an error about a damaged file in the Hub's cache say how to remove it: the client compares sizes only."""
    try:
        yield
    except (errors.FormatError, errors.SafetensorsError) as error:
        if (
            error.file is not None
            and _CACHED.search(Path(error.file).as_posix())
            and not isinstance(error, errors.VersionError | errors.FeatureError)
        ):
            error.hint = f"if the download was damaged, delete {Path(error.file).resolve()} and load it again"
        raise
