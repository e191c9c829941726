"""Which files of a folder or repository belong to a model, by their names: all but what programs leave behind."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from df11.formats import errors
from df11.storage.address import MOST_OF_A_NAME

LEFT_OUT_FOLDERS: Final = frozenset(
    {
        *(".git", ".svn", ".hg"),
        *(".cache", ".huggingface", ".locks", ".no_exist"),  # The Hub's client, in a folder and in its cache.
        *("__MACOSX", ".Spotlight-V100", ".Trashes", ".fseventsd", ".TemporaryItems"),
        *("$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found"),
        *("__pycache__", ".ipynb_checkpoints", ".idea", ".vscode"),
    }
)
"""Bookkeeping of version control, the Hub's client, operating systems and editors."""

_LEFT_OUT: Final = re.compile(
    r"""
    \._.*                                  # AppleDouble: what a Mac keeps beside a file on other file systems
    | \.DS_Store | Thumbs\.db | ehthumbs\.db | desktop\.ini | \.directory
    | \.nfs[0-9a-f]+ | \.fuse_hidden.* | \.Trash-\d+
    | .*~ | \.~lock\..*\# | \#.*\# | \.\#.* | \..*\.sw[a-p]
    | .*\.(aria2|incomplete|crdownload|part|!qB) # Unfinished downloads.
    """,
    re.VERBOSE | re.DOTALL,
)
# Ours, from a run that was killed.
_OURS: Final = re.compile(r"(\..*\.(partial|download)|\.df11-run)(\.lock(\.\d+)?)?", re.DOTALL)
_COMMANDS: Final = frozenset({".git", "git~1"})
"""Names, in any letter case, under which a file or folder makes git run commands."""
_UNFINISHED: Final = re.compile(r".*\.(aria2|incomplete|crdownload|part|!qB)", re.DOTALL)


def is_left_out(name: str) -> bool:
    """Whether the file ``name``, a path with ``/``, is none of a model's."""
    *folders, last = parts = name.split("/")
    if any(folder in LEFT_OUT_FOLDERS for folder in folders) or _LEFT_OUT.fullmatch(last) or _OURS.fullmatch(last):
        return True
    return any(part.casefold() in _COMMANDS for part in parts)


def remarks_on(names: Iterable[str]) -> list[str]:
    """A line for each file that a program leaves beside an unfinished download."""
    found = [name for name in names if _UNFINISHED.fullmatch(name.rpartition("/")[2])]
    return [f"{name}: an unfinished download; the model may be incomplete" for name in found]


def file_as_folder(names: Iterable[str]) -> tuple[str, str] | None:
    """A file, and another one for which it would have to be a folder; None if there are no such names.

    None of the names has a null character.
    """
    for one, other in itertools.pairwise(sorted(name.replace("/", "\0") for name in names)):
        if other.startswith(f"{one}\0"):  # What lies in a folder follows its name at once.
            return one.replace("\0", "/"), other.replace("\0", "/")
    return None


def is_wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns select a file, as in the Hub's client.

    It must match one of ``include``, if there are any, and none of ``exclude``. ``*`` matches ``/``, too. A pattern
    that ends with ``/`` stands for everything in that folder.
    """

    def matches(patterns: Sequence[str]) -> bool:
        slashed = [one.replace("\\", "/") for one in patterns]  # Windows users often write backslashes.
        return any(fnmatch.fnmatchcase(path, f"{one}*" if one.endswith("/") else one) for one in slashed)

    path = name.replace("\\", "/")
    return (not include or matches(include)) and not matches(exclude)


def check_together(names: Collection[str]) -> None:
    """Raise UsageError if files of these names, paths with ``/``, cannot be in one folder, or cannot be written there.

    A file cannot be where a folder must be, nor a folder where a file is kept until it is complete.
    """
    hint = "rename it, or leave it out: --exclude"
    for name in sorted(set(names)):
        *folders, last = name.split("/")
        if any(len(os.fsencode(part)) > MOST_OF_A_NAME for part in (*folders, last)):
            raise errors.UsageError("a part of this name is too long", file=errors.shortened(name), hint=hint)
        if any(map(_OURS.fullmatch, folders)):
            what = "df11 itself uses the name of a folder of this file"
            raise errors.UsageError(what, file=name, hint=hint)
    if (pair := file_as_folder(names)) is not None:
        file, other = pair
        raise errors.UsageError(f"a file would be here, so that {other} cannot be", file=file, hint=hint)
