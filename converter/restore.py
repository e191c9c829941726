"""Restore the source file or model folder, byte for byte, and prove it by its SHA-256."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from df11.converter.apply import apply_plan
from df11.converter.convert import open_target
from df11.converter.options import DEFAULT_MEMORY
from df11.converter.plan import Options, Plan, Step
from df11.converter.planning import make_plan
from df11.converter.settings import Settings, parse_size, thread_count
from df11.converter.source import Progress, ignore
from df11.converter.work import Done
from df11.storage.store import open_source


@dataclass(frozen=True, slots=True)
class RestoredFile:
    """One restored shard. ``sha256`` is that of the file, and, unless ``bf16``, that of the source."""

    source: str
    output: str
    bytes: int
    sha256: str
    bf16: bool
    """Whether F32 tensors were written as BF16, because the cast changed some of them."""
    status: Literal["restored", "skipped"]


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What :func:`restore` did."""

    files: tuple[RestoredFile, ...]
    copied: int


def restore(
    path: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    bf16: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: bool = False,
    force: bool = False,
    threads: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> RestoreReport:
    """Restore the source of a `.df11` file or model folder to ``dst``, or write nothing if its SHA-256 differs.

    A source whose values a cast changed cannot be restored. That is an error; with ``bf16``, a BF16 safetensors file is
    written instead. ``include`` and ``exclude``: glob patterns of files. ``force`` replaces other files at the target.
    Progress is in bytes written.
    """
    settings = Settings(thread_count(threads), parse_size(DEFAULT_MEMORY), None, verify=True)
    source = open_source(Path(path))
    source.list()
    target, name = open_target(source, Path(dst))
    options = Options(None, tuple(include), tuple(exclude), allow_missing, force, bf16=bf16)
    plan = make_plan(source, target, "restore", options, name=name)
    shards = [step for step in plan.steps if step.kind == "restore"]
    on_total(sum(step.most for step in plan.steps if step.kind != "write"))
    on_progress(sum(step.most for step in plan.steps if step.kind != "write" and step.kept))
    outcome = apply_plan(plan, settings, progress=on_progress)
    done = {one.step.name: one for one in outcome.done}
    return RestoreReport(
        tuple(_report(plan, step, done.get(step.name)) for step in shards), len(plan.steps) - len(shards)
    )


def _report(plan: Plan, step: Step, done: Done | None) -> RestoredFile:
    # From what was done: the source may have changed since.
    sha256 = step.source_sha256 if done is None else done.entry.sha256
    assert sha256 is not None
    is_new = done is not None and not done.step.kept
    source, output = plan.locate(step), plan.target.locate(step.name)
    return RestoredFile(
        source, output, step.most, sha256, step.source_sha256 is None, "restored" if is_new else "skipped"
    )
