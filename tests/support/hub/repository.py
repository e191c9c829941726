"""What the Hub for tests keeps: repositories, their commits and files."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".df11", ".parquet", ".bin", ".png")
REGULAR_BYTES = 10_000_000
"""Larger files go to LFS, whatever their names."""
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
"""`.gitattributes`, which the Hub puts into every new repository."""


class Refusal(Exception):  # noqa: N818
    """A request that the Hub answers with an error."""

    def __init__(
        self, code: int, message: str, error_code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.code = code
        self.message = message
        self.error_code = error_code
        self.headers = dict(headers or {})


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores a file in LFS: because of its name, its size, or binary content in `sample`, its start."""
    if not size:
        return False
    return path.endswith(LFS_SUFFIXES) or size > REGULAR_BYTES or not _is_text(sample)


def _is_text(sample: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample


@dataclass(frozen=True)
class Blob:
    """One version of a file: in memory (`data`), or in LFS under its SHA-256."""

    size: int
    sha256: str
    data: bytes | None

    @property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        """Git's id of the file, or of the pointer to it."""
        data = self.pointer if self.data is None else self.data
        return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.data is None else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with all its files; `paths` are the ones that it changed."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    paths: tuple[str, ...]
    date: str
    time: float
    """The time of its arrival: `time.monotonic()`."""
    tree: Mapping[str, Blob] = field(repr=False)


class Storage:
    """LFS objects, as files named by their SHA-256 in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def add(self, content: bytes | Path) -> str:
        """Take in a file (as a link, if the file system can) and return its SHA-256."""
        if isinstance(content, bytes):
            sha256 = hashlib.sha256(content).hexdigest()
            if not self.path(sha256).exists():
                self.path(sha256).write_bytes(content)
            return sha256
        with content.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.path(sha256).exists():
            try:
                os.link(content, self.path(sha256))
            except OSError:
                shutil.copyfile(content, self.path(sha256))
        return sha256


class Repository:
    """A model repository.

    `branches` (with "main" and "refs/pr/N") and `tags` map names to commits, and tests may change them. `objects` are
    the SHA-256 of the LFS files that were uploaded to this repository: others cannot be committed. `readers` are the
    users besides the owner who may read it if it is private or gated.
    """

    def __init__(
        self, name: str, storage: Storage, lock: threading.RLock, *, private: bool = False, gated: bool = False
    ):
        self.name = name
        self.private = private
        self.gated = gated
        self.readers: set[str] = set()
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: set[str] = set()
        self._storage = storage
        self._lock = lock
        self._commits: dict[str, Commit] = {}
        self.apply(
            "main",
            {".gitattributes": Blob(len(ATTRIBUTES), hashlib.sha256(ATTRIBUTES).hexdigest(), ATTRIBUTES)},
            "initial commit",
        )

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    @property
    def head(self) -> str:
        """The commit (40 hex digits) that main is at."""
        return self.branches["main"]

    @property
    def commits(self) -> list[Commit]:
        """The commits of main, oldest first; the first is the Hub's own and adds .gitattributes."""
        with self._lock:
            return list(self.history("main"))[::-1]

    def history(self, revision: str) -> Iterator[Commit]:
        """A commit and its ancestors, newest first."""
        commit: Commit | None = self.find(revision)
        while commit:
            yield commit
            commit = self._commits[commit.parent] if commit.parent else None

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag, or an id of at least seven digits. Refusal (404) if there is none."""
        oid = (
            self.branches.get(revision)
            or self.branches.get(revision.removeprefix("refs/heads/"))
            or self.tags.get(revision)
        )
        if oid is None and len(revision) >= 7:
            oid = next((known for known in self._commits if known.startswith(revision)), None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self._commits[oid]

    def apply(
        self, branch: str, changes: Mapping[str, Blob | None], title: str, message: str = "", author: str | None = None
    ) -> Commit:
        """Put a commit on a branch; None deletes a file."""
        with self._lock:
            parent = self.branches.get(branch)
            tree = dict(self._commits[parent].tree) if parent else {}
            for path, blob in changes.items():
                if blob is None:
                    del tree[path]
                else:
                    tree[path] = blob
            date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            content = [
                self.name,
                len(self._commits),
                parent,
                title,
                message,
                sorted((path, blob.oid) for path, blob in tree.items()),
            ]
            oid = hashlib.sha1(json.dumps(content).encode(), usedforsecurity=False).hexdigest()
            commit = Commit(
                oid, parent, title, message, author or self.owner, tuple(sorted(changes)), date, time.monotonic(), tree
            )
            self._commits[oid] = commit
            self.branches[branch] = oid
            return commit

    def commit(
        self, files: Mapping[str, bytes | Path | None], *, summary: str = "Change files", revision: str = "main"
    ) -> str:
        """Commit to a branch, as if somebody else did it, and return the commit's id.

        Do not change a file's content in place afterwards.
        """
        changes: dict[str, Blob | None] = {}
        for path, content in files.items():
            if content is None:
                changes[path] = None
                continue
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            if isinstance(content, Path):
                with content.open("rb") as file:
                    sample = file.read(512)
            else:
                sample = content[:512]
            if is_lfs(path, size, sample):
                sha256 = self._storage.add(content)
                self.objects.add(sha256)
                changes[path] = Blob(size, sha256, None)
            else:
                data = content.read_bytes() if isinstance(content, Path) else content
                changes[path] = Blob(size, hashlib.sha256(data).hexdigest(), data)
        return self.apply(revision, changes, summary).oid

    def read(self, path: str, revision: str = "main") -> bytes:
        """A file's content; KeyError if it does not exist."""
        blob = self.find(revision).tree[path]
        return self._storage.path(blob.sha256).read_bytes() if blob.data is None else blob.data

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """All files, .gitattributes included."""
        return {path: self.read(path, revision) for path in self.find(revision).tree}

    def checkout(self, folder: Path, revision: str = "main") -> Path:
        """Write the files of a revision into a folder, and return it."""
        for name, data in self.files(revision).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def hashes(self, revision: str = "main") -> dict[str, str]:
        """The SHA-256 of every file's content; large files are not read."""
        return {path: blob.sha256 for path, blob in self.find(revision).tree.items()}

    def last_change(self, path: str, revision: str) -> Commit:
        """The commit that last changed a file, or a file in a folder."""
        return next(
            commit for commit in self.history(revision) if any(_within(changed, path) for changed in commit.paths)
        )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def within(paths: Iterable[str], folder: str) -> list[str]:
    """The paths in a folder, sorted; all paths for ""."""
    return sorted(path for path in paths if not folder or path.startswith(f"{folder}/"))
