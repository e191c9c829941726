"""How fast is decoding on this GPU? ``make gpu-bench`` or ``python -m benchmarks.gpu.bench``; needs torch and CuPy.

Each figure is compared with the floor from the same run, a kernel that only reads and writes as many bytes, and with
DFloat11's own kernel and nvCOMP's ANS on the same weights, if their wheels are installed. Every output is compared
before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

import df11
from benchmarks import harness, results, safetensors_file
from benchmarks.gpu import copy_floor, dfloat11_peer, nvcomp_peer, report, timing, variants, weights
from benchmarks.gpu.report import Column, Row
from benchmarks.gpu.timing import Call, MissingPeerError, Timing
from benchmarks.safetensors_file import Tensor
from df11 import runtime
from df11.formats.container import Container
from df11.runtime import gpu, kernels
from df11.runtime.kernels import Range

SIZES: Final = (1 << 20, 840 * 2520, 2520 * 2520, 10080 * 1024, 10240 * 2520, 100_000_000, 300_000_000)
"""Weights of one matrix: 2^20, four of OmniGen2's transformer, and two larger ones."""
EMBEDDING: Final = (151_936, 2048)
"""In OmniGen2's language model; its output layer is the same matrix."""


class Bench:
    """The sections, each a method that returns rows. ``scale``: divisor of all sizes, to try the program out."""

    def __init__(self, device: torch.device, scale: int, folder: Path) -> None:
        self.device = device
        self.scale = scale
        self.folder = folder
        self.missing: dict[str, str] = {}
        self.real = device.type == "cuda"

    # What is timed, and how.

    def _time(self, function: Call) -> Timing:
        """With a cold second-level cache. On the CPU, where the program is only tried out: by the clock."""
        if self.real:
            return timing.time_kernel(function)
        start = time.perf_counter()
        function()
        return Timing.of([time.perf_counter() - start])

    def _matrix(
        self, count: int, make: Callable[[int, int, torch.device], torch.Tensor] = weights.gaussian
    ) -> tuple[torch.Tensor, Any]:
        original = make(max(4096, count // self.scale // 8 * 8), 3, self.device)
        return original, weights.compress(original)

    def _decoders(self, original: torch.Tensor, tensor: runtime.CompressedTensor) -> dict[str, Call]:
        out = torch.zeros_like(original)
        calls: dict[str, Call] = {
            "df11": lambda: tensor.decode(out),
            "df11 background": lambda: tensor.decode(out, background=True),
        }
        for name, add in (("DFloat11", self._dfloat11), ("nvCOMP ANS", self._nvcomp)):
            if name not in self.missing:
                try:
                    calls |= add(original, out)
                except (MissingPeerError, ImportError, dfloat11_peer.UnsupportedWeightsError) as error:
                    self.missing[name] = str(error)
        for name, call in calls.items():
            out.zero_()
            call()
            if not torch.equal(out.view(torch.int16), original.view(torch.int16)):
                raise AssertionError(f"{name} decodes wrongly")
        return calls

    def _dfloat11(self, original: torch.Tensor, out: torch.Tensor) -> dict[str, Call]:
        decoder = dfloat11_peer.Decoder(self.device)
        loaded = decoder.load(dfloat11_peer.encode(original.view(torch.int16).cpu().numpy().view(np.uint16)))
        return {"DFloat11": lambda: decoder.decode(loaded, out)}

    def _nvcomp(self, original: torch.Tensor, out: torch.Tensor) -> dict[str, Call]:
        ans = nvcomp_peer.Ans(self.device)
        whole = ans.whole(original)
        target = ans.target(whole, out.view(torch.uint8))
        exponents, sign_mantissa = ans.split(original)
        split = ans.target(exponents)

        def joined() -> None:
            ans.decompress(exponents, split)
            ans.interleave(split.out, sign_mantissa, out)

        return {
            "nvCOMP ANS, its BF16 mode": lambda: ans.decompress(whole, target),
            "nvCOMP ANS of exponents, joined": joined,
        }

    def _floor(self, stored: torch.Tensor, out: torch.Tensor) -> Timing | None:
        if not self.real:
            return None
        noise = torch.randint(0, 256, (stored.numel(),), dtype=torch.uint8, device=self.device)
        _, timings = copy_floor.tune(noise, out)
        return min(timings.values(), key=lambda found: found.median)

    def _rows(self, what: str, original: torch.Tensor, stored: torch.Tensor, calls: dict[str, Call]) -> list[Row]:
        out_bytes = original.element_size() * original.numel()
        floor = self._floor(stored, torch.empty_like(original).view(-1).view(torch.bfloat16))
        rows = [self._row(what, "floor: a copy of the same bytes", floor, out_bytes)] if floor else []
        rows += [self._row(what, name, self._time(call), out_bytes) for name, call in calls.items()]
        for row in rows:
            row |= {"weights": original.numel(), "bits": 8 * stored.numel() / original.numel()}
            row["of_floor"] = floor.median / row["seconds"] if floor else None
            other = next((peer["seconds"] for peer in rows if peer["name"] == "DFloat11"), None)
            row["times_dfloat11"] = other / row["seconds"] if other else None
        return rows

    @staticmethod
    def _row(what: str, name: str, found: Timing, out_bytes: int) -> Row:
        return {
            "what": what,
            "name": name,
            "seconds": found.median,
            "timing": asdict(found),
            "bytes_per_second": found.bandwidth(out_bytes),
        }

    # The sections.

    def empty(self) -> list[Row]:
        """What a pair of events with nothing in between measures, and the CPU time of a launch."""
        _, tensor = self._matrix(1 << 20)
        out = torch.empty(tensor.shape, dtype=torch.bfloat16, device=self.device)
        rows = [{"what": "nothing, between two events", "seconds": self._time(lambda: None).median}]
        calls: dict[str, Callable[[], object]] = {
            "decode": lambda: tensor.decode(),
            "decode into": lambda: tensor.decode(out),
        }
        for name, call in calls.items():
            call()
            if self.real:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            rows.append({"what": f"CPU time of a launch: {name}", "seconds": (time.perf_counter() - start) / 200})
        return rows

    def sizes(self) -> list[Row]:
        """One Gaussian matrix of each size."""
        rows = []
        for count in SIZES:
            original, tensor = self._matrix(count)
            rows += self._rows(
                f"{original.numel():,} weights", original, tensor.record, self._decoders(original, tensor)
            )
        return rows

    def outliers(self) -> list[Row]:
        """Exponents of 3.6 bits, as in the outlier layers of OmniGen2's language model; and weights stored raw."""
        rows = []
        for name, make in (("3.6 bits per exponent", weights.spread), ("raw", weights.random_bits)):
            original, tensor = self._matrix(10240 * 2520, make)
            calls = {name: call for name, call in self._decoders(original, tensor).items() if name.startswith("df11")}
            rows += self._rows(name, original, tensor.record, calls)
        return rows

    def dtypes(self) -> list[Row]:
        """A Gaussian matrix of each dtype that records hold, as the converter writes it."""
        rows = []
        generator = torch.Generator(self.device).manual_seed(3)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
            shape = (max(300, 10240 // self.scale), 2520)
            values = torch.randn(shape, generator=generator, device=self.device)
            original = (values * (weights.SIGMA if dtype.itemsize > 1 else 30)).to(dtype)
            source = self.folder / f"{dtype}.safetensors"
            save_file({"weight": original.cpu()}, source)
            df11.convert(source, source.with_suffix(".df11"))
            with Container(source.with_suffix(".df11")) as container:
                tensor = runtime.CompressedTensor.load(container, "weight", self.device)
            out = torch.zeros_like(original)
            calls: dict[str, Call] = {
                "df11": partial(tensor.decode, out),
                "df11 background": partial(tensor.decode, out, background=True),
            }
            for name, call in calls.items():
                out.zero_()
                call()
                if not torch.equal(out.view(torch.uint8), original.view(torch.uint8)):
                    raise AssertionError(f"{name} decodes {dtype} wrongly")
            rows += self._rows(str(dtype), original, tensor.record, calls)
        return rows

    def block(self) -> list[Row]:
        """All matrices of a block of OmniGen2's transformer.

        In one launch, one by one, and by the peers as one matrix, which is how DFloat11 does it.
        """
        originals = [
            weights.gaussian(max(4096, rows * columns // self.scale), i, self.device)
            for i, (rows, columns) in enumerate(weights.block_shapes().values())
        ]
        tensors = [weights.compress(original) for original in originals]
        outputs = [torch.zeros_like(original) for original in originals]
        runtime.decode_many(tensors, outputs)
        for found, expected in zip(outputs, originals, strict=True):
            if not torch.equal(found.view(torch.int16), expected.view(torch.int16)):
                raise AssertionError("decodes wrongly")
        joined = torch.cat(originals)
        stored = torch.cat([tensor.record for tensor in tensors])
        calls: dict[str, Call] = {
            "df11, one launch": lambda: runtime.decode_many(tensors, outputs),
            "df11 background, one launch": lambda: runtime.decode_many(tensors, outputs, background=True),
            "df11, one launch each": lambda: [tensor.decode(out) for tensor, out in zip(tensors, outputs, strict=True)],
        }
        peers = self._decoders(joined, weights.compress(joined))
        return self._rows(
            "a block",
            joined,
            stored,
            calls | {name: call for name, call in peers.items() if not name.startswith("df11")},
        )

    def tiles(self) -> list[Row]:
        """The number of tiles per block, for both kernels: what the choice in df11.runtime.kernels is worth."""
        if not self.real:
            return []
        rows, device = [], gpu.of(self.device)
        for count in (840 * 2520, 2520 * 2520, 10240 * 2520, 100_000_000):
            original, tensor = self._matrix(count)
            out = torch.zeros_like(original)
            part = _range(tensor, out)
            for background in (False, True):
                name = kernels.DECODE_SMALL if background else kernels.DECODE
                chosen = kernels.tiles_per_block(name, -(-count // 8192), device.multiprocessors)
                for tiles in (4, 8, 16, 32, 64):
                    found = self._time(partial(device.decode, [part], background=background, tiles_per_block=tiles))
                    mark = " (chosen)" if tiles == chosen else ""
                    rows.append(
                        self._row(f"{count:,} weights", f"{name}, {tiles} tiles{mark}", found, 2 * count)
                        | {"weights": count}
                    )
        return rows

    def variants(self) -> list[Row]:
        """The kernels with one change each."""
        if not self.real:
            return []
        rows = []
        for count in (840 * 2520, 10240 * 2520, 100_000_000):
            original, tensor = self._matrix(count)
            out = torch.zeros_like(original)
            part = _range(tensor, out)
            for name in variants.CHANGES:
                device = gpu.Gpu(self.device, variants.source(name))
                out.zero_()
                device.decode([part])
                if not torch.equal(out.view(torch.int16), original.view(torch.int16)):
                    raise AssertionError(f"{name}: decodes wrongly")
                found = self._time(partial(device.decode, [part]))
                rows.append(self._row(f"{count:,} weights", name, found, 2 * count) | {"weights": count})
        return rows

    def embedding(self) -> list[Row]:
        """Rows of the embedding: gathered, in slices as for the output layer, and all."""
        shape = (max(64, EMBEDDING[0] // self.scale), EMBEDDING[1])
        original = weights.gaussian(shape[0] * shape[1], 9, self.device).view(shape)
        tensor = weights.compress(original)
        rows = []
        for count in (1, 16, 256, 1024, 4096):
            ids = torch.randint(0, shape[0], (count,), device=self.device)
            if not torch.equal(tensor.gather(ids).view(torch.int16), original[ids].view(torch.int16)):
                raise AssertionError("gathers wrongly")
            rows.append(
                self._row(
                    f"{count} rows gathered", "df11", self._time(partial(tensor.gather, ids)), 2 * count * shape[1]
                )
            )
        step = max(1, shape[0] // 8)
        rows.append(
            self._row(
                f"a slice of {step} rows", "df11", self._time(lambda: tensor.rows(step, 2 * step)), 2 * step * shape[1]
            )
        )
        rows.append(self._row("all rows", "df11", self._time(lambda: tensor.decode()), 2 * original.numel()))
        return rows

    def overlap(self) -> list[Row]:
        """A matrix product of 4096 tokens, alone, and while the next matrix is decoded on another stream."""
        if not self.real:
            return []
        original, tensor = self._matrix(10240 * 2520)
        weight, tokens = original.view(10240, 2520), torch.randn(4096, 2520, device=self.device).to(torch.bfloat16)
        out, side = torch.zeros_like(original), torch.cuda.Stream(self.device)

        def product() -> None:
            for _ in range(4):
                torch.nn.functional.linear(tokens, weight)

        def before() -> None:
            tensor.decode(out)
            product()

        def both(background: bool, first: bool) -> Call:
            def run() -> None:
                current = torch.cuda.current_stream(self.device)
                if first:
                    torch.nn.functional.linear(tokens, weight)
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    tensor.decode(out, background=background)
                for _ in range(3 if first else 4):
                    torch.nn.functional.linear(tokens, weight)
                current.wait_stream(side)

            return run

        cases = {
            "four products": product,
            "decode, then four products": before,
            "four products, wide kernel beside": both(False, False),
            "four products, background kernel beside": both(True, False),
            "four products, background kernel after the first began": both(True, True),
        }
        alone = self._time(product).median
        times = {name: self._time(call).median for name, call in cases.items()}
        return [
            {"what": name, "seconds": seconds, "of_products_alone": seconds / alone} for name, seconds in times.items()
        ]

    def loading(self) -> list[Row]:
        """A file of 4 GB of BF16 from disk to the GPU, compared with safetensors, with a cold and a warm page cache."""
        from safetensors.torch import load_file

        rows_of = max(8, 4_000_000_000 // 2 // 12 // 4096 // self.scale)
        tensors = [Tensor(f"layers.{i}.weight", "BF16", (rows_of, 4096)) for i in range(12)]
        source, target = self.folder / "x.safetensors", self.folder / "x.df11"
        pattern = weights.gaussian(rows_of * 4096, 4, "cpu").view(torch.uint8).numpy()
        safetensors_file.write(source, tensors, lambda _: iter([memoryview(pattern)]))
        df11.convert(source, target, verify=False)
        programs: dict[str, tuple[Path, Callable[[], object]]] = {
            "safetensors": (source, lambda: load_file(source, device=str(self.device))),
            "df11": (target, lambda: runtime.load_file(target, self.device)),
        }
        rows: list[Row] = []
        for cold in (True, False):
            for turn in range(3):
                for name, (path, load) in programs.items():
                    if cold:
                        harness.evict(path)
                    start = time.perf_counter()
                    loaded = load()
                    if self.real:
                        torch.cuda.synchronize()
                    seconds = time.perf_counter() - start
                    del loaded
                    rows.append(
                        {
                            "what": "not in the page cache" if cold else "in the page cache",
                            "name": name,
                            "turn": turn,
                            "seconds": seconds,
                        }
                    )
        for row in rows:
            others = [
                other["seconds"]
                for other in rows
                if other["name"] == "safetensors" and other["what"] == row["what"] and other["turn"] == row["turn"]
            ]
            row["of_safetensors"] = row["seconds"] / others[0]
            row["bytes_per_second"] = source.stat().st_size / row["seconds"]
        return rows


def _range(tensor: runtime.CompressedTensor, out: torch.Tensor) -> Range:
    # All of a record.
    record, elements = tensor.record, out.numel()
    return Range(record.data_ptr(), record.numel(), elements, tensor.segment_elements, 0, elements, out.data_ptr())


SECTIONS: Final = (
    *("empty", "sizes", "outliers", "dtypes", "block", "tiles", "variants", "embedding", "overlap", "loading"),
)
_COLUMNS: Final = {
    "what": Column("what"),
    "name": Column("by"),
    "bits": Column("bits per weight"),
    "seconds": Column("us", 1e6, ",.1f"),
    "bytes_per_second": Column("GB/s of weights", 1e-9, ",.1f"),
    "of_floor": Column("of the floor"),
    "times_dfloat11": Column("x DFloat11"),
    "of_products_alone": Column("of the products alone"),
    "of_safetensors": Column("of safetensors"),
}
_REPORT: Final = report.Report(
    name="gpu",
    title="Decoding on a GPU",
    about="Medians of 50 calls between two events; the second-level cache was overwritten before each. "
    "GB/s: 10^9 bytes of weights per second. Floor: the fastest of 32 shapes of a kernel that reads the stored bytes "
    "and writes those of the weights.",
    columns=_COLUMNS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time decoding on a GPU and compare it with the floor and the peers.")
    parser.add_argument(
        "--device", default="cuda", help="default: cuda; cpu only tries this program out, its times mean nothing"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections")
    parser.add_argument("--scale", type=int, default=1, help="divisor of all sizes, to try the program out")
    parser.add_argument(
        "--dir", type=Path, help="folder for the file that is loaded (6 GB; default: the temporary folder)"
    )
    parser.add_argument(
        "--out", type=Path, default=results.RESULTS, help="folder for the results (default: benchmarks/results)"
    )
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if exit_code := report.refused("gpu-bench", device):
        return exit_code
    with tempfile.TemporaryDirectory(dir=chosen.dir) as folder:
        return report.run(_REPORT, lambda: Bench(device, chosen.scale, Path(folder)), chosen.only, device, chosen.out)


if __name__ == "__main__":
    sys.exit(main())
