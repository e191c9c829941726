"""The journal of a run that fills a folder: one run at a time, and the next one knows what a killed one has written.

It is a hidden file of the folder, locked while the run lasts. It says what the run does, and which files are to be
written. Before one takes its name, a line says how to know it again. The journal goes when the run has ended well. So a
file that no manifest names yet is still known to be df11's, even if the machine has lost its power since. Only a run
that does the same may take it for its own: to another one, it may be the only copy.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal
from urllib.parse import quote_from_bytes, unquote_to_bytes

from df11.formats import errors
from df11.storage.atomic import (
    Lock,
    check_platform,
    has_name,
    held_elsewhere,
    is_own,
    open_folder,
    open_own,
    sync_folder,
)
from df11.storage.paths import read_file

FILE_NAME: Final = ".df11-run"
MAX_BYTES: Final = 64 << 20
Of = Literal["content", "source", "begun"]
_KINDS: Final[Mapping[bytes, Of]] = {b"content": "content", b"source": "source", b"begun": "begun"}


@dataclass(frozen=True, slots=True)
class Mark:
    """A file that was to be written, or was about to take its name."""

    name: str
    size: int
    sha256: str
    of: Of
    """What the SHA-256 is of: the file, or what it was made from, as the file itself says; or that it is not known."""

    @classmethod
    def begun(cls, name: str) -> Mark:
        """The mark of a file that is to be written: there may be something temporary of it."""
        return cls(name, 0, "-", "begun")

    @property
    def line(self) -> str:
        """The line in a journal."""
        return f"{self.of} {self.size} {self.sha256} {_quoted(self.name)}\n"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run does."""

    action: str
    """One word."""
    source: str
    """A path or an address, which stays the same when the source changes."""

    @property
    def line(self) -> str:
        """The first line of a journal. Its length is at its end, as a lost power may leave a part of it."""
        source = _quoted(self.source)
        return f"run {self.action} {source} {len(source)}\n"


def _quoted(name: str) -> str:
    return quote_from_bytes(os.fsencode(name))


def append(path: Path, marks: Iterable[Run | Mark]) -> None:
    """Add lines to the journal of a run under way, from any process. They are on the disk when this returns."""
    lines = [one.line for one in marks]
    text = memoryview("".join(["\n", *lines]).encode())  # What a lost power has left of another line ends here.
    try:
        # Without O_NONBLOCK, a pipe that somebody has put there would be waited for.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not is_own(descriptor):
                raise OSError(errno.ELOOP, "")
            while text:
                text = text[os.write(descriptor, text) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            what = "something else has taken the place of this run's journal"
            hint = "remove it, and run the same command again"
            raise errors.ConflictError(what, file=path, hint=hint) from None
        raise errors.from_os_error(error, file=path) from None


def read(path: Path) -> tuple[Run | None, Mapping[str, tuple[Mark, ...]]]:
    """What a journal says: of which run it is, and its marks by name. None and no marks if there is none.

    What is torn is skipped.
    """
    if not path.is_file() or path.is_symlink():
        return None, {}
    run: Run | None = None
    found: dict[str, list[Mark]] = {}
    for line in read_file(path, MAX_BYTES).split(b"\n")[:-1]:
        match line.split(b" "):
            case [b"run", action, source, size] if size.isdigit() and size == b"%d" % len(source):
                run = run or Run(action.decode("ascii", "replace"), os.fsdecode(unquote_to_bytes(source)))
            case [of, size, sha256, quoted] if run and of in _KINDS and size.isdigit() and len(size) < 20:
                name = os.fsdecode(unquote_to_bytes(quoted))
                if {"", ".", ".."} & {*name.split("/")}:  # Whoever has written that, it was not df11.
                    continue
                mark = Mark(name, int(size), sha256.decode("ascii", "replace"), _KINDS[of])
                found.setdefault(name, []).append(mark)
    return run, {name: tuple(dict.fromkeys(marks)) for name, marks in found.items()}


class Journal:
    """The journal of this run. Nothing is there until :meth:`open`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._file: IO[bytes] | None = None
        self._lock: Lock | None = None
        self._folder = -1
        self._begun = 0

    @property
    def is_open(self) -> bool:
        """Whether this run is the one that writes to the folder."""
        return self._file is not None

    def left(self, run: Run) -> Mapping[str, tuple[Mark, ...]]:
        """What a run that did the same, and did not end, has left, by name. Raises ConflictError if it did not."""
        other, marks = read(self.path)
        if other is not None and other != run:
            what = f"a run has not ended here: {other.action} of {errors.shortened(other.source)}"
            hint = f"run it again, or choose another target, or remove {FILE_NAME} there to give it up"
            raise errors.ConflictError(what, file=self.path.parent, hint=hint)
        return marks

    @property
    def is_there(self) -> bool:
        """Whether a run is under way, or did not end."""
        return os.path.lexists(self.path)

    def open(self) -> None:
        """Make the folder, if need be, and keep others from writing to it. Raises ConflictError if somebody does."""
        check_platform()
        root = self.path.parent
        self._folder = open_folder(root, root)
        try:
            while self._file is None:
                self._file = self._locked()
            sync_folder(self._folder)
        except OSError as error:
            self._give_up()
            raise errors.from_os_error(error, file=self.path) from None
        except BaseException:
            self._give_up()
            raise

    def _locked(self) -> IO[bytes] | None:
        file = open_own(self.path, self._folder, 0o600)
        try:
            self._lock = Lock(file, self.path)
        except BlockingIOError as error:
            file.close()
            raise held_elsewhere("another df11 is writing to this folder", self.path.parent, error) from None
        except BaseException:
            file.close()
            raise
        if has_name(file, self.path.name, self._folder):
            return file
        self._lock.close()
        file.close()  # The run that had it has ended between our open and our lock.
        return None

    def begin(self, run: Run, marks: Iterable[Mark]) -> None:
        """Note what the run does, and what is to be written and removed. Call it once, after :meth:`open`.

        Raises ConflictError if a run that did something else has not ended.
        """
        assert self._file is not None
        self.left(run)
        is_new = os.fstat(self._file.fileno()).st_size == 0
        append(self.path, [run, *marks])
        self._begun = os.fstat(self._file.fileno()).st_size if is_new else 0

    def close(self, *, is_done: bool) -> None:
        """End the run. The journal goes if all is done, or if nothing has taken its name."""
        if self._file is None:
            return
        try:
            is_over = is_done or os.fstat(self._file.fileno()).st_size == self._begun
            if is_over and has_name(self._file, self.path.name, self._folder):
                os.unlink(self.path.name, dir_fd=self._folder)
        except OSError as error:
            raise errors.from_os_error(error, file=self.path) from None
        finally:
            self._give_up()

    def _give_up(self) -> None:
        if self._lock is not None:
            self._lock.close()
        if self._file is not None:
            self._file.close()
        os.close(self._folder)
        self._file = self._lock = None
