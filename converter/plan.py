"""What has to be done to bring a source to a target: options, steps, and the plan that they form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from df11.converter.cast import Cast
from df11.converter.files import Action
from df11.converter.manifest import Manifest, Origin
from df11.storage.entry import Entry
from df11.storage.journal import Run
from df11.storage.store import Store


@dataclass(frozen=True, slots=True)
class Options:
    """What a transfer should do."""

    cast: Cast = None
    include: tuple[str, ...] = ()
    """Glob patterns of source files, as in the Hub's client; none: all files."""
    exclude: tuple[str, ...] = ()
    allow_missing: bool = False
    """Continue although an index names shards that do not exist."""
    force: bool = False
    """Replace files that df11 did not write."""
    resume: bool = True
    """Keep finished files."""
    bf16: bool = False
    """Restore: write BF16 if a cast changed values."""
    prove: bool = False
    """Read files on the disk again: after they were written, and before they are kept."""
    may_force: bool = True
    """Whether to suggest ``--force``."""
    max_memory: int | None = None
    """Bytes that reading a header may take, with all else; None if nobody has asked."""
    also: tuple[str, ...] = ()
    """Names of files that the caller itself will write."""
    keep: tuple[str, ...] = ()
    """Patterns of tensors that the cast leaves alone, as :func:`df11.converter.cast.expand` returns them."""


@dataclass(frozen=True, slots=True)
class Step:
    """A file of the source and what becomes of it.

    ``convert``, ``restore``: a shard, a container. ``prove``: a container that stays or is copied, once its whole
    content has been decoded and checked. ``copy``: unchanged. ``write``: ``data``, made from the source's file.
    """

    kind: Literal["convert", "restore", "prove", "copy", "write"]
    entry: Entry
    """The file in the source."""
    name: str
    """Its name in the target."""
    original: str | None = None
    """Of a container: the name of the shard that it is made from."""
    kept: bool = False
    """Whether the target already has it."""
    there: bool = False
    """Whether the target has a file with this name that may be replaced."""
    data: bytes | None = None
    counted: bool = False
    """Whether progress has already counted it, because its hash had to be computed."""
    source_sha256: str | None = None
    """Hash of a local file, if it had to be computed; of what a container restores, unless a cast has changed it."""
    tensors: int = 0
    memory: int = 0
    """Least bytes of memory for the work."""
    least: int = 0
    """Least bytes of the file in the target."""
    most: int = 0
    """Most bytes of the file in the target."""
    expected: int = 0
    """Estimated bytes of the file in the target."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before the work begins."""

    source: Store
    target: Store
    action: Action
    options: Options
    origin: Origin
    steps: tuple[Step, ...]
    """Containers and shards first, sorted by name; files written from memory last."""
    held: Mapping[str, Entry]
    """What the target has under the relevant names."""
    manifest: Manifest
    """The target's manifest, or an empty one."""
    renamed: Mapping[str, str]
    """What the target's manifest is to say of names: see :attr:`Manifest.renamed`."""
    is_ours: bool
    """Whether the target has a manifest."""
    stale: tuple[str, ...]
    """Containers of an earlier run whose source no longer exists."""
    check_free: Callable[[str], None]
    """Raises if the target has a file now that must not be replaced."""
    left_out: tuple[str, ...]
    """Containers of an earlier run whose source this run leaves out."""
    stamp: Mapping[str, object]
    """By what it can be seen that the target has changed since."""
    begun: tuple[str, ...]
    """Files that a run which did the same, and did not end, has named here."""
    run: Run
    """What this run does, for the target's journal."""

    @property
    def tasks(self) -> list[Step]:
        """Steps with work of their own: all but kept files and small ones written from memory."""
        return [step for step in self.steps if not step.kept and step.kind != "write"]

    def locate(self, step: Step) -> str:
        """A source file's name in messages."""
        return self.source.locate(step.entry.name)
