"""Write a file that appears under its name only once it is complete: temporary sibling, lock, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from df11.formats import errors

FLUSH_BYTES: Final = 64 << 20
"""Start write-back after this many bytes, so that the disk works while the CPU does."""
ANY_MODE: Final = 0o666
"""Permissions of a new file, before the umask."""
LOCK_SUFFIX: Final = ".lock"
_LOCK_NAME: Final = len(LOCK_SUFFIX) + len(".4194304")
"""Bytes that lock files add to a file's name: the suffix, and the id of a process that takes the lock over."""
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0)
_FOLDER: Final = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
_NO_PERMISSIONS: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_SYNC: Final = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def temporary_path(path: str | os.PathLike[str], kind: str) -> Path:
    """Where a file that will become ``path`` is kept: a hidden sibling that ends in ``.kind``.

    It is named after the file, unless the file system would find that name too long.
    """
    path = Path(path)
    name = f".{path.name}.{kind}"
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX") - _LOCK_NAME
    except (OSError, AttributeError, ValueError):
        longest = 255 - _LOCK_NAME
    if len(os.fsencode(name)) > longest:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:24]}.{kind}"
    return path.with_name(name)


def open_folder(folder: Path, root: Path | None) -> int:
    """A descriptor of a folder. With ``root``, it lies there, and is made if it is missing.

    No part of the way below ``root`` may be a link. The way to ``root`` itself, or to ``folder`` without it, is the
    caller's. Raises a Df11Error.
    """
    try:
        if root is None:
            return _open_folder(folder)
        descriptor = _open_made(root)
        for number, part in enumerate(parts := folder.relative_to(root).parts, 1):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
                sync_folder(descriptor)  # What is written into it must not be lost with it.
                inner = _open_folder(part, _NO_LINK, dir_fd=descriptor)
            except OSError as error:
                where = root.joinpath(*parts[:number])
                if error.errno in (errno.ELOOP, errno.ENOTDIR) and where.is_symlink():
                    hint = "remove it, or choose another target"
                    raise errors.UsageError("a link is in the way of a folder", file=where, hint=hint) from None
                raise errors.from_os_error(error, file=where) from None
            finally:
                os.close(descriptor)
            descriptor = inner
        return descriptor
    except OSError as error:
        raise errors.from_os_error(error, file=folder) from None
    except ValueError:  # A null character, for example.
        raise errors.UsageError("this cannot be the name of a file", file=repr(str(folder))) from None


def _open_made(root: Path) -> int:
    # The folder of the caller, and those above it that are missing.
    try:
        return _open_folder(root)
    except FileNotFoundError:
        if root == root.parent:
            raise
    above = _open_made(root.parent)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(root.name, dir_fd=above)
            sync_folder(above)
    finally:
        os.close(above)
    return _open_folder(root)


def _open_folder(folder: str | Path, flags: int = 0, *, dir_fd: int | None = None) -> int:
    try:
        return os.open(folder, os.O_RDONLY | _FOLDER | flags, dir_fd=dir_fd)
    except PermissionError:  # One that can be written to, but not listed.
        return os.open(folder, getattr(os, "O_PATH", 0) | _FOLDER | flags, dir_fd=dir_fd)


def open_own(path: Path, folder: int, mode: int) -> IO[bytes]:
    """A file with a known name, opened to be written: it is made here, or was left by an earlier run.

    ``path`` is for messages, ``folder`` the descriptor of where it is. Anybody may have put something else under a name
    that can be guessed: raises UsageError unless it is a regular file of this user with no other name, and OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NO_LINK | _NO_WAIT
    refused = errors.UsageError(
        f"what has the name of a temporary file, {path.name}, is none of df11's", file=path, hint="remove it"
    )
    try:
        descriptor = os.open(path.name, flags, mode, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise refused from None
        raise
    if not is_own(descriptor):
        os.close(descriptor)
        raise refused
    return open(descriptor, "r+b", buffering=0)


def is_own(descriptor: int) -> bool:
    """Whether an open file is a regular one of this user with no other name."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_nlink < 2 and status.st_uid == os.geteuid()


def has_name(file: IO[bytes], name: str, folder: int) -> bool:
    """Whether an open file is still the one that has a name in a folder."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino)


def remove(path: Path, root: Path | None) -> None:
    """Remove a file, if it is there; ``root`` as of :func:`open_folder`. Raises a Df11Error."""
    folder = open_folder(path.parent, root)
    try:
        os.unlink(path.name, dir_fd=folder)
        sync_folder(folder)  # Before a manifest no longer names it: a file that comes back would be nobody's.
    except FileNotFoundError:
        pass
    except OSError as error:
        raise errors.from_os_error(error, file=path) from None
    finally:
        os.close(folder)


def check_platform() -> None:
    """Raise UsageError where df11 does not write."""
    try:
        import fcntl  # noqa: F401
    except ModuleNotFoundError:
        raise errors.UsageError("df11 reads on Windows, but does not write there yet", hint="use WSL") from None


class Lock:
    """An exclusive lock on a file, across all processes, until it is closed.

    The open file itself is locked. Some network file systems have no such locks. There, a link beside it, which only
    one process can create, stands in for the lock. It leads nowhere: its text says who holds the lock, from the moment
    it exists. Raises BlockingIOError if another process holds it.
    """

    def __init__(self, file: int | IO[bytes], path: Path) -> None:
        import fcntl

        self._beside: Path | None = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._beside = path.with_name(path.name + LOCK_SUFFIX)
            self._create(self._beside)

    def _create(self, beside: Path) -> None:
        mine = f"{os.uname().nodename} {os.getpid()}"
        while True:
            try:
                beside.symlink_to(mine)
                return
            except FileExistsError:
                if not _remove_abandoned(beside):
                    raise BlockingIOError(
                        errno.EWOULDBLOCK, f"this file system has no locks, and {beside} stands in for one"
                    ) from None

    def close(self) -> None:
        """Release the lock. The lock on an open file ends when that file is closed."""
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)


def _remove_abandoned(beside: Path) -> bool:
    # Remove the link that stands in for a lock if its process ran on this machine and is gone.
    try:
        text = str(beside.readlink())
        host, _, process = text.partition(" ")
        if host != os.uname().nodename or not process.isdecimal():
            return False
        os.kill(int(process), 0)
    except FileNotFoundError:
        return True
    except ProcessLookupError:
        return _remove_guarded(beside, text, int(process))
    except (OSError, ValueError, OverflowError):
        pass
    return False


def _remove_guarded(beside: Path, text: str, process: int) -> bool:
    # Several processes may find it abandoned. Only one at a time may look again and remove it.
    guard = beside.with_name(f"{beside.name}.{process}")
    try:
        os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600))
    except FileExistsError:
        return False
    try:
        if str(beside.readlink()) == text:
            beside.unlink()
    except OSError:  # Another process has removed it, or put something else there.
        pass
    finally:
        guard.unlink()
    return True


def held_elsewhere(what: str, path: Path, error: BlockingIOError) -> errors.ConflictError:
    """The error for a lock that another process holds."""
    hint = "wait for it to end"
    if error.strerror is not None and error.filename is None and LOCK_SUFFIX in error.strerror:
        hint += f"; {error.strerror}: if no df11 is running, remove it"
    return errors.ConflictError(what, file=path, hint=hint)


def remove_abandoned(path: Path, root: Path | None) -> None:
    """Remove what a killed run has left for ``path``, unless another process holds it."""
    for kind in ("partial", "download"):
        left = temporary_path(path, kind)
        if not os.path.lexists(left) and not os.path.lexists(f"{left}{LOCK_SUFFIX}"):
            continue
        with contextlib.suppress(OSError, errors.Df11Error):  # Somebody else's, or in use: not this run's concern.
            folder = open_folder(left.parent, root)
            try:
                with open_own(left, folder, 0o600) as file:
                    lock = Lock(file, left)
                    if has_name(file, left.name, folder):
                        os.unlink(left.name, dir_fd=folder)
                    lock.close()
            finally:
                os.close(folder)


class AtomicWriter:
    """A binary file, written from its start, that takes its name in :meth:`commit`. Without that, nothing remains.

    The temporary file has a fixed name and is locked: a second writer of the same path gets a ConflictError, and what a
    killed writer left is overwritten. ``root``: a folder above the path; folders between are made, and none of them may
    be a link. ``mode``: permissions of the source, which the new file does not exceed.
    """

    def __init__(self, path: str | os.PathLike[str], *, root: Path | None = None, mode: int = ANY_MODE) -> None:
        check_platform()
        self.path = Path(path)
        self.partial = temporary_path(path, "partial")
        self.position = 0
        self._mode = mode & 0o066 | 0o600  # The owner may write, as in any new file.
        self._committed = False
        self._flushed = 0
        self._flush: Future[None] | None = None
        self._folder = open_folder(self.path.parent, root)
        try:
            self._file, self._lock = self._open()
        except BaseException:
            os.close(self._folder)
            raise
        self._flusher = ThreadPoolExecutor(1, "df11-flush")

    def _open(self) -> tuple[IO[bytes], Lock]:
        while True:
            try:
                file = open_own(self.partial, self._folder, self._mode)
            except OSError as error:
                raise errors.from_os_error(error, file=self.path) from None
            try:
                lock = Lock(file, self.partial)
            except BlockingIOError as error:
                file.close()
                raise held_elsewhere("another process is writing this file", self.path, error) from None
            except OSError as error:
                self._remove(file)
                file.close()
                raise errors.from_os_error(error, file=self.path) from None
            if has_name(file, self.partial.name, self._folder):
                break
            lock.close()
            file.close()  # Another writer renamed or removed it between our open and our lock.
        try:
            os.ftruncate(file.fileno(), 0)
            self._narrow(file.fileno())
        except OSError as error:
            self._remove(file)
            lock.close()
            file.close()
            raise errors.from_os_error(error, file=self.path) from None
        return file, lock

    def _remove(self, file: IO[bytes]) -> None:
        # The temporary file, unless somebody else's has taken its name.
        if has_name(file, self.partial.name, self._folder):
            os.unlink(self.partial.name, dir_fd=self._folder)

    def _narrow(self, descriptor: int) -> None:
        # A leftover file may be open to more people. Narrow its mode before anything is written to it.
        mode = os.fstat(descriptor).st_mode & 0o777
        if mode & ~self._mode:
            try:
                os.fchmod(descriptor, mode & self._mode)
            except OSError as error:
                if error.errno not in _NO_PERMISSIONS:
                    raise

    def write(self, data: object, offset: int | None = None) -> None:
        """Write bytes (any buffer) at ``offset``, by default after what has been written so far."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        start = self.position if offset is None else offset
        end = start + len(view)
        try:
            while view:
                count = os.pwrite(self._file.fileno(), view, start)
                view, start = view[count:], start + count
            self.position = max(self.position, end)
            if self.position - self._flushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
                if self._flush is not None:
                    self._flush.result()  # The kernel reports a write-back error only once.
                self._flushed = self.position
                self._flush = self._flusher.submit(self._sync)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None

    def _sync(self) -> None:
        os.fsync(self._file.fileno())

    def rewind(self, position: int) -> None:
        """Drop everything from ``position`` on."""
        try:
            os.ftruncate(self._file.fileno(), position)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None
        self.position = position

    def commit(self, check: Callable[[], object] = lambda: None) -> None:
        """Make the file durable and give it its name, which replaces a file, but nothing else.

        ``check`` is called last, to raise if what has the name by then must not be replaced.
        """
        try:
            if self._flush is not None:
                self._flush.result()
            self._sync()
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(self.path.name, dir_fd=self._folder, follow_symlinks=False).st_mode
                if not stat.S_ISREG(there) and not stat.S_ISLNK(there):
                    what = "a folder is in the way" if stat.S_ISDIR(there) else "this is not a regular file"
                    raise errors.UsageError(what, file=self.path, hint="remove it, or choose another target")
            if not has_name(self._file, self.partial.name, self._folder):
                what = "something else has taken the name of the temporary file"
                raise errors.ConflictError(what, file=self.partial, hint="run the same command again")
            check()
            os.replace(self.partial.name, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._committed = True
            sync_folder(self._folder)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flusher.shutdown(wait=True)
        left: OSError | None = None
        try:
            if not self._committed:
                self._remove(self._file)
        except OSError as problem:
            left = problem
        finally:
            self._lock.close()
            self._file.close()
            os.close(self._folder)
        if left is not None and error is not None:
            error.add_note(
                f"{self.partial} could not be removed: {left.strerror}"
            )  # The first error is the one that counts.
        elif left is not None:
            raise errors.from_os_error(left, file=self.partial) from None


def sync_folder(folder: int) -> None:
    """Make the names in a folder durable, too. Some file systems cannot do this."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def write_bytes(
    path: Path,
    data: bytes,
    *,
    root: Path | None = None,
    mode: int = ANY_MODE,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write a small file atomically, with arguments as of :class:`AtomicWriter`. Raises a Df11Error."""
    with AtomicWriter(path, root=root, mode=mode) as writer:
        writer.write(data)
        writer.commit(check)
