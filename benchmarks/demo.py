"""The demo: two models to .df11 and back, in under two minutes on two cores. ``python -m benchmarks.demo``, or ``make demo``.

* all-MiniLM-L6-v2: real weights, which their package ships in F32, here rounded to BF16 first;
* a folder of the shape of OmniGen2's checkpoint, every tensor of it but smaller, in F32 as on the Hub: **synthetic** random weights.
  It is converted with ``--cast bf16``. The casts of its mllm change nothing, so that this part can be restored byte for byte.

Every container is verified against its source; what is restored is compared with the source by SHA-256; and every
decoded tensor is compared with the source's, as NumPy rounds it. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import df11
from benchmarks import measure, safetensors_file, synthetic
from benchmarks.floor import Floor, measure_floor
from benchmarks.results import table

SCALE = 0.005
"""Of the OmniGen2 stand-in: 157 MB in F32 instead of 31.2 GB."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model: ``restore`` names the part (a path relative to source and container) that must come back byte for byte."""

    title: str
    source: Path
    container: Path
    cast: bool
    restore: str


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one model, and the paths that differ from their source."""

    subject: Subject
    floor: Floor
    source_bytes: int
    stored_bytes: int
    convert: measure.Measured
    verify: measure.Measured
    restore: measure.Measured
    compared: list[str]
    differing: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="Convert two models to .df11, verify and restore them.")
    parser.add_argument("--dir", type=Path, help="where to work; about 0.5 GB are needed, and removed again (default: the temporary folder)")
    parser.add_argument("--scale", type=float, default=SCALE, help="size of the OmniGen2-shaped folder, 1 being the real one (default: %(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    measure.interrupt_on_signals()
    with tempfile.TemporaryDirectory(prefix="df11-demo-", dir=options.dir) as folder:
        try:
            results = run_demo(Path(folder), options.scale)
        except (measure.CommandError, FileNotFoundError) as error:
            say(str(error))
            return 1
        except KeyboardInterrupt:
            say("interrupted; removing the files")
            return 130
    show(results)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all, the models made anew included.")
    return 1 if any(result.differing for result in results) else 0


def run_demo(folder: Path, scale: float) -> list[Result]:
    """Make both models below ``folder``, convert, verify and restore them."""
    minilm = Subject(
        title="MiniLM-L6-v2 (real, rounded to BF16)",
        source=folder / "minilm" / "model.safetensors",
        container=folder / "minilm" / "model.df11",
        cast=False,
        restore="",
    )
    omnigen2 = Subject(
        title="OmniGen2-shaped (synthetic F32, cast to BF16)",
        source=folder / "omnigen2",
        container=folder / "omnigen2-df11",
        cast=True,
        restore="mllm",
    )
    say("making the models")
    synthetic.write_minilm_bf16(minilm.source)
    synthetic.write_omnigen2(omnigen2.source, scale)
    return [run_subject(subject, folder / "restored") for subject in (minilm, omnigen2)]


def run_subject(subject: Subject, restored: Path) -> Result:
    """Convert, verify against the source, restore, compare."""
    say(f"{subject.title}: convert, verify, restore")
    cast = ["--cast", "bf16"] if subject.cast else []
    convert = measure.run(measure.df11("convert", subject.source, subject.container, *cast, "--json", "--quiet"))
    verify = measure.run(measure.df11("verify", subject.container, "--against", subject.source, "--quiet"))
    target = restored / (subject.restore or subject.source.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    restore = measure.run(measure.df11("restore", subject.container / subject.restore, target, "--quiet"))
    original = subject.source / subject.restore
    compared, differing = compare(original, target)
    differing += wrong_hashes(convert.stdout, subject.source)
    differing += wrong_weights(subject)
    suffix = ".df11" if subject.container.is_dir() else ""
    return Result(
        subject,
        measure_floor(subject.source, cast=subject.cast),
        sum(file.stat().st_size for file in safetensors_file.files_below(subject.source)),
        measure.stored_bytes(subject.container, suffix),
        convert,
        verify,
        restore,
        compared,
        differing,
    )


def compare(original: Path, restored: Path) -> tuple[list[str], list[str]]:
    """SHA-256 of every file below two paths: a line for each file of the original, and the names that differ, lack or are too many."""
    lines, differing = [], []
    names = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file()) if original.is_dir() else [Path()]
    for name in names:
        wanted = measure.sha256(original / name)
        found = measure.sha256(restored / name) if (restored / name).is_file() else "missing"
        if wanted != found:
            differing.append(f"{original / name}: SHA-256 {wanted}, restored {found}")
        lines.append(f"{'same' if wanted == found else 'DIFFERENT'}  {wanted}  {original.name}{'/' if name.name else ''}{name if name.name else ''}")
    if restored.is_dir():
        strange = {path.relative_to(restored) for path in restored.rglob("*") if path.is_file()} - set(names)
        differing += [f"{restored / name}: the source has no such file" for name in sorted(strange)]
    return lines, differing


def wrong_hashes(stdout: str, source: Path) -> list[str]:
    """Sources whose SHA-256, as ``df11 convert --json`` reports it, is not that of the file."""
    reported = {event["source_sha256"] for event in measure.events(stdout) if event["event"] == "file"}
    files = safetensors_file.files_below(source)
    return [f"{file}: convert reports another SHA-256" for file in files if measure.sha256(file) not in reported]


def wrong_weights(subject: Subject) -> list[str]:
    """Tensors whose decoded weights are not those of the source, rounded by NumPy where they were cast: a check apart from df11's own."""
    wrong = []
    for file in safetensors_file.files_below(subject.source):
        path = subject.container / file.relative_to(subject.source).with_suffix(".df11") if subject.source.is_dir() else subject.container
        with df11.open(path) as container, file.open("rb") as source:
            for tensor in safetensors_file.read_header(file):
                expected = np.concatenate([np.zeros(0, np.uint8), *safetensors_file.read_pieces(source, tensor, 1 << 24)])
                if subject.cast and tensor.dtype == "F32":
                    expected = synthetic.round_to_bf16(expected.view(np.float32)).view(np.uint8)
                found = container.tensor(tensor.name)
                if found.shape != tensor.shape or not np.array_equal(found.reshape(-1).view(np.uint8), expected):
                    wrong.append(f"{file}: {tensor.name}: the decoded weights differ")
    return wrong


def show(results: list[Result]) -> None:
    """Print one table, and what was compared."""
    head = ["", "source bytes", ".df11 bytes", "to BF16", "bits/weight", "floor", "convert", "verify", "restore", "peak memory"]
    rows = []
    for result in results:
        floor = result.floor
        peak = max(result.convert.peak_rss, result.verify.peak_rss, result.restore.peak_rss)
        rows.append(
            [
                result.subject.title,
                f"{result.source_bytes:,}",
                f"{result.stored_bytes:,}",
                f"{result.stored_bytes / floor.bf16_bytes:.4f}",
                f"{8 * result.stored_bytes / floor.weights:.3f}",
                f"{8 * floor.floor_bytes / floor.weights:.3f}",
                f"{result.convert.wall:.1f} s",
                f"{result.verify.wall:.1f} s",
                f"{result.restore.wall:.1f} s",
                f"{peak / 2**20:.0f} MiB",
            ]
        )
    print(table(head, rows))
    print(
        "\nto BF16: size as a share of the same weights in BF16, headers, tables and checksums included. floor: bits a weight of an ideal\n"
        "code of single exponents, 8 bits more for sign and mantissa. convert decodes and compares all it writes; verify compares with the\n"
        "source again. Seconds are of whole processes. Peak memory: the largest of the three.\n"
        "MiniLM's weights are real; their package ships F32, which was rounded to BF16 before the demo began.\n"
        "The OmniGen2-shaped folder has the real one's files and tensor names, but smaller tensors and random weights: its figures are\n"
        "not OmniGen2's. Its matrices are so small that tables and headers weigh more than in a real model.\n"
    )
    print("Restored, SHA-256 compared with the source (of the folder its mllm, whose casts are exact):")
    for result in results:
        print("\n".join(f"  {line}" for line in result.compared))
    differing = [line for result in results for line in result.differing]
    print("All decoded weights were compared with the sources, rounded to BF16 by NumPy where they were cast.")
    print("\n".join(f"DIFFERENT: {line}" for line in differing) if differing else "Nothing differs.")


def say(line: str) -> None:
    """Tell people what goes on, on standard error."""
    print(f"demo: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
