"""The table of docs/reliability.md is made from what was kept of `make crash` and `make fuzz`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import reliability, results

MACHINE = {
    "date": "2026-01-02",
    "commit": "abc",
    "cpu": "a CPU",
    "cores": 2,
    "memory_bytes": 1 << 30,
    "kernel": "Linux 6",
    "versions": {"df11": "0"},
}
ONE = dict.fromkeys(("points", "kills", "cuts", "faults", "changes", "writers", "bytes_lost", "hangs", "crashes"), 1000)
CRASH = {
    "machine": MACHINE,
    "step": 2,
    "note": "It was interrupted.",
    "commands": {"convert a file": {**ONE, "violations": []}, "hub pull": {**ONE, "violations": ["one"]}},
    "bits": {"bits": 9000, "noticed": 8990, "free": 7, "same": 3, "missed": []},
}
FUZZ = {
    "seconds": 60,
    "targets": [
        {
            "target": "container",
            "inputs": 12345,
            "accepted": 45,
            "failures": {"a": "b"},
            "edges": 9,
            "most_memory_mib": 33.2,
            "slowest_seconds": 0.514,
        },
        {
            "target": "cuda",
            "inputs": 1000,
            "accepted": 0,
            "failures": {},
            "edges": None,
            "most_memory_mib": 0.0,
            "slowest_seconds": 0.0,
        },
    ],
}


def test_the_page_shows_the_results() -> None:
    page = reliability.PAGE.read_text(encoding="utf-8")
    shown = page.partition(reliability.START)[2].partition(reliability.END)[0].strip()
    kept, _ = results.read(reliability.KEPT)
    assert shown == reliability.as_text(kept)


def test_results_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "BUILD", tmp_path / "build")
    monkeypatch.setattr(reliability, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(reliability, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(f"before\n{reliability.START}old{reliability.END}\nafter\n")
    assert reliability.main() == 1
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "crash.json").write_text(json.dumps(CRASH))
    (tmp_path / "build" / "fuzz.json").write_text(json.dumps(FUZZ))
    assert reliability.main() == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith(f"before\n{reliability.START}\n\n2026-01-02. a CPU, 2 cores")
    assert page.endswith(f"{reliability.END}\nafter\n")
    assert "| all |" + " 2,000 |" * 9 in page
    assert "One in 2 of all faults was tried" in page
    assert "tried, evenly.\n\nIt was interrupted.\n\n" in page
    assert "1 of these ended otherwise than this page promises" in page
    assert "`verify` noticed 8,990" in page
    assert "13,345 malformed inputs were tried in 60 s; 45 turned out" in page
    assert "took 33 MiB of memory, and 0.5 s" in page
    assert "| container | 12,345 | 45 | 1 | 33 | 0.51 |" in page
    assert "| cuda | 1,000 | 0 | 0 |  |  |" in page
    kept, rows = results.read(tmp_path / "kept.json")
    assert (kept["crash"], kept["fuzz"], rows) == (CRASH, FUZZ, [])
