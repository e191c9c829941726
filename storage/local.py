"""A store on a disk: a folder, or one file in its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from df11.formats import errors
from df11.storage.address import MOST_DEPTH, is_repository
from df11.storage.atomic import ANY_MODE, open_folder, remove, remove_abandoned, write_bytes
from df11.storage.entry import Entry
from df11.storage.file import LocalFile
from df11.storage.journal import Journal
from df11.storage.names import is_left_out, remarks_on
from df11.storage.paths import existing, kind_of, naming, open_below, read_file
from df11.storage.store import Put, Store


class LocalStore(Store):
    """A folder, or, if ``path`` is a file, that file alone. Links are followed: the Hub's cache uses them.

    A link that :meth:`list` has not seen is not: somebody may have put it there since, to have another file published.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.is_file = kind_of(path) == "file"
        self.root = path.parent if self.is_file else path
        self.name = path.name
        self._listed: Path | None = None
        self._linked: dict[str, str] = {}

    def refresh(self) -> bool:
        """Whether it is there."""
        return kind_of(self.root / self.name if self.is_file else self.root) is not None

    def missing(self) -> errors.Df11Error:
        """The error for a path that does not exist."""
        return errors.MissingError("no such file or folder", file=self.label, hint=_hint(self.label))

    def list(self) -> tuple[Entry, ...]:
        """All files, with sizes only."""
        if self.is_file:
            return (Entry(self.name, (self.root / self.name).stat().st_size),)
        kind = kind_of(self.root)
        if kind is None:
            return ()
        if kind != "folder":
            what = "this is neither a file nor a folder" if kind == "other" else "this is a file, not a folder"
            raise errors.UsageError(what, file=self.root, hint="name a folder")
        found, self.refused, self._linked = {}, {}, {}
        self._listed = self.root.resolve()
        for path, real, what in sorted(_walk(self.root, self._listed)):
            name = path.relative_to(self.root).as_posix() + "/" * (what != "" and path.is_dir())
            if what:
                hint = f"put the file itself there, or leave it out: --exclude '{name}'"
                error = errors.MissingError if what == _NOTHING else errors.UsageError
                self.refused[name] = error(what, file=path, hint=hint)
            if what != _NOTHING and not name.endswith("/"):
                found[name] = path
                if real != self._listed / name:
                    self._linked[name] = str(real)
        self.remarks = (*remarks_on(found), *self._twice({path.parent for path in found.values()}))
        return tuple(Entry(name, found[name].stat().st_size) for name in sorted(found) if not is_left_out(name))

    def _twice(self, folders: set[Path]) -> Sequence[str]:
        # Folders that appear twice: a model is often kept as checkpoint-100, with a link to it called latest.
        root = self.root.resolve()
        links = [folder for folder in sorted(folders) if folder != self.root and folder.is_symlink()]
        inside = [(link, link.resolve()) for link in links if root in link.resolve().parents]
        return [
            f"{link.relative_to(self.root)}: a link to {real.relative_to(root)}, whose files are included twice; "
            f"--exclude '{link.relative_to(self.root)}/' leaves them out"
            for link, real in inside
        ]

    def free_bytes(self) -> int | None:
        """Bytes that are free on the disk."""
        try:
            disk = os.statvfs(existing(self.root))
        except OSError:
            return None
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else None  # A pseudo file system has no size.

    def find(self, names: Collection[str]) -> dict[str, Entry]:
        """Those of the files that exist."""
        found = {}
        for name in names:
            path = self.root / name
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                if path.is_symlink():
                    raise errors.UsageError("a broken link is in the way", file=path) from None
                continue
            except ValueError:  # Not a valid file name, whatever a manifest says.
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    continue
                raise errors.from_os_error(error, file=path) from None
            if not stat.S_ISREG(status.st_mode):
                what = "a folder is in the way" if stat.S_ISDIR(status.st_mode) else "this is not a regular file"
                raise errors.UsageError(what, file=path, hint="remove it, or choose another target")
            found[name] = Entry(name, status.st_size)
        return found

    def locate(self, name: str) -> str:
        """The path of a file."""
        return str(self.root / name)

    def open(self, entry: Entry) -> LocalFile:
        """A file. Once files have been listed, raises ConflictError if a link has taken the place of one."""
        path = self.root / entry.name
        if self._listed is None:
            return LocalFile(path)
        if entry.name in self.refused:
            raise self.refused[entry.name]
        real = Path(self._linked.get(entry.name, self._listed / entry.name))
        # A blob of the Hub's cache lies beside the snapshots.
        root = self._listed if self._listed in real.parents else real.parents[1]
        return LocalFile(path, file=open_below(root, real.relative_to(root).as_posix()))

    def mode(self, entry: Entry) -> int:
        """Permissions of a file."""
        with self.open(entry) as file:
            return file.mode

    def hashed(self, entry: Entry) -> Entry:
        """The entry with its hashes, for which the file is read."""
        if entry.is_hashed:
            return entry
        with self.open(entry) as file:
            return Entry.of_chunks(entry.name, file.size, file.chunks())

    def is_direct(self, name: str) -> bool:
        """Whether no link lies between the folder and a file in it."""
        return all(not (self.root / parent).is_symlink() for parent in PurePosixPath(name).parents)

    def check_name(self, name: str) -> bool:
        """Raises UsageError if a link or a file is where a folder must be."""
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            path = self.root / parent
            if path.is_symlink() or kind_of(path) not in (None, "folder"):
                what = "a link" if path.is_symlink() else "a file"
                hint = "remove it, or choose another target"
                raise errors.UsageError(f"{what} is in the way of a folder", file=path, hint=hint)
        return bool(name)

    def contains(self, other: Store) -> bool:
        """Whether another folder is this one, or lies inside it."""
        if self.is_file or not isinstance(other, LocalStore):
            return False
        with naming(other.root):
            mine, others = self.root.resolve(), other.root.resolve()
        return mine == others or mine in others.parents

    def create(self, *, private: bool | None) -> None:
        """Make the folder."""
        os.close(open_folder(self.root, self.root))

    def place(self, name: str, staging: Path | None) -> tuple[Path, Path]:
        """A file is written where it stays."""
        return self.root, self.root / name

    @contextmanager
    def staging(self, work: Path, most: int) -> Iterator[Path | None]:
        """None: files are written in place."""
        yield None

    def staged_bytes(self, size: int) -> int:
        """Zero: files are written in place."""
        return 0

    def journal(self) -> Journal | None:
        """The journal of a run that fills this folder."""
        return Journal(self.root)

    def stamp(self, names: Iterable[str]) -> Mapping[str, object]:
        """Inode, size and time of each file; None if it does not exist."""
        found: dict[str, object] = {}
        for name in names:
            found[name] = None
            with contextlib.suppress(OSError, ValueError):
                status = (self.root / name).lstat()
                found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found

    def clean(self, names: Iterable[str]) -> None:
        """Remove what killed runs have left for files of these names."""
        for name in names:
            remove_abandoned(self.root / name, self.root)

    def put(self, name: str, content: Path | bytes, *, mode: int = ANY_MODE) -> Put:
        """A file already in place, or content that the commit writes."""
        if isinstance(content, bytes):
            return Put(Entry.of(name, content), (content, mode, self.stamp([name])[name]))
        return Put(Entry(name, content.stat().st_size), None)

    def commit(self, puts: Sequence[Put], removed: Sequence[str], message: str) -> None:
        """Remove files, then write the ones held in memory, each atomically and in order."""
        for name in removed:
            remove(self.root / name, self.root)
        for put in puts:
            if put.payload is not None:
                content, mode, stamp = put.payload
                name = put.entry.name
                check = partial(self.check_stamp, name, stamp)
                write_bytes(self.root / name, content, root=self.root, mode=mode, check=check)


def _hint(label: str) -> str:
    first = Path(label).parts[:1]
    if first == ("hf:",):  # An address that has lost a slash.
        return "this reads files on this machine only; first run df11 hub pull hf://OWNER/NAME FOLDER"
    if first and first[0] in ("http:", "https:"):
        return "for a model on the Hub: hf://OWNER/NAME"
    if is_repository(label):
        return f"check the path, or for the model on the Hub write hf://{label}"
    return "check the path"


def snapshot_in(path: Path) -> Path:
    """The folder that a path means as a source: ``models--owner--name`` of the Hub's cache stands for its snapshot."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or kind_of(snapshots) != "folder" or snapshots.is_symlink():
        return path
    # One that is a link would be another folder, which the caller has not named.
    commits = sorted(folder.name for folder in snapshots.iterdir() if folder.is_dir() and not folder.is_symlink())
    main = path / "refs" / "main"
    commit = read_file(main, 100).decode("ascii", "replace").strip() if kind_of(main) == "file" else ""
    if commit not in commits:
        if len(commits) != 1:
            hint = f"name one of them: {snapshots}/..." if commits else "download the model first"
            what = f"this folder of the Hub's cache has {len(commits)} snapshots"
            raise errors.UsageError(what, file=path, hint=hint)
        commit = commits[0]
    return snapshots / commit


_NOTHING: Final = "neither a file nor a folder, or a link that leads nowhere"
_LEADS_OUT: Final = "a link leads out of this folder"


def _walk(folder: Path, root: Path, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, Path, str]]:
    # Files, and whatever else is no folder: the path, the same without links, and what is wrong with it. Nobody looks
    # into folders that are links out of ``root``: what they hold may be anything, a key that would be published.
    real = folder.resolve()
    if real in above:
        raise errors.UsageError("a link leads back to a folder above it", file=folder)
    if len(above) > MOST_DEPTH:
        raise errors.UsageError("folders in folders in folders", file=folder, expected=f"at most {MOST_DEPTH}")
    try:
        found = list(os.scandir(folder))
    except OSError as error:
        raise errors.from_os_error(error, file=folder) from None
    for item in found:
        path = folder / item.name
        leads_to = Path(os.path.realpath(path)) if item.is_symlink() else real / item.name
        leads_out = item.is_symlink() and not _is_inside(leads_to, root)
        kind = None if item.is_symlink() and leads_to == path.absolute() else kind_of(path)
        if kind == "folder":
            if is_left_out(f"{item.name}/x"):
                continue
            if leads_out:
                yield path, leads_to, _LEADS_OUT
            else:
                yield from _walk(path, root, above | {real})
        elif kind == "file":
            yield path, leads_to, _LEADS_OUT if leads_out else ""
        elif not is_left_out(item.name):
            yield path, leads_to, _NOTHING


def _is_inside(real: Path, root: Path) -> bool:
    # In the folder, or a blob of the Hub's cache, to which the links of its snapshots lead.
    if root == real or root in real.parents:
        return True
    snapshots = next((folder for folder in root.parents if folder.name == "snapshots"), None)
    return snapshots is not None and real.parent == snapshots.parent / "blobs"
