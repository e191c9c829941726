"""What a run finds: how many inputs, which failed, the slowest, the one that took the most memory."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from random import Random

from tests.fuzz.oracle import SMALL, Fault, Target, Verdict, judge
from tests.fuzz.registry import CORPUS, FAILING

CURRENT = "current"
"""Name of the file with the input that is being read: what is left of it when a process dies."""


class Tally:
    """Counts for one target. ``folder`` gets the current input, the worst inputs and, by :meth:`save`, the counts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.inputs = self.accepted = 0
        self.failures: dict[str, str] = {}
        self._known: set[str] = set()
        self._slowest, self._largest = Verdict(True, 0.0, 0), Verdict(True, 0.0, 0)
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def judge(self, target: Target, data: bytes) -> bool:
        """Read an input, and say whether it was accepted."""
        (self.folder / CURRENT).write_bytes(data)
        self.inputs += 1
        try:
            verdict = judge(target.act, data)
        except Fault as fault:
            self.fail(data, str(fault))
            return False
        self.accepted += verdict.accepted
        if verdict.seconds > self._slowest.seconds:
            self._slowest = verdict
            (self.folder / "slowest").write_bytes(data)
        if verdict.memory > self._largest.memory and len(data) < SMALL:
            self._largest = verdict
            (self.folder / "most-memory").write_bytes(data)
        return verdict.accepted

    def fail(self, data: bytes, what: str) -> None:
        """Keep an input that failed, one for each thing that can be wrong."""
        kind = re.sub(r"\d+", "", what)
        if kind not in self._known:
            self._known.add(kind)
            self.failures[keep(self.name, data)] = what

    def save(self, **more: object) -> None:
        """Write the counts as JSON."""
        result = {
            "target": self.name,
            "inputs": self.inputs,
            "accepted": self.accepted,
            "seconds": round(time.monotonic() - self._started, 1),
            "failures": self.failures,
            "slowest_seconds": round(self._slowest.seconds, 4),
            "most_memory_mib": round(self._largest.memory / (1 << 20), 1),
            "most_memory_input": f"{self.folder.name}/most-memory",
        }
        (self.folder / "result.json").write_text(json.dumps(result | more, indent=1))


def keep(name: str, data: bytes) -> str:
    """Put an input that failed into the corpus; returns the path from the repository's root."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{FAILING}{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return str(path.relative_to(CORPUS.parents[2]))


def wander(target: Target, random: Random, inputs: int) -> list[tuple[bytes, bool]]:
    """Edited inputs, and whether they were accepted; those become the start of others. Raises a Fault."""
    start = target.seeds()
    pool, found = list(start), []
    while len(found) < inputs:
        data = target.mutate(random.choice(pool if random.random() < 0.5 else start), random)
        if len(data) > target.largest:
            continue
        accepted = judge(target.act, data).accepted
        found.append((data, accepted))
        if accepted:
            pool.append(data)
    return found
