"""What a disk may hold after a power cut, by what a process did to it.

The rules are those of POSIX: what was written to a file is safe once the file was synced; that a name is there, is gone
or has another file is safe once its folder was synced. Whatever is not safe may be lost or not, each on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tests.crash.machine import Call

Files = Mapping[str, bytes | None]


@dataclass(eq=False)
class _File:
    now: bytearray
    safe: bytes | None = None


def after_power_cut(before: Files, calls: Sequence[Call], root: str) -> list[dict[str, bytes | None]]:
    """The states that a power cut may leave, those at the corners.

    Nothing that is not safe has happened; names are what they were, but files hold only what is safe; the same, with
    zeros at the end for what is lost.
    """
    found = []
    for names_survive, zeros in ((False, False), (True, False), (True, True)):
        disk = _replayed(before, calls, root, names_survive=names_survive)
        state: dict[str, bytes | None] = {}
        for name, file in disk.items():
            if file is None:
                state[name] = None
            else:
                safe = file.safe or b""
                state[name] = safe + bytes(len(file.now) - len(safe)) if zeros else safe
        found.append(state)
    return found


def _replayed(before: Files, calls: Sequence[Call], root: str, *, names_survive: bool) -> dict[str, _File | None]:
    start = {name: None if data is None else _File(bytearray(data), data) for name, data in before.items()}
    volatile, safe = dict(start), dict(start)
    pending: list[tuple[str, str, str, _File | None]] = []
    by_inode: dict[int, _File] = {}

    def short(path: str) -> str:
        return path.removeprefix(root + "/")

    def change(where: str, kind: str, name: str, file: _File | None) -> None:
        pending.append((where, kind, name, file))
        _apply(volatile, kind, name, file)

    for call in calls:
        if not call.is_done or call.kind == "send":
            continue
        name = short(call.path)
        where = str(PurePosixPath(name).parent)
        match call.kind:
            case "create" | "open":
                if name not in volatile:
                    change(where, "put", name, _File(bytearray()))
                file = volatile[name]
                assert file is not None
                by_inode[call.inode] = file
            case "write":
                file = by_inode[call.inode]
                end = call.offset + len(call.data)
                file.now.extend(bytes(max(0, end - len(file.now))))
                file.now[call.offset : end] = call.data
            case "truncate":
                file = by_inode[call.inode]
                del file.now[call.offset :]
                file.now.extend(bytes(call.offset - len(file.now)))
            case "fsync":
                if call.inode in by_inode:
                    by_inode[call.inode].safe = bytes(by_inode[call.inode].now)
                for one in [one for one in pending if one[0] == name or (call.path == root and one[0] == ".")]:
                    _apply(safe, *one[1:])
                    pending.remove(one)
            case "mkdir":
                change(where, "put", name, None)
            case "rename":
                new = short(call.other)
                moved = volatile[name]
                change(where, "move", f"{name}\n{new}", moved)
            case "unlink" | "rmdir":
                change(where, "drop", name, None)
    return volatile if names_survive else _reachable(safe)


def _apply(names: dict[str, _File | None], kind: str, name: str, file: _File | None) -> None:
    if kind == "put":
        names.setdefault(name, file)
    elif kind == "drop":
        names.pop(name, None)
    else:
        old, new = name.split("\n")
        names.pop(old, None)
        names[new] = file


def _reachable(names: dict[str, _File | None]) -> dict[str, _File | None]:
    # A file in a folder that is not there is lost with it.
    def is_there(name: str) -> bool:
        return all(str(parent) in names for parent in PurePosixPath(name).parents if str(parent) != ".")

    return {name: file for name, file in names.items() if is_there(name)}
