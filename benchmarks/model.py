"""The section ``model``: what a compressed model costs on the CPU, beside the same in BF16 and another checkout's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import harness, measure, safetensors_file, synthetic
from benchmarks.harness import Ask, Program
from benchmarks.safetensors_file import Tensor
from benchmarks.sections import Bench

if TYPE_CHECKING:
    from benchmarks.transformer import Shape

BLOCKS: Final = 8
LARGE: Final = (1024, 32_000)
SMALL: Final = (256, 2000)
"""Width and vocabulary; the small ones if there is less than a block. Their matrices are the smallest that stay
compressed."""
TURNS: Final = 8
"""Forwards of each process: they are short."""
PLAIN: Final = "BF16"
_PROCESS: Final = Path(__file__).with_name("transformer.py")


def model(bench: Bench) -> None:
    """Memory and time of a transformer of 100 million weights and an embedding, tied to the output layer and not."""
    try:
        from benchmarks import transformer
    except ModuleNotFoundError as error:
        raise measure.CommandError(f"{error.name} is not installed: use the environment of `make test`") from None
    blocks = round(BLOCKS * bench.size)
    for tied in (True, False):
        _case(bench, transformer.Shape(max(1, blocks), *(LARGE if blocks else SMALL), tied))
    # A small layer: beside the decoding of a large one, this difference would be lost in the noise.
    programs = _programs(bench, transformer.Shape(1, *SMALL, tied=True))[1:]
    overheads: dict[str, list[float]] = {program.name: [] for program in programs}
    for _ in range(bench.rounds):
        with harness.asking(programs) as children:
            _take_turns(children, "overhead", overheads)
    for name, found in overheads.items():
        what = f"a layer of {SMALL[0]} x {SMALL[0]}, a call besides decoding and product"
        bench.board.add(f"{what}: {name}", "s", "lower", found)


def _case(bench: Bench, shape: Shape) -> None:
    case = f"{shape.blocks} x {shape.width}, {'tied' if shape.tied else 'untied'}"
    programs = _programs(bench, shape)
    memory: dict[str, dict[str, list[float]]] = {}
    times: dict[str, list[float]] = {program.name: [] for program in programs}
    for number in range(bench.rounds):
        harness.say(f"model: {case}: {number + 1} of {bench.rounds}")
        with harness.asking(programs) as children:
            for name, ask in children.items():
                for what, size in json.loads(ask("memory")).items():
                    memory.setdefault(what, {}).setdefault(name, []).append(size / 2**20)
            if children["df11"]("digest") != children[PLAIN]("digest"):
                raise measure.CommandError(f"{case}: logits or gradients of the compressed model differ from BF16")
            _take_turns(children, "forward", times)
    for what, by_name in memory.items():
        for name, sizes in by_name.items():
            bench.board.add(f"{case}, {what}: {name}", "MiB", "lower", sizes)
    for name, taken in times.items():
        bench.board.add(f"{case}, forward: {name}", "s", "lower", taken)
    ours = times.pop("df11")
    for name, theirs in times.items():
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        bench.board.add(f"{case}, forward: speed, df11 / {name}", "x", "higher", ratios, ratio=True)


def _programs(bench: Bench, shape: Shape) -> list[Program]:
    # Torch alone, then each checkout; with the files that they load.
    from benchmarks import transformer

    parameters = transformer.make(shape).named_parameters()
    source = bench.folder / "x.safetensors"
    tensors = [Tensor(name, "BF16", tuple(value.shape)) for name, value in parameters]
    safetensors_file.write(source, tensors, synthetic.gaussian)
    command = ("-P", str(_PROCESS))
    programs = [Program(PLAIN, [sys.executable, *command, str(source), json.dumps(shape)])]
    for checkout in bench.checkouts:
        container = bench.folder / f"{checkout.name}.df11"
        harness.run(checkout.program("", "convert", source, container, "--quiet", output=container))
        programs.append(
            Program(checkout.name, [checkout.python, *command, str(container), json.dumps(shape)], env=checkout.env)
        )
    return programs


def _take_turns(children: dict[str, Ask], question: str, taken: dict[str, list[float]]) -> None:
    for _ in range(TURNS):
        for name, ask in children.items():
            taken[name].append(float(ask(question)))
