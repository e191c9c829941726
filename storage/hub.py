"""A store on the Hub: a repository, or a folder or file in it. Downloads are checked against the Hub's hashes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from df11.formats import errors
from df11.storage import client
from df11.storage.address import SCHEME, Address, is_safe_path
from df11.storage.atomic import ANY_MODE, Lock, has_name, held_elsewhere, open_folder, open_own
from df11.storage.entry import GIT_BYTES, Entry
from df11.storage.file import File, MemoryFile
from df11.storage.names import file_as_folder, is_left_out, remarks_on
from df11.storage.ranges import CLIENT_MEMORY, RangeFile, RemoteFile
from df11.storage.store import Put, Store
from df11.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
MOST_FILES: Final = 1_000_000
MOST_HISTORY: Final = 30
"""Commits that are looked at for an earlier version of a file."""
GIT_SNIFFS: Final = 8000
"""Git takes a file for binary if there is a zero among its first bytes, this many."""
_AGAIN: Final = "run the same command again"


class HubStore(Store):
    """A model repository on the Hub, or a folder or file in it.

    When it is read, it stays at the commit found by the last refresh. When it is written to, each commit names the one
    before it as its parent, so that nobody else's change is lost or built upon.
    """

    versioned = True

    def __init__(self, address: Address) -> None:
        self.address: Address = address
        self.label = str(address)
        self._run = uuid.uuid4().hex
        self._commits = 0
        self._missing: errors.MissingError | None = None
        self._listed: tuple[str, tuple[Entry, ...]] | None = None

    def refresh(self) -> bool:
        """Look up the current commit of the revision; False if there is no such repository or revision."""
        revision = self.address.revision
        try:
            info = client.call(lambda api: api.repo_info(self.address.repository, revision=revision), self.label)
        except errors.MissingError as error:
            if self.head is not None:
                raise
            self._missing = error
            return False
        head = str(info.sha)
        if not _COMMIT.fullmatch(head):  # Anything else may be a branch, which moves.
            what = "the Hub's response names no commit"
            raise errors.RetryLaterError(what, file=self.label, found=errors.shortened(head), hint=_AGAIN)
        if self.head is not None and head != self.head:
            raise self._changed(head)
        self.head, self.private = head, bool(info.private)
        return True

    def missing(self) -> errors.Df11Error:
        """The Hub's error for a repository that does not exist."""
        return self._missing or errors.MissingError("no such repository", file=self.label)

    def _at(self, path: str) -> Address:
        return Address(self.address.repository, self.head, path)

    def list(self) -> tuple[Entry, ...]:
        """All files at the commit. A file whose name no folder can hold is left out, with a remark."""
        if self.head is None:
            return ()
        if self._listed is None or self._listed[0] != self.head:
            self._listed = self.head, self._list()
        return self._listed[1]

    def find(self, names: Collection[str]) -> dict[str, Entry]:
        """All files at the commit."""
        return {entry.name: entry for entry in self.list()}

    def _list(self) -> tuple[Entry, ...]:
        root = self.address.path
        where = str(self._at(root))
        found: Sequence[Any] | None = None
        if root:
            paths = client.call(
                lambda api: api.get_paths_info(self.address.repository, [root], revision=self.head), where
            )
            if not paths:
                what = "no such file or folder in this repository"
                raise errors.MissingError(what, file=where, hint="check the address")
            self.is_file = hasattr(paths[0], "blob_id")
            found = paths if self.is_file else None
        if found is None:
            found = client.call(self._list_all, where)
        known = [(str(item.path), self._entry(item)) for item in found]
        entries = sorted((entry for _, entry in known if entry is not None), key=lambda entry: entry.name)
        odd = [
            f"{errors.shortened(path)}: left out, as no folder can hold a file with this name"
            for path, one in known
            if one is None
        ]
        if (pair := file_as_folder(entry.name for entry in entries)) is not None:
            what = "the Hub lists files that no repository can hold together"
            raise errors.UsageError(what, file=where, found=" and ".join(map(errors.shortened, pair)))
        self.remarks = (*odd, *remarks_on(entry.name for entry in entries))
        return tuple(entry for entry in entries if not is_left_out(entry.name))

    def _list_all(self, api: HfApi) -> Sequence[Any]:
        # As a list in one go: tried again as a whole, so that no page is missing.
        tree = api.list_repo_tree(
            self.address.repository, self.address.path or None, recursive=True, revision=self.head
        )
        found: dict[str, Any] = {}
        for number, item in enumerate(tree):
            if number >= MOST_FILES:
                what = "the Hub's listing of this repository does not end"
                raise errors.UsageError(what, file=self.label, found=f"more than {number:,} files and folders")
            if found.setdefault(str(item.path), item) is not item:
                raise errors.UsageError("the Hub lists a file twice", file=self.label, found=ascii(item.path))
        return [item for item in found.values() if hasattr(item, "blob_id")]

    def _entry(self, item: Any) -> Entry | None:
        path, root = str(item.path), self.address.path
        inside = path == root if self.is_file else not root or path.startswith(root + "/")
        leads_out = {"", ".", ".."} & {*path.split("/")}
        if not inside or leads_out or type(item.size) is not int or item.size < 0:
            what = "the Hub lists a file that no repository can hold"
            raise errors.UsageError(what, file=str(self._at(root)), found=errors.shortened(path))
        if not is_safe_path(path):
            return None
        name = path.rpartition("/")[2] if self.is_file else path[len(root) :].lstrip("/")
        if item.lfs is None:
            return Entry(name, item.size, None, str(item.blob_id))
        return Entry(name, item.size, str(item.lfs.sha256))

    def _path(self, name: str) -> str:
        root = self.address.path
        return root if self.is_file else f"{root}/{name}" if root else name

    def locate(self, name: str) -> str:
        """hf://owner/name@commit/path, or without a name the store itself."""
        if not name:
            return str(self._at(self.address.path))
        return str(self._at(self._path(name))) if is_safe_path(name) else f"{self.label}/{name}"

    def open(self, entry: Entry) -> File:
        """A file, read by range requests. A file outside LFS is small: it is downloaded whole and checked."""
        address = self._at(self._path(entry.name))
        if entry.sha256 is not None:
            return RangeFile(address, entry.size)
        if entry.size > GIT_BYTES * 4:
            what = "too large for a file outside LFS"
            raise errors.UsageError(what, file=str(address), found=f"{entry.size} bytes")
        import numpy as np

        out = np.empty(entry.size, np.uint8)
        RemoteFile(address, entry.size).fetch(0, out)
        data = out.tobytes()
        entry.check(Entry.of(entry.name, data), str(address))
        file = MemoryFile(data, str(address))
        file.memory += CLIENT_MEMORY
        return file

    def hashed(self, entry: Entry) -> Entry:
        """The entry itself: the Hub lists hashes."""
        return entry

    def check_name(self, name: str) -> bool:
        """Whether a file on the Hub can have this name."""
        return is_safe_path(name)

    def contains(self, other: Store) -> bool:
        """Whether the other store is in the same repository."""
        return other.address is not None and other.address.repository.lower() == self.address.repository.lower()

    def had(self, name: str, there: Entry) -> bool:
        """Whether a file had this content at one of the last commits."""
        repository, path = self.address.repository, self._path(name)
        where = str(self._at(path))

        def entries(api: HfApi) -> list[Entry | None]:
            commits = api.list_repo_commits(repository, revision=self.head)[:MOST_HISTORY]
            found = [api.get_paths_info(repository, [path], revision=one.commit_id) for one in commits]
            return [self._entry(infos[0]) for infos in found if infos and hasattr(infos[0], "blob_id")]

        found = client.call(entries, where, is_one_page=True)
        return any(entry is not None and there.same_content(entry) for entry in found)

    def original_card(self) -> bytes | None:
        """The repository's README.md, if this is a folder of it; None if there is none."""
        if not self.address.path or self.head is None:
            return None
        root = HubStore(Address(self.address.repository, self.head))
        root.head = self.head
        found = client.call(
            lambda api: api.get_paths_info(self.address.repository, ["README.md"], revision=self.head), self.label
        )
        entry = root._entry(found[0]) if found and hasattr(found[0], "blob_id") else None
        return None if entry is None else root.read(entry)

    # For targets

    def create(self, *, private: bool | None) -> None:
        """Create the repository, and its branch. Raises UsageError if it is public but should be private."""
        if self.head is None:
            repository, branch = self.address.repository, self.address.revision
            asked: dict[str, Any] = {} if private is None else {"private": private}
            client.call(lambda api: api.create_repo(repository, exist_ok=True, **asked), self.label)
            if branch is not None:
                client.call(lambda api: api.create_branch(repository, branch=branch, exist_ok=True), self.label)
            if not self.refresh():
                raise self.missing()

    def place(self, name: str, staging: Path | None) -> tuple[Path, Path]:
        """In the staging folder."""
        assert staging is not None
        return staging.parents[1], staging / name  # Below the folder that the user named, no link is followed.

    @contextmanager
    def staging(self, work: Path, most: int) -> Iterator[Path | None]:
        """A folder that one process uses at a time, and that goes with it. What a killed one left is removed."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.label.removeprefix(SCHEME)).strip("-.")
        digest = hashlib.sha256(f"{client.endpoint()} {self.label}".encode()).hexdigest()[:8]
        folder = work / f"df11-job-{name[:150]}-{digest}"
        with _locked(folder) as place:
            _clear(place)
            try:
                _check_room(folder, most)
                yield folder
            finally:
                _clear(place)

    def staged_bytes(self, size: int) -> int:
        """All of it."""
        return size

    def put(self, name: str, content: Path | bytes, *, mode: int = ANY_MODE) -> Put:
        """Upload the content. What is in memory travels with the commit.

        The client gets open files, not paths: for open files it shows no progress bars and does not use Xet, whose
        memory has no bound.
        """
        CommitOperationAdd = client.library().CommitOperationAdd  # noqa: N806
        if isinstance(content, bytes):
            put = Put(Entry.of(name, content), CommitOperationAdd(name, io.BytesIO(content)))
            if b"\0" in content[:GIT_SNIFFS]:  # Probably LFS. One by one: for several, the client draws a bar.
                self._upload(name, put.payload)
            return put
        try:
            if content.stat().st_size <= GIT_BYTES:
                put = self.put(name, content.read_bytes())
                if put.payload.path_or_fileobj:
                    self._upload(name, put.payload)
                return put
            with open(content, "rb") as file:
                addition = CommitOperationAdd(name, file)
                self._upload(name, addition)
                if addition.path_or_fileobj is file:  # The client drops what it uploads.
                    raise errors.UsageError(
                        "the Hub does not accept this file as an LFS object", file=self.locate(name)
                    )
        except OSError as error:
            raise errors.from_os_error(error, file=content) from None
        return Put(Entry(name, addition.upload_info.size, addition.upload_info.sha256.hex()), addition)

    def _upload(self, name: str, addition: Any) -> None:
        # Uploads the content if the Hub keeps it in LFS; other content travels with the commit.
        repository, revision = self.address.repository, self.address.revision

        def upload(api: HfApi) -> None:
            if isinstance(addition.path_or_fileobj, io.BufferedIOBase):  # Otherwise an earlier try uploaded it.
                addition.path_or_fileobj.seek(0)
            api.preupload_lfs_files(repository, [addition], revision=revision, num_threads=1)

        client.call(upload, f"{self.address}/{name}")

    def commit(self, puts: Sequence[Put], removed: Sequence[str], message: str) -> None:
        """One commit on top of the last one seen."""
        assert self.head is not None, "refresh before you commit"
        from huggingface_hub import CommitOperationDelete

        additions = [put.payload for put in puts]
        operations = [*additions, *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed)]
        self._commits += 1
        description = f"df11 {__version__}, run {self._run}, commit {self._commits}"

        def attempt(api: HfApi) -> Any:
            for addition in additions:
                if isinstance(addition.path_or_fileobj, io.BytesIO):
                    addition.path_or_fileobj.seek(0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
                return api.create_commit(
                    self.address.repository,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.address.revision,
                    parent_commit=self.head,
                )

        def try_once() -> str:
            try:
                return str(client.once(attempt, self.label).oid)
            except (errors.RetryLaterError, errors.ConflictError):
                # A server can respond with an error, or not at all, although the commit has landed. A second try would
                # then be refused.
                landed = self._find_landed(description)
                if landed is None:
                    raise
                return landed

        self.head = client.retrying(try_once)

    def _find_landed(self, description: str) -> str | None:
        revision = self.address.revision
        commits = client.call(
            lambda api: [
                (str(one.commit_id), str(one.message))
                for one in api.list_repo_commits(self.address.repository, revision=revision)[:1]
            ],
            self.label,
            is_one_page=True,
        )
        newest, message = commits[0] if commits else (self.head, "")
        if newest == self.head:
            return None
        if description not in message:
            raise self._changed(str(newest))
        return newest

    def _changed(self, head: str) -> errors.ConflictError:
        return errors.ConflictError(
            "somebody else has changed this repository in the meantime",
            file=self.label,
            expected=f"commit {self.head}",
            found=head,
            hint="wait until no other job writes there, and run the same command again",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    # A descriptor of the folder, which is made, and removed at the end, while its lock is held.
    path = folder / ".lock"
    with ExitStack() as stack:
        try:
            while True:
                place = _opened(folder)
                stack.callback(os.close, place)
                try:
                    file = stack.enter_context(open_own(path, place, 0o600))
                    stack.callback(Lock(file, path).close)
                    if has_name(file, path.name, place):
                        break
                except FileNotFoundError:
                    pass  # The job that had it has ended meanwhile, and removed it.
                stack.close()
        except BlockingIOError as error:
            raise held_elsewhere("another job is writing to this target", folder, error) from None
        except OSError as error:
            raise errors.from_os_error(error, file=folder) from None
        try:
            yield place
        finally:
            with suppress(OSError):
                os.unlink(path.name, dir_fd=place)
            stack.close()
            with suppress(OSError):  # Another job may have it by now.
                folder.rmdir()


def _opened(folder: Path) -> int:
    # Where temporary files are, anybody can make a folder of this name, or a link.
    above = folder.parent
    refused = errors.NotAllowedError(
        "this folder is somebody else's", file=folder, hint="name another folder: [limits] work"
    )
    try:
        place = open_folder(folder, above)
    except errors.UsageError:
        raise refused from None
    try:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            what = "anybody can exchange files in this folder"
            raise errors.NotAllowedError(what, file=above, hint="name another one: [limits] work")
        if os.fstat(place).st_uid != os.geteuid():
            raise refused
        os.fchmod(place, 0o700)
    except BaseException:
        os.close(place)
        raise
    return place


def _clear(place: int) -> None:
    with os.scandir(place) as found:
        folders = [item.name for item in found if item.is_dir(follow_symlinks=False)]
    for name in folders:
        shutil.rmtree(name, ignore_errors=True, dir_fd=place)


def _check_room(folder: Path, most: int) -> None:
    free = shutil.disk_usage(folder).free
    if most > free:
        raise errors.BudgetError(
            "not enough disk space for one file",
            file=folder,
            expected=f"{most:,} bytes",
            found=f"{free:,}",
            hint="free some, or choose another folder: [limits] work",
        )
