"""``python -m tests.crash``: every fault at every point of every command. Writes build/reliability/crash.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import describe
from tests.crash import bits
from tests.crash.campaign import Campaign, Tally
from tests.crash.machine import Machine
from tests.crash.scenarios import SCENARIOS, World
from tests.support.hub.server import HubServer

RESULTS = Path(__file__).parents[2] / "build" / "reliability" / "crash.json"
COLUMNS = ("points", "kills", "cuts", "faults", "changes", "writers", "bytes_lost", "hangs", "crashes")


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """A machine and a Hub in a folder."""
    with (
        HubServer(folder / "storage") as hub,
        Machine(folder / "machine", folder / "root", hub.environment(folder / "home")) as machine,
    ):
        yield World(machine, hub)


def main() -> int:
    """Run all, or the commands that match, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=".*", metavar="PATTERN", help="commands to put faults into")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="take every n-th fault")
    options = parser.parse_args()
    started = time.monotonic()
    tallies: dict[str, Tally] = {}
    print(f"{'command':18}" + "".join(f"{column:>11}" for column in COLUMNS))
    with tempfile.TemporaryDirectory(prefix="df11-crash-") as folder, world(Path(folder)) as one:
        for scenario in SCENARIOS:
            if re.fullmatch(options.only, scenario.command):
                campaign = Campaign(one, scenario)
                for check in list(campaign.checks())[:: options.step]:
                    check()
                tallies.setdefault(scenario.command, Tally()).add(campaign.tally)
                print(f"{scenario.name:18}" + "".join(f"{getattr(campaign.tally, name):>11,}" for name in COLUMNS))
                for violation in campaign.tally.violations:
                    print(f"  {' '.join(violation.split())[:400]}")
                sys.stdout.flush()
        container = bits.make(Path(folder) / "bits")
        flips = bits.flip(container, range(0, 8 * container.stat().st_size, options.step))
    print(f"{flips.bits:,} bits flipped: {flips.noticed:,} noticed, {len(flips.missed)} missed")
    violations = sum(len(tally.violations) for tally in tallies.values())
    result: dict[str, Any] = {
        "machine": describe(),
        "seconds": round(time.monotonic() - started, 1),
        "step": options.step,
        "commands": {name: vars(tally) for name, tally in tallies.items()},
        "bits": dataclasses.asdict(flips),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if violations or flips.missed else 0


if __name__ == "__main__":
    sys.exit(main())
