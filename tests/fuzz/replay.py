"""Read inputs again, and say what becomes of them: python -m tests.fuzz.replay TARGET FILE ..."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fuzz.oracle import judge
from tests.fuzz.registry import PROGRAMS, TARGETS


def main() -> None:
    """A line for each file; a fault ends it with its trace."""
    name, *files = sys.argv[1:]
    for file in files:
        data = Path(file).read_bytes()
        if name in TARGETS:
            verdict = judge(TARGETS[name].act, data)
            what = "accepted" if verdict.accepted else "refused"
            sys.stdout.write(f"{file}: {what}, {verdict.seconds:.3f} s, {verdict.memory / (1 << 20):.1f} MiB\n")
        else:
            faults = PROGRAMS[name].run([data])
            sys.stdout.write(f"{file}: {faults[0][1] if faults else 'as it should be'}\n")


if __name__ == "__main__":
    main()
