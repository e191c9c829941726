"""Is decoding on this GPU correct? ``make gpu-check`` or ``python -m benchmarks.gpu.check``; needs torch and CuPy.

Decoded weights are compared bit for bit with weights that were never compressed: all golden vectors, thousands of small
records, gigabytes of Gaussian, outlier and random weights; every kernel; several streams; a CUDA graph; whole files;
damage. A part of it runs again under compute-sanitizer, if installed. Writes its findings as JSON and Markdown; the
exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import zstandard

import df11
from benchmarks import results, safetensors_file
from benchmarks.gpu import report, weights
from benchmarks.gpu.models import compress
from benchmarks.safetensors_file import Tensor
from df11 import runtime
from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import modules
from df11.runtime.prefetch import CudaStreams

ROOT: Final = Path(__file__).parents[2]
VECTORS: Final = ROOT / "tests" / "vectors" / "golden"
TOOLS: Final = ("memcheck", "racecheck", "initcheck", "synccheck")
ROW: Final = 2048


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    return found.shape == expected.shape and torch.equal(found.view(bits), expected.view(bits))


def require(correct: bool, what: str) -> None:
    """Stop a check that has failed."""
    if not correct:
        raise AssertionError(what)


class Checks:
    """The checks, each a method that returns a line on what it did. ``size``: weights of the large ones."""

    def __init__(self, device: torch.device, size: int, folder: Path) -> None:
        self.device = device
        self.size = size
        self.folder = folder

    def vectors(self) -> str:
        """Every record of the golden vectors, of every dtype: both kernels, rows, gathered rows."""
        counts = Counter[str]()
        for path in sorted(VECTORS.glob("*.df11*")):
            unpacked = self.folder / path.stem if path.suffix == ".zst" else path
            if unpacked != path:
                unpacked.write_bytes(zstandard.ZstdDecompressor().decompress(path.read_bytes()))
            with Container(unpacked) as container:
                for name in container.keys():
                    info = container.info(name)
                    if info.encoding == "df11":
                        tensor = runtime.CompressedTensor.load(container, name, self.device)
                        values = torch.from_numpy(container.tensor(name).reshape(-1).view(np.uint8)).view(tensor.dtype)
                        expected = values.reshape(info.shape).to(self.device)
                        self._every_way(tensor, expected, f"{path.stem}/{name}")
                        counts[info.dtype] += 1
        require(len(counts) == 5 and min(counts.values()) > 7, "the vectors are missing")
        runtime.check_errors(self.device)
        return ", ".join(f"{count} of {dtype}" for dtype, count in counts.items())

    def _every_way(self, tensor: runtime.CompressedTensor, expected: torch.Tensor, what: str) -> None:
        for background in (False, True):
            out = torch.full(expected.shape, 7.0, device=self.device).to(expected.dtype)
            require(
                same(tensor.decode(out, background=background), expected), f"{what}: decode, background={background}"
            )
        if not expected.dim():
            return
        rows = expected.shape[0]
        for start, stop in ((0, rows), (rows // 3, rows - rows // 5), (rows - 1, rows)):
            for background in (False, True):
                require(
                    same(tensor.rows(start, stop, background=background), expected[start:stop]),
                    f"{what}: rows {start} to {stop}",
                )
        ids = torch.tensor([rows - 1, 0, rows // 2], device=self.device)
        found = torch.stack([expected[row] for row in ids.tolist()])
        require(same(tensor.gather(ids), found), f"{what}: gather")

    def small_records(self) -> str:
        """Records of all sizes up to three tiles, 64 and more per launch, with values of every kind."""
        generator = torch.Generator().manual_seed(1)
        makers = (weights.gaussian, weights.random_bits, weights.spread)
        count = 0
        for batch in range(max(2, min(20, self.size >> 20))):
            sizes = torch.randint(1, 3 * 8192, (100,), generator=generator).tolist()
            originals = [makers[i % 3](size, 1000 * batch + i, self.device) for i, size in enumerate(sizes)]
            for original in originals[::5]:
                original.fill_(0.5)  # one code only
            tensors = [weights.compress(original) for original in originals]
            for background in (False, True):
                for found, expected in zip(runtime.decode_many(tensors, background=background), originals, strict=True):
                    require(same(found, expected), f"batch {batch}, {len(expected)} weights, background={background}")
            count += len(tensors)
        runtime.check_errors(self.device)
        return f"{count} records, 100 per call"

    def gaussian(self) -> str:
        """Gaussian weights."""
        return self._large(weights.gaussian)

    def outliers(self) -> str:
        """Weights of very different scales: longer codes, tiles that do not fit the stage."""
        return self._large(weights.spread)

    def random_bits(self) -> str:
        """All values equally often."""
        return self._large(weights.random_bits)

    def _large(self, make: Callable[[int, int, torch.device], torch.Tensor]) -> str:
        expected = make(self.size // ROW * ROW, 5, self.device).view(-1, ROW)
        tensor = weights.compress(expected)
        self._every_way(tensor, expected, make.__name__)
        ids = torch.randint(0, len(expected), (1000,), device=self.device)
        require(same(tensor.gather(ids), expected[ids]), "gather")
        runtime.check_errors(self.device)
        bits = 8 * tensor.record.numel() / expected.numel()
        return f"{2 * expected.numel() / 1e9:.2f} GB of BF16, {bits:.3f} bits per weight"

    def block(self) -> str:
        """All matrices of a transformer block in one launch."""
        shapes = [(rows, columns) for rows, columns in weights.block_shapes().values() if rows * columns <= self.size]
        originals = [
            weights.gaussian(rows * columns, i, self.device).view(rows, columns)
            for i, (rows, columns) in enumerate(shapes)
        ]
        tensors = [weights.compress(original) for original in originals]
        for found, expected in zip(runtime.decode_many(tensors), originals, strict=True):
            require(same(found, expected), str(tuple(expected.shape)))
        runtime.check_errors(self.device)
        return f"{len(tensors)} matrices, {sum(original.numel() for original in originals):,} weights"

    def streams(self) -> str:
        """Several streams at once, from several buffers, repeatedly."""
        if self.device.type != "cuda":
            return "left out: no GPU"
        originals = [weights.gaussian(self.size // 64 + 8192 * i, i, self.device) for i in range(4)]
        tensors = [weights.compress(original) for original in originals]
        outputs = [torch.zeros_like(original) for original in originals]
        streams = [torch.cuda.Stream(self.device) for _ in originals]
        torch.cuda.synchronize()
        for turn in range(20):
            for stream, tensor, out in zip(streams, tensors, outputs, strict=True):
                with torch.cuda.stream(stream):
                    out.fill_(turn)
                    tensor.decode(out, background=bool(turn % 2))
            torch.cuda.synchronize()
            for found, expected in zip(outputs, originals, strict=True):
                require(same(found, expected), f"turn {turn}")
        runtime.check_errors(self.device)
        return f"{len(streams)} streams, 20 turns"

    def graph(self) -> str:
        """A CUDA graph of every operator, replayed with other records in the same memory."""
        if self.device.type != "cuda":
            return "left out: no GPU"
        shape = (max(1, self.size // 64 // ROW), ROW)
        first, second = (weights.gaussian(shape[0] * shape[1], seed, self.device).view(shape) for seed in (1, 2))
        records = [weights.compress(original).record for original in (first, second)]
        held = torch.zeros(max(len(record) for record in records), dtype=torch.uint8, device=self.device)
        out, ids = torch.zeros_like(first), torch.tensor([0, shape[0] - 1], device=self.device)
        for record, expected in zip(records, (first, second), strict=True):
            # A graph depends on the size of the record: one graph per record.
            tensor = runtime.CompressedTensor(held[: len(record)], shape)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                tensor.decode(out)
                fresh, rows, gathered = tensor.decode(background=True), tensor.rows(0, 1), tensor.gather(ids)
            for _ in range(3):
                held[: len(record)].copy_(record)
                out.zero_()
                graph.replay()
                torch.cuda.synchronize()
                for what, found, wanted in (
                    ("into", out, expected),
                    ("new", fresh, expected),
                    ("rows", rows, expected[:1]),
                    ("gather", gathered, expected[ids]),
                ):
                    require(same(found, wanted), what)
        runtime.check_errors(self.device)
        return "two graphs, three replays each"

    @torch.inference_mode()
    def model(self) -> str:
        """A compressed model: as loaded, prefetching, with records in CPU memory, compiled, in a CUDA graph."""
        width, hidden = 512, 4 * max(512, min(4096, self.size >> 12))
        layers = [
            layer
            for _ in range(6)
            for layer in (torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, width))
        ]
        model = (
            torch.nn.Sequential(torch.nn.Embedding(4000, width), *layers)
            .to(self.device, torch.bfloat16)
            .requires_grad_(False)
        )
        ids = torch.arange(64, device=self.device)[None]
        expected = model(ids)
        compress(model)
        ways = ["as it is"]
        require(same(model(ids), expected), "as it is")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        require(same(compiled(ids), expected), "compiled")
        ways.append("compiled")
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(ids)
            captured.zero_()
            graph.replay()
            torch.cuda.synchronize()
            require(same(captured, expected), "in a CUDA graph")
            prefetcher = modules.enable_prefetch(model, self.device, CudaStreams(self.device))
            for turn in range(20):
                require(same(model(ids), expected), f"prefetching, turn {turn}")
            require(prefetcher.hits > prefetcher.misses, "nothing was prefetched")
            ways += ["in a graph", "prefetching"]
        modules.offload_records(model, self.device)
        for turn in range(5):
            require(same(model(ids), expected), f"records in CPU memory, turn {turn}")
        runtime.check_errors(self.device)
        return f"{', '.join(ways)}, records elsewhere"

    def files(self) -> str:
        """A container of several tensors, through the ring of pinned memory."""
        sizes = {"large": self.size // 4, "embedding": self.size // 8, **{f"small.{i}": 9000 + i for i in range(100)}}
        originals = {name: weights.gaussian(size, i, "cpu") for i, (name, size) in enumerate(sizes.items())}
        originals["verbatim"] = torch.arange(1000, dtype=torch.int32)
        source, target = self.folder / "x.safetensors", self.folder / "x.df11"
        kinds = {torch.bfloat16: "BF16", torch.int32: "I32"}
        tensors = [Tensor(name, kinds[value.dtype], tuple(value.shape)) for name, value in originals.items()]
        safetensors_file.write(
            source, tensors, lambda tensor: iter([memoryview(originals[tensor.name].view(torch.uint8).numpy())])
        )
        df11.convert(source, target)
        loaded = runtime.load_file(target, self.device)
        require(loaded.keys() == originals.keys(), "names")
        for name, expected in originals.items():
            require(torch.equal(loaded[name].view(torch.uint8).cpu(), expected.view(torch.uint8)), name)
        damaged = bytearray(target.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        target.write_bytes(damaged)
        try:
            runtime.load_file(target, self.device)
        except errors.ChecksumError:
            return f"{source.stat().st_size / 1e9:.2f} GB, and one flipped bit was found"
        raise AssertionError("a flipped bit was not found")

    def damage(self) -> str:
        """Records with wrong bytes: no crash, and what the kernels can notice is reported."""
        rng = np.random.default_rng(7)
        noticed = 0
        for turn in range(200 if self.size > 1 << 20 else 20):
            tensor = weights.compress(weights.gaussian(int(rng.integers(1, 60_000)), turn, self.device))
            places = rng.integers(48, min(len(tensor.record), 600 if turn % 2 else len(tensor.record)), 4)
            tensor.record[torch.from_numpy(places).to(self.device)] = int(rng.integers(256))
            try:
                tensor.decode()
                tensor.decode(background=True)
                runtime.check_errors(self.device)
            except errors.Df11Error:
                noticed += 1
        require(noticed > 5, "nothing was noticed")
        rows = weights.compress(weights.gaussian(100 * 64, 1, self.device).view(100, 64))
        try:
            require(
                bool(rows.gather(torch.tensor([100], device=self.device)).isnan().all()), "a row that does not exist"
            )
            runtime.check_errors(self.device)
        except errors.UsageError:
            return f"{noticed} records were noticed, the context lives"
        raise AssertionError("a row that does not exist was not reported")


ORDER: Final = (
    "vectors",
    "small_records",
    "gaussian",
    "outliers",
    "random_bits",
    "block",
    "streams",
    "graph",
    "model",
    "files",
    "damage",
)
SANITIZED: Final = ("vectors", "small_records", "gaussian", "outliers", "damage")
"""On 3 million weights: compute-sanitizer slows kernels down by one to three orders of magnitude."""


def run(names: tuple[str, ...], device: torch.device, size: int) -> list[dict[str, Any]]:
    """Run checks: a row per check, with what was done or what went wrong."""
    rows = []
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                done, correct = getattr(Checks(device, size, Path(folder)), name)(), True
            except Exception as error:  # It is reported, and the next check runs.
                done, correct = f"{type(error).__name__}: {error}".splitlines()[0], False
                traceback.print_exc()
        rows.append({"check": name, "correct": correct, "done": done, "seconds": round(time.perf_counter() - start, 2)})
        print(f"{'ok  ' if correct else 'FAIL'} {name}: {done} ({rows[-1]['seconds']} s)", flush=True)
    return rows


def sanitize(tool: str, seconds: float) -> dict[str, Any]:
    """Run some checks under a tool of compute-sanitizer, in a process of its own, with an allocation per tensor."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        return {"check": tool, "correct": None, "done": "compute-sanitizer is not installed", "seconds": 0}
    program = [sys.executable, "-m", "benchmarks.gpu.check", "--sanitized"]
    command = [path, "--tool", tool, "--error-exitcode", "86", "--launch-timeout", "0", *program]
    start = time.perf_counter()
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        done, correct = (
            next(
                (line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "no output"
            ),
            not result.returncode,
        )
        if not correct:
            print("\n".join(lines[-40:]))
    except subprocess.TimeoutExpired:
        done, correct = f"took more than {seconds:.0f} s", False
    print(f"{'ok  ' if correct else 'FAIL'} {tool}: {done}", flush=True)
    return {"check": tool, "correct": correct, "done": done, "seconds": round(time.perf_counter() - start, 2)}


def save(rows: list[dict[str, Any]], device: torch.device, folder: Path) -> None:
    """Write the results and say where."""
    described = report.describe(device)
    words = {True: "yes", False: "**no**", None: "-"}
    lines = [[row["check"], words[row["correct"]], row["done"], f"{row['seconds']:.1f}"] for row in rows]
    found = report.markdown(["check", "right", "what was done", "s"], lines)
    text = "\n\n".join(["# Is decoding on this GPU correct?", report.as_text(described), found])
    path = report.save("gpu-check", described, text, folder, checks=rows)
    print(f"results: {path}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check decoding on a GPU, bit for bit.")
    parser.add_argument("--device", default="cuda", help="default: cuda; cpu checks this program rather than a GPU")
    parser.add_argument(
        "--weights", type=int, default=1 << 29, help="weights of each large check (default: 2^29, a gigabyte)"
    )
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="these checks")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument(
        "--sanitizer-seconds", type=float, default=150, help="seconds for each of its tools (default: 150)"
    )
    parser.add_argument(
        "--out", type=Path, default=results.RESULTS, help="folder for the results (default: benchmarks/results)"
    )
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if exit_code := report.refused("gpu-check", device):
        return exit_code
    if chosen.sanitized:
        return 0 if all(row["correct"] for row in run(SANITIZED, device, 3 << 20)) else 1
    rows = run(tuple(chosen.only), device, chosen.weights)
    if device.type == "cuda" and not chosen.no_sanitizer:
        torch.cuda.empty_cache()
        rows += [sanitize(tool, chosen.sanitizer_seconds) for tool in TOOLS]
    save(rows, device, chosen.out)
    return 0 if all(row["correct"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
