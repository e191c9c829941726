"""The section ``model``: what a compressed model costs on the CPU, beside the same in BF16 and another checkout's."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import harness, measure, safetensors_file, synthetic
from benchmarks.harness import Program
from benchmarks.safetensors_file import Tensor
from benchmarks.sections import Bench

if TYPE_CHECKING:
    from benchmarks.transformer import Shape

BLOCKS: Final = 8
LARGE: Final = (1024, 32_000)
SMALL: Final = (256, 2000)
"""Width and vocabulary; the small ones if there is less than a block. Their matrices are the smallest that stay
compressed."""
FORWARDS: Final = 8
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
        shape = transformer.Shape(max(1, blocks), *(LARGE if blocks else SMALL), tied)
        parameters = transformer.make(shape).named_parameters()
        _case(bench, shape, [Tensor(name, "BF16", tuple(value.shape)) for name, value in parameters])


def _case(bench: Bench, shape: Shape, tensors: list[Tensor]) -> None:
    case = f"{shape.blocks} x {shape.width}, {'tied' if shape.tied else 'untied'}"
    source = bench.folder / "x.safetensors"
    safetensors_file.write(source, tensors, synthetic.gaussian)
    programs = [_program(PLAIN, sys.executable, source, shape)]
    for checkout in bench.checkouts:
        container = bench.folder / f"{checkout.name}.df11"
        harness.run(checkout.program("", "convert", source, container, "--quiet", output=container))
        programs.append(_program(checkout.name, checkout.python, container, shape, checkout.env))
    memory: dict[str, dict[str, list[float]]] = {}
    times: dict[str, dict[str, list[float]]] = {"forward": {}, "overhead": {}}
    for number in range(bench.rounds):
        harness.say(f"model: {case}: {number + 1} of {bench.rounds}")
        with ExitStack() as stack:
            children = {program.name: stack.enter_context(harness.asking(program)) for program in programs}
            for name, ask in children.items():
                for what, size in json.loads(ask("memory")).items():
                    memory.setdefault(what, {}).setdefault(name, []).append(size / 2**20)
            if children["df11"]("digest") != children[PLAIN]("digest"):
                raise measure.CommandError(f"{case}: logits or gradients of the compressed model differ from BF16")
            for _ in range(FORWARDS):
                for what, found in times.items():
                    for name, ask in children.items():
                        if (what, name) != ("overhead", PLAIN):
                            found.setdefault(name, []).append(float(ask(what)))
    for what, by_name in memory.items():
        for name, sizes in by_name.items():
            bench.board.add(f"{case}, {what}: {name}", "MiB", "lower", sizes)
    for what, by_name in times.items():
        label = "forward" if what == "forward" else "a layer's call, besides decoding and product"
        for name, taken in by_name.items():
            bench.board.add(f"{case}, {label}: {name}", "s", "lower", taken)
    ours = times["forward"].pop("df11")
    for name, theirs in times["forward"].items():
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        bench.board.add(f"{case}, forward: speed, df11 / {name}", "x", "higher", ratios, ratio=True)


def _program(name: str, python: str, file: Path, shape: Shape, env: dict[str, str] | None = None) -> Program:
    return Program(name, [python, "-P", str(_PROCESS), str(file), json.dumps(shape)], env=env)
