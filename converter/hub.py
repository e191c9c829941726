"""Files, trees and sources of the Hub for the converter. Everything that comes is held to the hashes that the Hub lists."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from df11.converter.files import CHUNK, Tree, is_left_out
from df11.converter.manifest import Origin
from df11.converter.ranges import RING_MEMORY, RangeReader, RemoteFile
from df11.converter.source import LocalSource, MemorySource, Source
from df11.formats import errors, framing, hub
from df11.formats.record import Bytes
from df11.formats.writer import AtomicWriter, lock

CLIENT_MEMORY: Final = 25 << 20
"""Bytes that huggingface_hub and its connections take: 18 MiB measured without TLS."""
HEAD_BYTES: Final = 256 << 10
"""Bytes that are read of a shard first: the headers of most fit, so that one request is enough to check one."""
MAX_WHOLE_BYTES: Final = 32 << 20
"""Largest file that is held in memory: git files on the Hub are at most 10 MB, an index of 100,000 tensors is about as large."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A :class:`~df11.converter.files.SourceFile` of a repository at a commit."""

    name: PurePosixPath
    address: hub.Address
    """With the commit as its revision."""
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def label(self) -> str:
        """hf://owner/name@commit/path."""
        return str(self.address)

    def open(self) -> Source:
        """The file as a safetensors source, read by range requests; a file that is not in LFS comes as a whole."""
        if self.sha256 is not None:
            return HubSource(self)
        source = MemorySource(self.read_bytes(), self.label)
        source.memory += CLIENT_MEMORY
        return source

    def remote(self) -> RemoteFile:
        """The file, to be read; nothing is checked."""
        return RemoteFile(self.address, self.size)

    def read_bytes(self) -> bytes:
        """All of a small file. Raises a DifferenceError if it is not what the Hub lists."""
        if self.size > MAX_WHOLE_BYTES:
            raise errors.UsageError(
                "too large to be read as a whole",
                file=self.label,
                expected=f"at most {MAX_WHOLE_BYTES} bytes",
                found=self.size,
            )
        out = np.empty(self.size, np.uint8)
        self.remote().fetch(0, out)
        digest = self._start_digest()
        digest.update(out)
        self._check(digest)
        return out.tobytes()

    def copy_to(self, writer: AtomicWriter) -> None:
        """Write the content to ``writer``, in pieces. Raises a DifferenceError if it is not what the Hub lists."""
        digest = self._start_digest()
        for chunk in self.chunks():
            digest.update(chunk)
            writer.write(chunk)
        self._check(digest)

    def chunks(self, start: int = 0) -> Iterator[Bytes]:
        """The bytes from ``start`` on, in order; each chunk is valid until the next one."""
        reader = RangeReader(self.remote(), start)
        buffer = np.empty(CHUNK, np.uint8)
        try:
            for position in range(start, self.size, CHUNK):
                chunk = buffer[: self.size - position]
                reader.read(position, chunk)
                yield chunk
        finally:
            reader.close()

    def has_content(self, path: Path) -> bool:
        """Whether the local file ``path`` has the content that the Hub lists: nothing is fetched."""
        if path.stat().st_size != self.size:
            return False
        digest = self._start_digest()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return bool(digest.hexdigest() == self.listed)

    @property
    def listed(self) -> str | None:
        """The hash that the Hub lists: SHA-256, or of a file that is not in LFS git's blob id."""
        return self.sha256 or self.blob_id

    def _start_digest(self) -> Any:
        return start_blob_id(self.size) if self.sha256 is None else hashlib.sha256()

    def _check(self, digest: Any) -> None:
        if digest.hexdigest() != self.listed:
            raise self.differs(digest.hexdigest())

    def differs(self, found: str) -> errors.DifferenceError:
        """The error for content that has the hash ``found``."""
        kind = "git blob" if self.sha256 is None else "SHA-256"
        return errors.DifferenceError(
            f"what came is not the file that the Hub lists: its {kind} differs",
            file=self.label,
            expected=self.listed,
            found=found,
            hint="run the same command again; if it stays so, the file on the Hub is damaged",
        )


def start_blob_id(size: int) -> hashlib._Hash:
    """The hash that git gives a file of ``size`` bytes: the content is to follow."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def find_commit(address: hub.Address) -> Any:
    """What the Hub says of a repository at a revision: ``sha``, the commit that this is now, and whether it is ``private``."""
    info = hub.retrying(lambda: hub.api().repo_info(address.repository, revision=address.revision), str(address))
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):  # What is none may be a branch, which moves.
        raise errors.RetryLaterError(
            "the Hub's answer names no commit",
            file=str(address),
            found=errors.shortened(str(info.sha)),
            hint="run the same command again",
        )
    return info


def list_files(root: hub.Address) -> list[HubFile]:
    """All files of a repository, or of a folder in it, at a commit."""
    # As a list in one go: tried again as a whole, so that no page is missing.
    entries = hub.retrying(
        lambda: list(
            hub.api().list_repo_tree(root.repository, root.path or None, recursive=True, revision=root.revision)
        ),
        str(root),
    )
    return [_hub_file(entry, root, False) for entry in entries if _is_file(entry)]


class HubTree(Tree):
    """A repository, or a folder or file in it, at the commit that its revision means now."""

    def __init__(self, address: hub.Address) -> None:
        commit = str(find_commit(address).sha)
        root = hub.Address(address.repository, commit, address.path)
        self.path = None
        self.label = str(root)
        self.origin = Origin(address.repository, commit, address.path)
        self.is_file = False
        if address.path:
            entries = hub.retrying(
                lambda: hub.api().get_paths_info(address.repository, [address.path], revision=commit), self.label
            )
            if not entries:
                raise errors.MissingError(
                    "no such file or folder in this repository", file=self.label, hint="check the address"
                )
            self.is_file = _is_file(entries[0])
        files = [_hub_file(entries[0], root, True)] if self.is_file else list_files(root)
        self.files = sorted((file for file in files if not is_left_out(file.name)), key=lambda file: file.name)


def _is_file(entry: Any) -> bool:
    return hasattr(entry, "blob_id")


def _hub_file(entry: Any, root: hub.Address, is_file: bool) -> HubFile:
    path = str(entry.path)
    inside = path == root.path if is_file else not root.path or path.startswith(root.path + "/")
    if not inside or not hub.is_safe_path(path) or not isinstance(entry.size, int) or entry.size < 0:
        raise errors.UsageError(
            "the Hub lists a file that no repository can have", file=str(root), found=errors.shortened(path)
        )
    relative = PurePosixPath(path).name if is_file else path[len(root.path) :].lstrip("/")
    sha256 = None if entry.lfs is None else str(entry.lfs.sha256)
    return HubFile(
        PurePosixPath(relative), hub.Address(root.repository, root.revision, path), entry.size, sha256, entry.blob_id
    )


class HubSource(Source):
    """A source that is read from the Hub as it is converted."""

    memory = CLIENT_MEMORY + RING_MEMORY

    def __init__(self, file: HubFile) -> None:
        self.path = file.label
        self.size = file.size
        remote = file.remote()
        head = np.empty(min(file.size, HEAD_BYTES), np.uint8)
        remote.fetch(0, head)
        end = 8 + framing.header_length(head[:8].tobytes(), file.size, self.path)
        raw = np.empty(end, np.uint8)
        raw[: len(head)] = head[:end]
        remote.fetch(len(head), raw[len(head) :])
        self.header = framing.parse_header(raw[8:].tobytes(), file.size - end, self.path)
        self._reader = RangeReader(remote, end)

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the data from byte ``start`` of the data on."""
        self._reader.read(self.header.data_start + start, out)

    def changed(self, tensor: str | None = None) -> errors.Df11Error:
        """The error for data that are read twice and differ: a commit does not change, so it is damage."""
        return errors.DifferenceError(
            "what came the second time is not what came before",
            file=self.path,
            tensor=tensor,
            hint="run the same command again",
        )

    def stop(self) -> None:
        """Let no thread wait any longer for data to come."""
        self._reader.stop()

    def close(self) -> None:
        """Stop fetching."""
        self._reader.close()


@contextmanager
def downloaded(file: HubFile, target: Path) -> Iterator[Source]:
    """``file`` as a source on the disk beside ``target``, and removed when it has been converted.

    The download goes on where an earlier run has ended. Raises a DifferenceError, and removes it, if it is not what the Hub lists.
    """
    path = target.with_name(f".{target.name}.download")
    try:
        partial = path.open("a+b", buffering=0)
    except OSError as error:
        raise errors.from_os_error(error, file=path) from None
    with partial:  # For its lock, as long as the file is used.
        try:
            lock(partial)
        except BlockingIOError:
            raise errors.ConflictError(
                "another process is downloading this file", file=path, hint="wait for it to end"
            ) from None
        try:
            _download(file, partial, path)
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None
        with LocalSource(path, label=file.label) as source:
            source.memory = CLIENT_MEMORY
            yield source
        path.unlink(missing_ok=True)


def _download(file: HubFile, partial: FileIO, path: Path) -> None:
    size = partial.seek(0, os.SEEK_END)
    if size > file.size:
        partial.truncate(0)
    resumed = 0 < size <= file.size
    partial.seek(0)
    digest = hashlib.sha256()
    while chunk := partial.read(CHUNK):
        digest.update(chunk)
    for data in file.chunks(partial.tell()):
        digest.update(data)
        view = memoryview(data)
        while view:
            view = view[partial.write(view) :]
    if digest.hexdigest() != file.sha256:
        partial.truncate(0)
        if resumed:  # What was there may have been of another commit.
            _download(file, partial, path)
            return
        path.unlink(missing_ok=True)
        raise file.differs(digest.hexdigest())
