"""Upload and download converted model folders: ``df11 hub push`` and ``df11 hub pull``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from df11.converter import parquet
from df11.converter.apply import Delivery, apply_plan
from df11.converter.manifest import FILE_NAME, Manifest
from df11.converter.options import DEFAULT_MEMORY
from df11.converter.pipeline import PARQUET_MEMORY
from df11.converter.plan import Options
from df11.converter.planning import make_plan
from df11.converter.scan import check_installed
from df11.converter.settings import Settings, parse_size, thread_count
from df11.converter.source import Progress, ignore
from df11.converter.work import Done
from df11.formats import errors
from df11.pipelines.card import CardFields
from df11.pipelines.job import Limits, Model
from df11.pipelines.prepare import prepare_push
from df11.pipelines.run import Log, ModelReport, null_log, run_model
from df11.storage.address import SCHEME, Address, is_address
from df11.storage.entry import Entry
from df11.storage.local import LocalStore
from df11.storage.store import open_source


@dataclass(frozen=True, slots=True)
class PullReport:
    """What :func:`pull` did."""

    source: str
    """The address, with its commit."""
    fetched: int
    kept: int
    """Files that were already there, with the same content."""
    bytes: int
    """Of all files."""


def push(
    folder: str | os.PathLike[str],
    target: str,
    *,
    private: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: bool = False,
    threads: int | None = None,
    log: Log = null_log,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> ModelReport:
    """Upload a converted folder to ``owner/name`` or ``hf://owner/name[@branch]``.

    Every container is verified first, and the model card is written from the manifest. Files that the repository
    already has are not sent again. ``private``: for a new repository; None: private if the manifest says that its
    source was, else as the Hub decides. Raises a Df11Error.
    """
    address = _address(target)
    if address.path:
        raise errors.UsageError("the target is a repository without a folder in it", file=str(address))
    limits = Limits(parse_size(DEFAULT_MEMORY) + PARQUET_MEMORY, None, threads, Path(tempfile.gettempdir()))
    model = Model(str(folder), str(address), None, private, tuple(include), tuple(exclude), allow_missing, CardFields())
    prepared = prepare_push(open_source(Path(folder)), model)
    on_total(sum(step.entry.size for step in prepared.plan.tasks))
    return run_model(prepared, limits, 1, on_ray=False, log=log, on_progress=on_progress)


def pull(
    source: str,
    folder: str | os.PathLike[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: bool = False,
    force: bool = False,
    threads: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> PullReport:
    """Download a converted model folder from ``owner/name`` or ``hf://owner/name[@revision][/path]``.

    Each file must have the hash that the Hub lists. Then every new container is verified, and all are compared with the
    manifest. Files that are already there with the right content are kept. Files that df11 did not write are replaced
    only with ``force``. Raises a Df11Error.
    """
    store, target = open_source(str(_address(source))), LocalStore(Path(folder))
    listed = store.list()
    if store.is_file:
        raise errors.UsageError("this is a file, not a model folder", file=source)
    if any(entry.name == FILE_NAME for entry in listed):
        check_installed()  # Better now than after the download.
    options = Options(None, tuple(include), tuple(exclude), allow_missing, force)
    plan = make_plan(store, target, "copy", options)
    on_total(sum(step.entry.size for step in plan.steps))
    on_progress(sum(step.entry.size for step in plan.steps if step.kept))
    fetched: list[Done] = []
    count = thread_count(threads)
    settings = Settings(count, parse_size(DEFAULT_MEMORY), None, verify=True)
    outcome = apply_plan(plan, settings, Delivery(on_done=fetched.append), progress=on_progress)
    if FILE_NAME in outcome.written:
        _compare(parquet.read(target.root), {step.name: step.entry for step in plan.steps}, target)
    size = sum(step.entry.size for step in plan.steps)
    return PullReport(store.locate(""), len(fetched), len(plan.steps) - len(fetched), size)


def _address(text: str) -> Address:
    # The name of a repository works, too: it cannot mean anything else.
    if is_address(text):
        return Address.parse(text)
    try:
        return Address.parse(SCHEME + text)
    except errors.UsageError:
        what = "not the name of a model on the Hub"
        raise errors.UsageError(what, file=text, expected="owner/name or hf://owner/name") from None


def _compare(manifest: Manifest, entries: Mapping[str, Entry], target: LocalStore) -> None:
    for row in manifest.files:
        there = entries.get(row.file)
        if there is None:
            continue  # Left out, or missing: the index has been checked.
        if row.sha256 is not None and there.sha256 is not None and there.sha256 != row.sha256:
            raise errors.DifferenceError(
                "this is not the container that the manifest describes",
                file=target.locate(row.file),
                expected=row.sha256,
                found=there.sha256,
            )
