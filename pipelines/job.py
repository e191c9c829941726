"""Read a job file: which models are converted, from where to where, and within which limits.

docs/jobs.md describes the keys. Everything is checked before work begins: a mistake costs a line, not a night.
"""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from df11.converter.cast import Cast, expand
from df11.converter.settings import MOST_THREADS, parse_size
from df11.formats import errors
from df11.pipelines.card import CardFields
from df11.storage.address import Address, is_address
from df11.storage.paths import read_file

DEFAULT_MEMORY: Final = "300MiB"
LARGEST: Final = 1 << 20
"""Bytes of a job file: some thousand models."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a job. ``source`` and ``target``: an ``hf://`` address or a folder."""

    source: str
    target: str
    cast: Cast
    private: bool | None
    """For a target on the Hub. None: a new one is private if the source is known to be, else as the Hub decides; an
    existing one is accepted as it is, but no public one for a private source."""
    include: tuple[str, ...]
    """Glob patterns of files, relative to the source; none: all files."""
    exclude: tuple[str, ...]
    """Patterns of files to leave out."""
    allow_missing: bool
    """Whether an index may name shards that do not exist."""
    card: CardFields
    keep: tuple[str, ...] = ()
    """Expanded patterns of tensors that the cast leaves alone."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may use.

    ``memory``: bytes. ``disk``: bytes of files that wait for their upload; None: as much as the disk has.
    """

    memory: int
    disk: int | None
    threads: int | None
    work: Path
    """Folder for the waiting files, which are removed once they are uploaded."""


MOST_PARTS: Final = 16
"""Of a dotted key. The reader keeps each part with all parts before it."""
LONGEST_PATTERN: Final = 1000
"""Characters. The time that a pattern takes grows with the square of its length."""
_PART: Final = r"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_LONG_KEY: Final = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_PART}){{{MOST_PARTS}}}")


@dataclass(frozen=True, slots=True)
class Job:
    """A whole job file."""

    models: tuple[Model, ...]
    limits: Limits
    shards_per_commit: int


class _Table:
    # A table of the file. Keys are taken out one by one; whatever is left at the end is a mistake.

    def __init__(self, value: Any, file: Path, where: str) -> None:
        self.file, self.where = file, where
        if not isinstance(value, dict):
            raise self.error(where, "a table", value)
        self._left = dict(value)

    def error(self, key: str, expected: str, found: Any) -> errors.UsageError:
        return errors.UsageError(
            f"{self.where} {key}".strip() if key != self.where else self.where,
            file=self.file,
            expected=expected,
            found=repr(found),
        )

    def take(self, key: str, kind: type, default: Any = None, *, needed: bool = False) -> Any:
        if key not in self._left:
            if needed:
                raise errors.UsageError(
                    f"{self.where} has no {key!r}", file=self.file, hint="docs/jobs.md lists the keys"
                )
            return default
        value = self._left.pop(key)
        if kind is list and isinstance(value, dict):
            raise errors.UsageError(
                f"{self.where} {key} is a single table", file=self.file, hint=f"write [[{key}]], with two brackets"
            )
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(
                key,
                {str: "a string", bool: "true or false", int: "a whole number", list: "a list", dict: "a table"}[kind],
                value,
            )
        return value

    def place(self, key: str) -> str:
        """An address or a path. An empty string would be the job file's own folder, so it is refused."""
        value = self.take(key, str, needed=True)
        if not value.strip() or "\0" in value:
            raise self.error(key, "hf://owner/name or a folder", value)
        return str(value)

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.take(key, list, [])
        if not all(isinstance(item, str) and len(item) <= LONGEST_PATTERN for item in value):
            raise self.error(key, f"a list of strings of up to {LONGEST_PATTERN} characters", value)
        return tuple(value)

    def end(self, known: str) -> None:
        if self._left:
            raise errors.UsageError(
                f"{self.where} has unknown keys",
                file=self.file,
                expected=known,
                found=", ".join(map(str, sorted(self._left))),
            )


def read_job(path: str | os.PathLike[str]) -> Job:
    """Read and check a job file (TOML). Relative paths in it start from its folder. Raises UsageError, MissingError."""
    file = Path(path)
    data = read_file(file, LARGEST)
    try:
        text = data.decode("utf-8")
        if _LONG_KEY.search(text):
            raise errors.UsageError("a key of too many parts", file=file, expected=f"at most {MOST_PARTS}")
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Too many digits of a number are a ValueError, too.
        raise errors.UsageError(f"not a TOML file: {error}", file=file) from None
    top = _Table(content, file, "the job")
    models = [
        _read_model(value, file, number) for number, value in enumerate(top.take("model", list, [], needed=True), 1)
    ]
    limits = _read_limits(top.take("limits", dict, {}), file)
    upload = _Table(top.take("upload", dict, {}), file, "[upload]")
    shards_per_commit = upload.take("shards_per_commit", int, 1)
    if shards_per_commit < 1:
        raise upload.error("shards_per_commit", "at least 1", shards_per_commit)
    upload.end("shards_per_commit")
    top.end("[[model]], [limits], [upload]")
    if not models:
        raise errors.UsageError("the job has no [[model]]", file=file)
    seen: dict[str, int] = {}
    for number, model in enumerate(models, 1):
        target = _identity(model.target)
        if target in seen:
            raise errors.UsageError(
                f"[[model]] {seen[target]} and {number} have the same target", file=file, found=model.target
            )
        seen[target] = number
    return Job(tuple(models), limits, shards_per_commit)


def _read_model(value: Any, file: Path, number: int) -> Model:
    table = _Table(value, file, f"[[model]] {number}")
    source = table.place("source")
    revision = table.take("revision", str)
    target = table.place("target")
    cast = table.take("cast", str)
    if cast not in (None, "bf16"):
        raise table.error("cast", "'bf16'", cast)
    keep = table.strings("keep_f32")
    if keep and cast is None:
        raise table.error("keep_f32", "cast = 'bf16' beside it", list(keep))
    private = table.take("private", bool)
    include, exclude = table.strings("include"), table.strings("exclude")
    allow_missing = table.take("allow_missing", bool, False)
    card = _read_card(table.take("card", dict, {}), file, number)
    table.end("source, revision, target, cast, keep_f32, private, include, exclude, allow_missing, [model.card]")
    if revision is not None:
        if not is_address(source) or Address.parse(source).revision is not None:
            raise table.error("revision", "a source on the Hub without @revision", revision)
        address = Address.parse(source)
        source = str(Address(address.repository, revision, address.path))
    if is_address(target):
        goal = Address.parse(target)
        if goal.path:
            raise table.error("target", "a repository without a folder in it", target)
        if is_address(source) and Address.parse(source).repository.lower() == goal.repository.lower():
            raise errors.UsageError(
                f"{table.where}: source and target are the same repository", file=file, found=target
            )
    elif private is not None:
        raise table.error("private", "a target on the Hub", target)
    return Model(
        _located(source, file),
        _located(target, file),
        cast,
        private,
        include,
        exclude,
        allow_missing,
        card,
        expand(keep),
    )


def _located(place: str, file: Path) -> str:
    # An address in its canonical spelling, or a path from the job file's folder.
    return str(Address.parse(place)) if is_address(place) else os.fspath(_path(place, file))


def _path(text: str, file: Path) -> Path:
    try:
        return file.parent / Path(text).expanduser()
    except RuntimeError:  # An unknown user, or no user at all.
        raise errors.UsageError(
            "this home folder is unknown", file=file, found=repr(text), hint="write the full path"
        ) from None


def _identity(target: str) -> str:
    # The same for all spellings of a target.
    if not is_address(target):
        return os.path.realpath(target)
    address = Address.parse(target)
    return f"hf://{address.repository.lower()}@{address.revision or 'main'}"


def _read_card(value: Any, file: Path, number: int) -> CardFields:
    table = _Table(value, file, f"[model.card] {number}")
    lists = {"tags", "language"}
    names = [field.name for field in fields(CardFields)]
    found: dict[str, Any] = {}
    for name in names:
        if name in lists:
            found[name] = table.strings(name)
        elif (text := table.take(name, str)) is not None:
            found[name] = text
    table.end(", ".join(names))
    if "results" in found:
        if "\0" in found["results"]:
            raise table.error("results", "a path", found["results"])
        found["results"] = os.fspath(_path(found["results"], file))
    return CardFields(**found)


def _read_limits(value: Mapping[str, Any], file: Path) -> Limits:
    table = _Table(value, file, "[limits]")

    def size(key: str, default: str | None) -> int | None:
        text = table.take(key, str, default)
        if text is None:
            return None
        try:
            return parse_size(text)
        except errors.UsageError:
            raise table.error(key, "a size such as '300MiB'", text) from None

    memory, disk = size("memory", DEFAULT_MEMORY), size("disk", None)
    assert memory is not None
    threads = table.take("threads", int)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise table.error("threads", f"at least 1 and at most {MOST_THREADS}", threads)
    work = table.take("work", str)
    if work is not None and (not work.strip() or "\0" in work):
        raise table.error("work", "a folder", work)
    table.end("memory, disk, threads, work")
    folder = Path(tempfile.gettempdir()) if work is None else _path(os.path.expandvars(work), file)
    return Limits(memory, disk, threads, folder)
