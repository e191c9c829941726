"""Fuzz one target for some seconds, guided by coverage: python -m tests.fuzz.guided TARGET SECONDS FOLDER.

The folder gets the results. tests.fuzz.run starts this, and reads how many edges were reached from what libFuzzer says.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["df11", "tomllib"], exclude=["df11.formats.reference"]):
    from tests.fuzz.registry import TARGETS, corpus
    from tests.fuzz.tally import Tally

MOST_ADDRESSES = 6 << 30
"""Bytes of address space besides those of the libraries, so that a fault does not take the machine's memory."""
MOST_ACCEPTED = 1000


def limit_memory() -> None:
    """Let the system refuse absurd amounts of memory; the oracle takes such a refusal for a fault."""
    taken = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    if taken:
        resource.setrlimit(resource.RLIMIT_AS, ((int(taken[1]) << 10) + MOST_ADDRESSES, resource.RLIM_INFINITY))


def main() -> None:
    """Does not return."""
    target, seconds, folder = TARGETS[sys.argv[1]], float(sys.argv[2]), Path(sys.argv[3])
    logging.disable(logging.WARNING)
    limit_memory()
    tally, accepted = Tally(target.name, folder), target.seeds()
    end = time.monotonic() + seconds

    def test(data: bytes) -> None:
        if tally.judge(target, data) and len(accepted) < MOST_ACCEPTED:
            accepted.append(data)
        if tally.inputs % 1000 == 0:
            gc.collect()
        if time.monotonic() > end:
            tally.save()
            sys.stderr.flush()
            os._exit(0)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        random = Random(seed)
        for _ in range(4):
            # What reaches new code is mostly broken; deep checks are reached from what is not.
            changed = target.mutate(random.choice(accepted) if random.random() < 0.5 else data, random)
            if len(changed) <= largest:
                return changed
        return changed[:largest]

    with tempfile.TemporaryDirectory(prefix="df11-fuzz-") as seeds:
        for data in [*target.seeds(), *(path.read_bytes() for path in corpus(target.name))]:
            (Path(seeds) / hashlib.sha256(data).hexdigest()).write_bytes(data)
        options = ["-rss_limit_mb=0", "-timeout=60", f"-max_len={target.largest}", "-print_final_stats=0"]
        options += [f"-artifact_prefix={folder}/", "-reload=0", f"-seed={int(seconds) + 1}", "-len_control=0"]
        atheris.Setup([sys.argv[0], *options, seeds], test, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
