"""What every section of the benchmark does: run programs in turns, and keep what each run took."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import measure, results
from benchmarks.measure import Measured
from benchmarks.results import Better, Result

Pair = tuple[str, str]
"""Names of two programs."""
Taken = dict[str, list[Measured]]
"""What the runs of each program took."""
Ask = Callable[[str], str]
"""Asks a program a line, and gives the line that it answers."""


@dataclass(frozen=True, slots=True)
class Program:
    """A command to measure; ``output``, a file or a folder, is removed before each run."""

    name: str
    command: Sequence[str]
    output: Path | None = None
    env: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout of df11 and the Python that runs it. ``name``: "df11", or "against" for the other one."""

    name: str
    path: Path
    python: str = sys.executable

    @property
    def env(self) -> dict[str, str]:
        """The environment in which ``import df11`` finds this checkout."""
        path = os.pathsep.join(filter(None, [str(self.path / "src"), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path}

    def program(self, name: str, *arguments: object, output: Path | None = None) -> Program:
        """Its command line; ``name`` is appended to that of the checkout."""
        command = [self.python, "-m", "df11", *map(str, arguments)]
        return Program(f"{self.name} {name}".strip(), command, output, self.env)


@dataclass(slots=True)
class Board:
    """The figures of a run. ``section``: that of the next figure. ``notes``: what is missing or has failed, and why."""

    section: str = ""
    found: list[Result] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, unit: str, better: Better, samples: Sequence[float], *, ratio: bool = False) -> None:
        """Keep a figure."""
        self.found.append(Result.of(self.section, name, unit, better, samples, ratio=ratio))

    def turns(self, case: str, programs: Sequence[Program], pairs: Sequence[Pair], rounds: int) -> Taken:
        """Run the programs in turns, ``rounds`` times (A B A B), and keep what they took.

        ``pairs``: pairs of names, for which the speed of the first is divided by that of the second, round by round.
        """
        taken: Taken = {program.name: [] for program in programs}
        for number in range(rounds):
            say(f"{self.section}: {case}: {number + 1} of {rounds}")
            for program in programs:
                taken[program.name].append(run(program))
        for name, runs in taken.items():
            self.add(f"{case}: {name}", "s", "lower", [one.wall for one in runs])
            self.add(f"{case}: {name}, CPU time", "s", "lower", [one.cpu for one in runs])
            self.add(f"{case}: {name}, peak memory", "MiB", "lower", [one.peak_rss / 2**20 for one in runs])
        for first, second in pairs:
            both = list(zip(taken[first], taken[second], strict=True))
            speeds, thrift = [b.wall / a.wall for a, b in both], [b.cpu / a.cpu for a, b in both]
            self.add(f"{case}: speed, {first} / {second}", "x", "higher", speeds, ratio=True)
            self.add(f"{case}: speed by CPU time, {first} / {second}", "x", "higher", thrift, ratio=True)
        return taken


def run(program: Program) -> Measured:
    """Run a program after removing what its last run wrote."""
    if program.output:
        remove(program.output)
    return measure.run(program.command, program.env)


@contextmanager
def asking(programs: Sequence[Program]) -> Iterator[dict[str, Ask]]:
    """Programs that answer lines on their standard input with lines. They end with the context.

    Gives the functions that ask them, by name; these raise CommandError if the program has ended.
    """
    with ExitStack() as stack:
        yield {program.name: stack.enter_context(_asking(program)) for program in programs}


@contextmanager
def _asking(program: Program) -> Iterator[Ask]:
    pipe = subprocess.PIPE
    # Without a buffer: what is left in one, because the program has ended, would be an error again at the end.
    with subprocess.Popen(program.command, bufsize=0, stdin=pipe, stdout=pipe, env=program.env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(question: str) -> str:
            with suppress(BrokenPipeError):
                questions.write(f"{question}\n".encode())
            if not (answer := answers.readline().decode().strip()):
                raise measure.CommandError(f"{program.name} ended with exit code {process.wait()}")
            return answer

        yield ask


def remove(path: Path) -> None:
    """A file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def evict(path: Path) -> None:
    """Write a file, or all files in a folder, to the disk, and drop them from the page cache."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def checkouts(against: str | None) -> list[Checkout]:
    """The checkout of this file, and the other one, ``PATH`` or ``PATH:PYTHON``, if given. Raises ValueError."""
    found = [Checkout("df11", results.ROOT)]
    if against:
        path, _, python = against.partition(":")
        if not Path(path, "src", "df11").is_dir():
            raise ValueError(f"{path} is not a checkout of df11")
        found.append(Checkout("against", Path(path).resolve(), python or sys.executable))
    return found


def say(line: str) -> None:
    """Report progress on standard error."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
