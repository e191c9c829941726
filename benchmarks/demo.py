"""The demo, ``python -m benchmarks.demo`` or ``make demo``: two models to .df11 and back, in a minute on two cores.

* all-MiniLM-L6-v2: real weights, which their package ships in F32, rounded to BF16 first;
* a folder with the shape of OmniGen2's checkpoint: every tensor, but smaller, in F32 as on the Hub, with **synthetic**
  random weights. It is converted with ``--cast bf16``. The casts in its mllm are exact, so that this part can be
  restored byte for byte.

Every container is verified against its source; restored files are compared with the source by SHA-256; every decoded
tensor is compared with the source's, rounded by NumPy. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import df11
from benchmarks import measure, safetensors_file, synthetic
from benchmarks.entropy_bound import measure_entropy_bound
from benchmarks.results import table

SCALE = 0.005
"""Scale of the OmniGen2 stand-in: 157 MB in F32 instead of 31.2 GB."""
HEAD = (
    *("", "source bytes", ".df11 bytes", "to BF16", "bits/weight", "bound"),
    *("convert", "verify", "restore", "peak memory"),
)
EXPLANATION = """
to BF16: size as a share of the same weights in BF16, headers, tables and checksums included. bound: bits per weight of
an ideal code for single exponents, plus 8 bits for sign and mantissa. convert decodes and compares all it writes;
verify compares with the source again. Seconds are of whole processes. Peak memory: the largest of the three.
MiniLM's weights are real; their package ships F32, which was rounded to BF16 before the demo began.
The OmniGen2-shaped folder has the real one's files and tensor names, but smaller tensors and random weights: its
figures are not OmniGen2's. Its matrices are so small that tables and headers weigh more than in a real model.

Restored, SHA-256 compared with the source (for the folder, its mllm, whose casts are exact):"""


@dataclass(slots=True)
class Model:
    """One model; ``part``, a path relative to source and container, must be restored byte for byte.

    The other fields are results: a row of the table, a line per file compared, a line per difference.
    """

    title: str
    source: Path
    container: Path
    cast: bool
    part: str
    row: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="Two models to .df11 and back.")
    parser.add_argument(
        "--dir", type=Path, help="working folder; 0.5 GB, removed at the end (default: the temporary folder)"
    )
    parser.add_argument("--scale", type=float, default=SCALE, help="scale of the second model (default: %(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    measure.interrupt_on_signals()
    with tempfile.TemporaryDirectory(prefix="df11-demo-", dir=options.dir) as name:
        folder = Path(name)
        titles = "MiniLM-L6-v2 (real, rounded to BF16)", "OmniGen2-shaped (synthetic F32, cast to BF16)"
        minilm = Model(titles[0], folder / "model.safetensors", folder / "model.df11", cast=False, part="")
        omnigen2 = Model(titles[1], folder / "omnigen2", folder / "omnigen2-df11", cast=True, part="mllm")
        try:
            say("making the models")
            synthetic.write_minilm_bf16(minilm.source)
            synthetic.write_omnigen2(omnigen2.source, options.scale)
            for model in (minilm, omnigen2):
                there_and_back(model, folder / f"restored {model.source.name}")
        except (measure.CommandError, FileNotFoundError) as error:
            say(str(error))
            return 1
        except KeyboardInterrupt:
            say("interrupted; removing the files")
            return 130
    print(table(HEAD, [minilm.row, omnigen2.row]))
    print(EXPLANATION)
    print("\n".join(f"  {line}" for line in minilm.compared + omnigen2.compared))
    print("All decoded weights were compared with the sources, rounded to BF16 by NumPy where they were cast.")
    differing = minilm.differing + omnigen2.differing
    print("\n".join(f"DIFFERENT: {line}" for line in differing) or "Nothing differs.")
    print(f"\n{time.perf_counter() - start:.0f} seconds in all, including making the models.")
    return 1 if differing else 0


def there_and_back(model: Model, restored: Path) -> None:
    """Convert, verify against the source, restore, compare."""
    say(f"{model.title}: convert, verify, restore")
    cast = ["--cast", "bf16"] if model.cast else []
    convert = measure.run(measure.df11("convert", model.source, model.container, *cast, "--json", "--quiet"))
    verify = measure.run(measure.df11("verify", model.container, "--against", model.source, "--quiet"))
    restore = measure.run(measure.df11("restore", model.container / model.part, restored, "--quiet"))
    compare_files(model, restored)
    compare_hashes(model, convert.stdout)
    compare_weights(model)
    bound = measure_entropy_bound(model.source, cast=model.cast)
    stored = measure.stored_bytes(model.container, ".df11")
    model.row = [
        model.title,
        f"{measure.stored_bytes(model.source, '.safetensors'):,}",
        f"{stored:,}",
        f"{stored / bound.bf16_bytes:.4f}",
        f"{8 * stored / bound.weights:.3f}",
        f"{8 * bound.bound_bytes / bound.weights:.3f}",
        *(f"{taken.wall:.1f} s" for taken in (convert, verify, restore)),
        f"{max(taken.peak_rss for taken in (convert, verify, restore)) / 2**20:.0f} MiB",
    ]


def compare_files(model: Model, restored: Path) -> None:
    """Compare the SHA-256 of every restored file: which differ, are missing, or are superfluous."""
    original = model.source / model.part
    names = {path.relative_to(original) for path in original.rglob("*") if path.is_file()} or {Path()}
    for name in sorted(names):
        wanted = measure.sha256(original / name)
        found = measure.sha256(restored / name) if (restored / name).is_file() else "missing"
        same = wanted == found
        model.compared.append(f"{'same' if same else 'DIFFERENT'}  {wanted}  {Path(original.name) / name}")
        if not same:
            model.differing.append(f"{original / name}: SHA-256 {wanted}, restored {found}")
    strange = {path.relative_to(restored) for path in restored.rglob("*") if path.is_file()} - names
    model.differing += [f"{restored / name}: the source has no such file" for name in sorted(strange)]


def compare_hashes(model: Model, stdout: str) -> None:
    """The SHA-256 of each source reported by ``df11 convert --json`` must be that of the file."""
    reported = {event["source_sha256"] for event in measure.events(stdout) if event["event"] == "file"}
    for file in safetensors_file.files_below(model.source):
        if measure.sha256(file) not in reported:
            model.differing.append(f"{file}: convert reports another SHA-256")


def compare_weights(model: Model) -> None:
    """Decoded tensors must be those of the source, rounded by NumPy if cast: a check independent of df11's own."""
    for file in safetensors_file.files_below(model.source):
        path = model.container
        if path.is_dir():
            path /= file.relative_to(model.source).with_suffix(".df11")
        with df11.open(path) as container, file.open("rb") as source:
            for tensor in safetensors_file.read_header(file):
                blocks = safetensors_file.read_blocks(source, tensor, 1 << 24)
                expected = np.concatenate([np.zeros(0, np.uint8), *blocks])
                if model.cast and tensor.dtype == "F32":
                    expected = synthetic.round_to_bf16(expected.view(np.float32)).view(np.uint8)
                found = container.tensor(tensor.name)
                if found.shape != tensor.shape or not np.array_equal(found.reshape(-1).view(np.uint8), expected):
                    model.differing.append(f"{file}: {tensor.name}: the decoded weights differ")


def say(line: str) -> None:
    """Report progress on standard error."""
    print(f"demo: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
