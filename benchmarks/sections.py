"""The sections that need nothing but this machine's memory or disk: start, cores, convert, sizes, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import entropy_bound, harness, measure, safetensors_file, synthetic
from benchmarks.harness import Board, Checkout, Program
from benchmarks.peers import Peers
from benchmarks.safetensors_file import Tensor

SHARDS: Final = 8
CORE_BYTES: Final = 8 << 20
"""Bytes of the weights for the kernels."""
CORE_ROUNDS: Final = 8
START_ROUNDS: Final = 4
"""Runs per round of the other sections: these runs are short."""
MANY: Final = 20_000
"""Tensors of 8 KiB."""
_KERNELS: Final = Path(__file__).with_name("kernels.py")


@dataclass(frozen=True, slots=True)
class Bench:
    """What a section works with.

    ``folder``: empty, removed afterwards. ``checkouts``: this one, and the one to compare with, if any. ``size``:
    factor for all sizes. ``scale``: of the OmniGen2 stand-in. ``jobs``: threads.
    """

    board: Board
    folder: Path
    checkouts: list[Checkout]
    peers: Peers
    size: float
    scale: float
    rounds: int
    jobs: int

    def bytes(self, count: float) -> int:
        """A scaled size, at least a megabyte."""
        return max(1_000_000, int(count * self.size))


def readable(size: float) -> str:
    """A size, for the name of a case."""
    return f"{size / 1e9:.3g} GB" if size >= 5e8 else f"{size / 1e6:.3g} MB"


def start(bench: Bench) -> None:
    """Short runs, dominated by start-up: no work at all, 2 MB, and MiniLM in BF16, 45 MB."""
    rounds = START_ROUNDS * bench.rounds
    programs = [checkout.program("", "--version") for checkout in bench.checkouts] + bench.peers.lmzip("--version")
    bench.board.turns("--version", programs, _pairs(programs), rounds)
    for name, make in (
        ("convert 2 MB", lambda path: synthetic.write_gaussian(path, 2_000_000)),
        ("convert MiniLM, 45 MB", synthetic.write_minilm_bf16),
    ):
        source = bench.folder / "x.safetensors"
        make(source)
        programs = _compressors(bench, source)
        bench.board.turns(name, programs, _pairs(programs), rounds)


def _pairs(programs: list[Program]) -> list[tuple[str, str]]:
    # The first program of each checkout, as a pair.
    return [(programs[0].name, program.name) for program in programs[1:]]


def _compressors(bench: Bench, source: Path) -> list[Program]:
    # Each writes to the path that ``_packed`` returns; all use the same number of threads.
    programs = []
    for checkout in bench.checkouts:
        target = _packed(bench, source, checkout.name)
        command = ("convert", source, target, "-j", bench.jobs, "--quiet")
        programs.append(checkout.program("", *command, output=target))
    target = _packed(bench, source, "lmzip")
    return programs + bench.peers.lmzip("compress", "-q", "-f", "-j", bench.jobs, source, target, output=target)


def _packed(bench: Bench, source: Path, by: str) -> Path:
    suffix = "" if source.is_dir() and by != "lmzip" else ".lmz" if by == "lmzip" else ".df11"
    return bench.folder / f"packed by {by}{suffix}"


def convert(bench: Bench) -> None:
    """Whole processes compared with lmzip and the other checkout: convert, verified and not; verify; restore."""
    for nominal, shards in ((0.85e9, 1), (4e9, 1), (2e9, SHARDS)):
        size = bench.bytes(nominal)
        case = readable(size) + (f" in {shards} shards" if shards > 1 else "")
        source = bench.folder / ("source" if shards > 1 else "source.safetensors")
        write_shards(source, size, shards)
        verified = _compressors(bench, source)
        others = [
            checkout.program("--no-verify", *program.command[3:], "--no-verify", output=program.output)
            for checkout, program in zip(bench.checkouts, verified, strict=False)
        ]
        # The verified ones come last: they leave the files that are verified and restored below.
        unverified = others + [program for program in verified if program.name == "lmzip"]
        pairs = _pairs(verified) + [(others[0].name, program.name) for program in unverified[1:]]
        bench.board.turns(f"convert {case}", others + verified, pairs, bench.rounds)
        options = ("-j", bench.jobs, "--quiet")
        ours = [(checkout, _packed(bench, source, checkout.name)) for checkout in bench.checkouts]
        verifiers = [checkout.program("", "verify", container, *options) for checkout, container in ours]
        verifiers += bench.peers.lmzip("verify", _packed(bench, source, "lmzip"))
        bench.board.turns(f"verify {case}", verifiers, _pairs(verifiers), bench.rounds)
        restored = bench.folder / ("restored" if shards > 1 else "restored.safetensors")
        command = (restored, *options)
        restorers = [
            checkout.program("", "restore", container, *command, output=restored) for checkout, container in ours
        ]
        archive = _packed(bench, source, "lmzip")
        restorers += bench.peers.lmzip("decompress", "-q", "-f", "-j", bench.jobs, archive, restored, output=restored)
        # This checkout's comes last, and its output is checked.
        bench.board.turns(f"restore {case}", restorers[::-1], _pairs(restorers), bench.rounds)
        for file in safetensors_file.files_below(source):
            if measure.sha256(file) != measure.sha256(restored / file.relative_to(source)):
                raise measure.CommandError(f"{case}: the restored file differs from the source")
        for path in (source, restored, *(program.output for program in verified if program.output)):
            harness.remove(path)


def write_shards(source: Path, size: int, shards: int) -> None:
    """A Gaussian file, or a folder of this many shards with this total size."""
    if shards == 1:
        synthetic.write_gaussian(source, size)
        return
    source.mkdir()
    for number in range(1, shards + 1):
        path = source / f"model-{number:05}-of-{shards:05}.safetensors"
        synthetic.write_gaussian(path, size // shards, f"model.{number}")  # No shard repeats another.
    (source / "config.json").write_text("{}\n")


def sizes(bench: Bench) -> None:
    """Bytes stored, everything counted, and the entropy bound: 8 bits and the exponents' entropy, by tensor."""
    size = bench.bytes(0.85e9)
    cases: dict[str, Callable[[Path], object]] = {
        "MiniLM": synthetic.write_minilm_bf16,
        f"Gaussian, {readable(size)}": lambda path: synthetic.write_gaussian(path, size),
    }
    source, target = bench.folder / "x.safetensors", bench.folder / "packed"
    for name, make in cases.items():
        make(source)
        bound = entropy_bound.measure_entropy_bound(source)
        bench.board.add(f"{name}: entropy bound", "of BF16", "lower", [bound.ratio], ratio=True)
        container = target.with_suffix(".df11")
        command = ("convert", source, container, "--quiet")
        programs = [checkout.program("", *command, output=container) for checkout in bench.checkouts]
        for program in programs + bench.peers.smallest(source, target):
            harness.say(f"sizes: {name}: {program.name}")
            harness.run(program)
            assert program.output is not None
            stored = program.output.stat().st_size
            bench.board.add(f"{name}: {program.name}", "bytes", "lower", [stored])
            bench.board.add(f"{name}: {program.name}", "of BF16", "lower", [stored / bound.bf16_bytes], ratio=True)
            harness.remove(program.output)


def memory(bench: Bench) -> None:
    """Peak resident memory: idle, on one tensor of 1 GB, on 4 GB, and on many small tensors."""
    one, large = bench.bytes(1e9), bench.bytes(4e9)
    many = [Tensor(f"layers.{i}.weight", "BF16", (64, 64)) for i in range(max(100, int(MANY * bench.size)))]
    cases: dict[str, Callable[[Path], object]] = {
        f"one tensor of {readable(one)}": lambda path: synthetic.write_single_tensor(path, one),
        readable(large): lambda path: synthetic.write_gaussian(path, large),
        f"{len(many):,} tensors": lambda path: safetensors_file.write(path, many, synthetic.gaussian),
    }
    _peak(bench, "at rest", [checkout.program("", "--version") for checkout in bench.checkouts])
    source, target = bench.folder / "x.safetensors", bench.folder / "x.df11"
    restored = bench.folder / "restored.safetensors"
    for name, make in cases.items():
        make(source)
        for operation, paths, output in (
            ("convert", (source, target), target),
            ("verify", (target,), None),
            ("restore", (target, restored), restored),
        ):
            command = (operation, *paths, "-j", bench.jobs, "--quiet")
            programs = [checkout.program("", *command, output=output) for checkout in bench.checkouts]
            _peak(bench, f"{operation} {name}", programs)
        for path in (source, target, restored):
            harness.remove(path)


def _peak(bench: Bench, case: str, programs: list[Program]) -> None:
    harness.say(f"memory: {case}")
    peaks: dict[str, list[float]] = {program.name: [] for program in programs}
    for _ in range(bench.rounds):
        for program in programs:
            peaks[program.name].append(harness.run(program).peak_rss / 2**20)
    for name, found in peaks.items():
        bench.board.add(f"{case}: {name}", "MiB", "lower", found)


def cores(bench: Bench) -> None:
    """The kernels alone, one thread, weights in memory. The other checkout's take turns, call by call."""
    weights = bench.folder / "weights.bin"
    rows = max(1, bench.bytes(CORE_BYTES) // 8192)
    with weights.open("wb") as file:
        for block in synthetic.gaussian(Tensor("core", "BF16", (rows, 4096))):
            file.write(block)
    size = weights.stat().st_size
    command = ("-P", str(_KERNELS), str(weights))
    programs = [Program(each.name, [each.python, *command], env=each.env) for each in bench.checkouts]
    with harness.asking(programs) as children:
        names = children["df11"]("names").split("|")
        for name in names:
            harness.say(f"cores: {name}")
            seconds: dict[str, list[float]] = {child: [] for child in children}
            for _ in range(CORE_ROUNDS * bench.rounds):
                for child, ask in children.items():
                    seconds[child].append(float(ask(name)))
            for child, taken in seconds.items():
                bench.board.add(f"{name}: {child}", "GB/s", "higher", [size / 1e9 / one for one in taken])
            if "against" in seconds:
                ratios = [b / a for a, b in zip(seconds["df11"], seconds["against"], strict=True)]
                bench.board.add(f"{name}: speed, df11 / against", "x", "higher", ratios, ratio=True)
