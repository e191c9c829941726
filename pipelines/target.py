"""Where the files of a job go: a repository on the Hub, or a folder. Both say what they hold, take files, and are read back at the end."""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from df11.converter.files import LocalFile, SourceFile, walk
from df11.converter.hub import HubFile, find_commit, list_files, start_blob_id
from df11.converter.manifest import FILE_NAME, Manifest
from df11.formats import errors, hub
from df11.formats.writer import AtomicWriter, make_parents
from df11.version import __version__

IN_MEMORY: Final = 10 << 20
"""Files up to this size may become ordinary git files on the Hub, whose content goes into the commit itself; larger ones are always LFS objects."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What is known of a file's content: the Hub lists SHA-256 for LFS files and git's blob id for others."""

    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """The digest of some bytes, with both hashes."""
        blob = start_blob_id(len(data))
        blob.update(data)
        return cls(len(data), hashlib.sha256(data).hexdigest(), blob.hexdigest())

    @classmethod
    def of_source(cls, file: SourceFile) -> Digest:
        """What the Hub lists for a source's file; a local one is read."""
        if isinstance(file, LocalFile):
            return cls.of_file(file.path)
        return cls(file.size, file.sha256, file.blob_id if file.sha256 is None else None)

    @classmethod
    def of_file(cls, path: Path) -> Digest:
        """The digest of a file, read in pieces; with a blob id if it is small."""
        try:
            if path.stat().st_size <= IN_MEMORY:
                return cls.of(path.read_bytes())
            with path.open("rb") as file:
                return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None

    def agrees(self, other: Digest) -> bool | None:
        """Whether both are of the same content; None if they have no hash in common."""
        if self.size != other.size:
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        if self.blob_id is not None and other.blob_id is not None:
            return self.blob_id == other.blob_id
        return None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A file that the target has, or will have with the next commit. ``ticket``: what the commit needs. Can be pickled."""

    name: str
    digest: Digest
    ticket: Any


class Carrier(Protocol):
    """Brings finished files to a target, from any process. Can be pickled."""

    def deliver(self, path: Path, name: str) -> Delivery:
        """Upload a file; what it returns goes into a commit. Raises a Df11Error."""
        ...


class Target(Protocol):
    """A repository or folder that a job fills."""

    label: str
    folder: Path | None
    """Where files are written and stay; None: they wait for their upload in a staging folder."""
    head: str | None
    """Of a repository the commit that this job has seen or made last; None if there is none."""

    def look(self) -> dict[str, Digest]:
        """All files that are there now."""
        ...

    def read(self, name: str) -> bytes:
        """A small file's content."""
        ...

    def create(self) -> None:
        """Make the repository or folder if it does not exist."""
        ...

    def carrier(self) -> Carrier:
        """Who brings files here."""
        ...

    def commit(
        self, deliveries: Sequence[Delivery], files: Mapping[str, bytes], removed: Iterable[str], summary: str
    ) -> str | None:
        """Make deliveries and some small files visible, at once; returns the new commit of a repository.

        Raises ConflictError if somebody else has changed the target.
        """
        ...


def open_target(place: str, *, private: bool = False) -> Target:
    """The target that a place means: an ``hf://`` address or a folder."""
    return HubTarget(hub.Address.parse(place), private) if hub.is_address(place) else FolderTarget(Path(place))


def read_manifest(target: Target, held: Mapping[str, Digest]) -> Manifest | None:
    """The target's manifest, or None if it has none."""
    return Manifest.from_bytes(target.read(FILE_NAME), f"{target.label}/{FILE_NAME}") if FILE_NAME in held else None


class FolderTarget:
    """A folder. Files are written where they stay; a commit writes the small ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder: Path | None = path
        self.head: str | None = None
        self.label = str(path)

    def look(self) -> dict[str, Digest]:
        """All files; each is read to the end."""
        if self.path.exists() and not self.path.is_dir():
            raise errors.UsageError("the target is a file", file=self.path, hint="name a folder")
        return (
            {path.relative_to(self.path).as_posix(): Digest.of_file(path) for path in walk(self.path)}
            if self.path.is_dir()
            else {}
        )

    def read(self, name: str) -> bytes:
        """A small file's content."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise errors.from_os_error(error, file=self.path / name) from None

    def create(self) -> None:
        """Make the folder."""
        make_parents(self.path / "file")

    def carrier(self) -> Carrier:
        """Who brings files here."""
        return FolderCarrier()

    def commit(
        self, deliveries: Sequence[Delivery], files: Mapping[str, bytes], removed: Iterable[str], summary: str
    ) -> None:
        """Remove files, and then write the small ones, each atomically, in their order: the manifest forgets only what is gone."""
        del deliveries, summary
        for name in removed:
            (self.path / name).unlink(missing_ok=True)
        for name, data in files.items():
            make_parents(self.path / name)
            with AtomicWriter(self.path / name) as writer:
                writer.write(data)
                writer.commit()


@dataclass(frozen=True, slots=True)
class FolderCarrier:
    """Of a folder, which every worker sees under the same path."""

    def deliver(self, path: Path, name: str) -> Delivery:
        """Nothing is moved: the file is there already."""
        return Delivery(name, Digest.of_file(path), None)


class HubTarget:
    """A model repository on the Hub, or one of its branches. Each commit names its parent, so that nobody else's change is lost or built upon."""

    def __init__(self, address: hub.Address, private: bool) -> None:
        self.folder: Path | None = None
        self.address = address
        self.private = private
        self.label = str(address)
        self.head: str | None = None
        self._run = uuid.uuid4().hex
        self._commits = 0
        self._held: dict[str, HubFile] = {}

    def look(self) -> dict[str, Digest]:
        """All files of the branch's newest commit, which becomes the parent of the next one; none if there is no repository.

        Raises UsageError if it is public, but should be private.
        """
        try:
            info = find_commit(self.address)
        except errors.MissingError:
            self.head = None
            return {}
        if self.private and not info.private:
            raise errors.UsageError(
                "the repository is public, but the job wants it private", file=self.label, hint="change one of them"
            )
        head = str(info.sha)
        if self.head is not None and head != self.head:
            raise self._changed(head)
        self.head = head
        self._held = {file.name.as_posix(): file for file in list_files(hub.Address(self.address.repository, head))}
        return {name: Digest.of_source(file) for name, file in self._held.items()}

    def read(self, name: str) -> bytes:
        """A small file's content, of the commit that was looked at."""
        return self._held[name].read_bytes()

    def create(self) -> None:
        """Create the repository, and its branch."""
        if self.head is None:
            hub.retrying(
                lambda: hub.api().create_repo(self.address.repository, private=self.private, exist_ok=True), self.label
            )
            if (branch := self.address.revision) is not None:
                hub.retrying(
                    lambda: hub.api().create_branch(self.address.repository, branch=branch, exist_ok=True), self.label
                )
            self.look()

    def carrier(self) -> Carrier:
        """Who brings files here."""
        return HubCarrier(self.address)

    def commit(
        self, deliveries: Sequence[Delivery], files: Mapping[str, bytes], removed: Iterable[str], summary: str
    ) -> str | None:
        """One commit on top of the last one that was seen."""
        assert self.head is not None, "look before you commit"
        hub.api()
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [delivery.ticket for delivery in deliveries]
        additions += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
        operations = [*additions, *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed)]
        self._commits += 1
        description = f"df11 {__version__}, run {self._run}, commit {self._commits}"
        waits = iter(hub.WAITS)
        while True:
            try:
                with hub.explained(self.label), warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message="It seems that you are about to commit a data file"
                    )  # The manifest is one.
                    info = hub.api().create_commit(
                        self.address.repository,
                        operations,
                        commit_message=summary,
                        commit_description=description,
                        revision=self.address.revision,
                        parent_commit=self.head,
                    )
                self.head = str(info.oid)
                return self.head
            except (errors.RetryLaterError, errors.ConflictError) as error:
                # A server can answer with an error, or not at all, although the commit has landed: then trying again would be refused.
                if self._has_landed(description):
                    return self.head
                wait = next(waits, None)
                if wait is None or not isinstance(error, errors.RetryLaterError):
                    raise
                hub.pause(error, wait)

    def _has_landed(self, description: str) -> bool:
        def ask() -> Any:
            return hub.api().list_repo_commits(self.address.repository, revision=self.address.revision)

        newest = hub.retrying(ask, self.label)[0]
        if newest.commit_id == self.head:
            return False
        if description not in newest.message:
            raise self._changed(newest.commit_id)
        self.head = str(newest.commit_id)
        return True

    def _changed(self, head: str) -> errors.ConflictError:
        return errors.ConflictError(
            "somebody else has changed the target meanwhile",
            file=self.label,
            expected=f"commit {self.head}",
            found=head,
            hint="wait until no other job writes there, and run the same command again",
        )


@dataclass(frozen=True, slots=True)
class HubCarrier:
    """Uploads a file's content; the commit that shows it comes later, and from one place."""

    address: hub.Address

    def deliver(self, path: Path, name: str) -> Delivery:
        """Upload the file as an LFS object; a small one may travel with the commit."""
        api = hub.api()
        from huggingface_hub import CommitOperationAdd

        try:
            data = path.read_bytes() if path.stat().st_size <= IN_MEMORY else None
        except OSError as error:
            raise errors.from_os_error(error, file=path) from None
        addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path if data is None else data)
        digest = Digest(
            addition.upload_info.size,
            addition.upload_info.sha256.hex(),
            None if data is None else Digest.of(data).blob_id,
        )
        hub.retrying(
            lambda: api.preupload_lfs_files(
                self.address.repository, [addition], revision=self.address.revision, num_threads=1
            ),
            f"{self.address}/{name}",
        )
        return Delivery(name, digest, addition)
