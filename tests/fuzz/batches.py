"""Feed a kernel under sanitizers with edited records: python -m tests.fuzz.batches PROGRAM SECONDS FOLDER.

A compiler's coverage of a program in another process guides nobody here; the edits know the structure.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

from tests.fuzz.programs import Program
from tests.fuzz.registry import PROGRAMS, corpus
from tests.fuzz.tally import CURRENT, Tally


def batch(program: Program, random: Random, count: int) -> list[bytes]:
    """Edited records."""
    start, made = program.seeds(), []
    while len(made) < count:
        data = random.choice(start)
        for _ in range(random.choice((1, 1, 2, 4))):
            data = program.mutate(data, random)
        if len(data) <= program.largest:
            made.append(data)
    return made


def main() -> None:
    """Until the time is over."""
    program, seconds, folder = PROGRAMS[sys.argv[1]], float(sys.argv[2]), Path(sys.argv[3])
    tally, random = Tally(program.name, folder), Random(int(seconds) + 1)
    end, inputs = time.monotonic() + seconds, [path.read_bytes() for path in corpus(program.name)]
    while True:
        (folder / CURRENT).write_bytes(b"".join(inputs))
        for data, what in program.run(inputs):
            tally.fail(data, what)
        tally.inputs += len(inputs)
        if time.monotonic() > end:
            break
        inputs = batch(program, random, program.batch)
    tally.save()


if __name__ == "__main__":
    main()
