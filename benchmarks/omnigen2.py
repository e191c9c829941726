"""The section ``omnigen2``: a stand-in for the whole OmniGen2 checkpoint, 31.2 GB of F32, on a real disk.

Few machines can hold 31.2 GB in memory. To give all steps the same conditions on any machine, every file is dropped
from the page cache before a step reads it: all reads come from the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import harness, measure, synthetic
from benchmarks.entropy_bound import measure_entropy_bound
from benchmarks.harness import Board, Checkout
from benchmarks.measure import Measured
from benchmarks.sections import Bench

SHARE: Final = 1.4
"""Disk space as a share of the F32 source: a third for the containers, the largest file once more, tables."""
BOUND_STEP: Final = 16
"""Above that scale, the entropy bound is estimated from every 16th mebibyte of a tensor."""
EXACT_BOUND_SCALE: Final = 0.1
"""Up to this scale, the entropy bound takes all weights into account."""
COMPONENTS: Final = ("transformer", "mllm", "vae")


def omnigen2(bench: Bench) -> None:
    """``cp`` with fsync and ``df11 convert --cast bf16`` in turns; sizes by component; verify; restore of a shard."""
    source, target = bench.folder / "omnigen2", bench.folder / "omnigen2-df11"
    harness.say(f"omnigen2: making {sum(synthetic.omnigen2_bytes(bench.scale).values()) / 1e9:.2f} GB")
    files = list(synthetic.write_omnigen2(source, bench.scale))
    case, checkout, board = f"scale {bench.scale:g}", bench.checkouts[0], bench.board
    command = ("convert", source, target, "--cast", "bf16", "-j", bench.jobs, "--quiet")
    convert = checkout.program("", *command, output=target)
    taken: dict[str, list[Measured]] = {"cp + fsync": [], "convert": []}
    for number in range(bench.rounds):
        harness.say(f"omnigen2: round {number + 1} of {bench.rounds}")
        taken["cp + fsync"].append(_copy(source, files, bench.folder / "copy"))
        harness.evict(source)
        taken["convert"].append(harness.run(convert))
    both = list(zip(taken["convert"], taken["cp + fsync"], strict=True))
    speeds = [copy.wall / one.wall for one, copy in both]
    board.add(f"{case}: speed, convert / cp + fsync", "x", "higher", speeds, ratio=True)
    for component in ("", *COMPONENTS):
        _add_sizes(board, f"{case}: {component or 'all'}", source / component, target / component, bench.scale)
    harness.evict(target)
    taken["verify"] = [harness.run(checkout.program("", "verify", target, "-j", bench.jobs, "--quiet"))]
    taken["restore"] = [_restore_shard(checkout, source, target, bench.folder / "restored.safetensors", bench.jobs)]
    for name, runs in taken.items():
        board.add(f"{case}: {name}", "s", "lower", [one.wall for one in runs])
        board.add(f"{case}: {name}, CPU time", "s", "lower", [one.cpu for one in runs])
        board.add(f"{case}: {name}, peak memory", "MiB", "lower", [one.peak_rss / 2**20 for one in runs])


def _copy(source: Path, names: Sequence[str], target: Path) -> Measured:
    # File by file: each copy is removed before the next, outside the measured time, so that little space is needed.
    runs = []
    for name in names:
        harness.evict(source / name)
        runs.append(measure.run(["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source / name), str(target)]))
        target.unlink()
    wall, user, system = (sum(getattr(run, key) for run in runs) for key in ("wall", "user", "system"))
    return Measured(wall, user, system, max(run.peak_rss for run in runs), "")


def _add_sizes(board: Board, name: str, source: Path, target: Path, scale: float) -> None:
    bound = measure_entropy_bound(source, cast=True, every=BOUND_STEP if scale > EXACT_BOUND_SCALE else 1)
    stored = measure.stored_bytes(target, ".df11")
    board.add(name, "bytes", "lower", [stored])
    board.add(name, "of BF16", "lower", [stored / bound.bf16_bytes], ratio=True)
    board.add(f"{name}, entropy bound", "of BF16", "lower", [bound.ratio], ratio=True)


def _restore_shard(checkout: Checkout, source: Path, target: Path, restored: Path, jobs: int) -> Measured:
    # The first shard of the mllm, whose casts are exact; its SHA-256 must be that of the source.
    name = next(file for file in synthetic.omnigen2()["files"] if file.startswith("mllm/"))
    container = (target / name).with_suffix(".df11")
    harness.evict(container)
    taken = harness.run(checkout.program("", "restore", container, restored, "-j", jobs, "--quiet"))
    if measure.sha256(restored) != measure.sha256(source / name):
        raise measure.CommandError(f"{name}: the restored file differs from the source")
    restored.unlink()
    return taken


def needed(scale: float) -> int:
    """Disk space for the section, in bytes."""
    return int(SHARE * sum(synthetic.omnigen2_bytes(scale).values())) + 500_000_000
