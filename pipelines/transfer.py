"""Converted trees to the Hub and back: ``df11 hub push`` and ``df11 hub pull``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from df11.converter import manifest as manifests
from df11.converter.convert import parse_size
from df11.converter.files import open_tree
from df11.converter.manifest import FILE_NAME, Manifest
from df11.converter.options import DEFAULT_MEMORY
from df11.converter.source import Progress, ignore
from df11.converter.tree import DF11, already_there
from df11.converter.verify import verify
from df11.formats import errors, hub
from df11.formats.writer import AtomicWriter, make_parents
from df11.pipelines.job import Limits
from df11.pipelines.plan import OVERHEAD, plan_push
from df11.pipelines.run import Log, ModelReport, run_model, unheard


@dataclass(frozen=True, slots=True)
class PullReport:
    """What :func:`pull` did."""

    source: str
    """The address with its commit."""
    fetched: int
    kept: int
    """Files that were there already, with the same content."""
    bytes: int
    """Of all files."""


def push(
    tree: str | os.PathLike[str],
    target: str,
    *,
    private: bool = False,
    jobs: int | None = None,
    log: Log = unheard,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> ModelReport:
    """Upload a converted folder to ``hf://owner/name[@branch]``. Every container is verified first; the card is written from the manifest.

    Files that the target has already are not sent again. Raises a Df11Error.
    """
    limits = Limits(parse_size(DEFAULT_MEMORY) + OVERHEAD, None, jobs, Path(tempfile.gettempdir()))
    plan = plan_push(Path(tree), hub.Address.parse(target), private=private)
    on_total(sum(item.file.size for item in plan.tasks))
    return run_model(plan, limits, 1, on_ray=False, log=log, on_progress=on_progress)


def pull(
    source: str,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    jobs: int | None = None,
    on_total: Callable[[int], None] = ignore,
    on_progress: Progress = ignore,
) -> PullReport:
    """Download a converted tree. Each file must have the hash that the Hub lists; then every container is verified, and compared with the manifest.

    Files that are there already with the right content are kept; others are an error unless ``force``. Raises a Df11Error.
    """
    if not hub.is_address(source):
        raise errors.UsageError("the source must be on the Hub", file=source, expected="hf://owner/name")
    tree, root = open_tree(source), Path(folder)
    if tree.is_file:
        raise errors.UsageError("this is a file, not a tree", file=source)
    if not any(file.name.name.endswith(DF11) for file in tree.files):
        raise errors.UsageError(
            f"no {DF11} file in this repository or folder", file=tree.label, hint="check the address"
        )
    if any(str(file.name) == FILE_NAME for file in tree.files):
        manifests.check_installed()  # Better found now than when all has come.
    on_total(sum(file.size for file in tree.files))
    kept = 0
    for file in tree.files:
        path = root / file.name
        if path.exists() and not force:
            if not path.is_file() or not file.has_content(path):
                raise already_there(path)
            kept += 1
        else:
            make_parents(path)
            with AtomicWriter(path) as writer:
                file.copy_to(writer)
                writer.commit()
        on_progress(file.size)
    verify(root, jobs=jobs)
    hashes = {str(file.name): file.sha256 for file in tree.files}
    if FILE_NAME in hashes:
        _compare(manifests.read(root), hashes, root)
    return PullReport(tree.label, len(tree.files) - kept, kept, sum(file.size for file in tree.files))


def _compare(manifest: Manifest, hashes: dict[str, str | None], root: Path) -> None:
    for row in manifest.files:
        found = hashes.get(row.file, "no such file")
        if row.sha256 is not None and found is not None and found != row.sha256:
            raise errors.DifferenceError(
                "this is not the container that the manifest describes",
                file=root / row.file,
                expected=row.sha256,
                found=found,
            )
