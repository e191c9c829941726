"""What the programs for a GPU share: rows in the format of all results, and outputs that differ as a column."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import models, report, timing
from benchmarks.results import Result


def test_values_that_differ_are_counted() -> None:
    nan = torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16)
    assert models.differing(nan, nan.clone()) == 0
    assert models.differing(nan, torch.tensor([1.0, float("nan"), 0.0], dtype=torch.bfloat16)) == 1
    assert models.differing(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 6]])) == 2
    assert models.differing(torch.tensor([1, 2, 3]), torch.tensor([1, 2])) == 3


def test_a_differing_token_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10))
    honest = models.differing
    monkeypatch.setattr(models, "differing", lambda found, expected: honest(found, expected) + (next(calls) == 1))
    assert models.main(["--device", "cpu", "--smallest", "--only", "text", "--out", str(tmp_path)]) == 1
    [path] = tmp_path.glob("*.json")
    section = json.loads(path.read_text())["sections"]["text"]
    assert section["error"] is None
    assert [row["differing"] for row in section["rows"]] == [0, 1, 0, 0]
    assert "values that differ" in path.with_suffix(".md").read_text()


def test_rows_are_results() -> None:
    timing = {"median": 2.0, "minimum": 1.0, "maximum": 9.0, "samples": 50}
    rows = [
        {"what": "a matrix", "name": "df11", "seconds": 2.0, "timing": timing, "of_floor": 0.5, "times_dfloat11": None},
        {"what": "nothing", "seconds": 3.0},
        *({"what": "cold", "name": "df11", "seconds": 4.0 + turn, "of_safetensors": 0.7} for turn in (0, 1)),
    ]
    assert report.figures({"sizes": {"rows": rows}}) == [
        Result("sizes", "a matrix, df11", "s", "lower", False, 2.0, 1.0, 9.0),
        Result.of("sizes", "a matrix, df11: of floor", "x", "higher", [0.5], ratio=True),
        Result.of("sizes", "nothing", "s", "lower", [3.0]),
        Result.of("sizes", "cold, df11", "s", "lower", [4.0, 5.0]),
        Result.of("sizes", "cold, df11: of safetensors", "x", "lower", [0.7, 0.7], ratio=True),
    ]


def test_a_section_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bench:
        def __init__(self) -> None:
            self.missing = {"a peer": "a peer: not installed"}

        def good(self) -> list[report.Row]:
            """Is well."""
            return [{"what": "x", "name": "y", "seconds": 1.0}]

        def bad(self) -> list[report.Row]:
            """Fails."""
            raise ValueError("why\nand more")

    columns = {"what": report.Column("what"), "seconds": report.Column("us", 1e6, ",.0f")}
    about = report.Report("gpu-x", "Title", "About.", columns)
    assert report.refused("x", torch.device("cpu")) == 0
    assert report.run(about, Bench, ["bad", "good"], torch.device("cpu"), tmp_path) == 1
    text = next(tmp_path.glob("*.md")).read_text()
    assert "Missing: a peer: not installed." in text
    assert "## bad\n\nFails.\n\n**Failed**: ValueError: why\n\n## good\n\nIs well.\n\n| what | us |" in text
    assert "| x | 1,000,000 |" in text
    content, found = results.read(next(tmp_path.glob("*.json")))
    assert [result.name for result in found] == ["x, y"]
    assert content["sections"]["bad"]["error"] == "ValueError: why"
    assert text in capsys.readouterr().out


def test_a_call_is_queued_while_the_gpu_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, _end: object) -> float:
            return 2.0  # milliseconds

    cuda = SimpleNamespace(
        Event=Event,
        _sleep=lambda cycles: log.append(f"wait {cycles}"),
        current_device=lambda: 0,
        get_device_properties=lambda _device: SimpleNamespace(L2_cache_size=100),
        synchronize=lambda: log.append("synchronize"),
    )

    def empty(size: int, dtype: str, device: str) -> SimpleNamespace:
        assert (size, dtype, device) == (200, "uint8", "cuda")
        return SimpleNamespace(fill_=lambda _value: log.append("overwrite the cache"))

    fake = SimpleNamespace(cuda=cuda, empty=empty, uint8="uint8")
    monkeypatch.setattr(timing, "importlib", SimpleNamespace(import_module=lambda _name: fake))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    found = timing.time_kernel(lambda: log.append("call"), warmup=1, repeats=2)
    assert found == timing.Timing(0.002, 0.002, 0.002, 2)
    sample = ["overwrite the cache", "wait 4000000", "event", "call", "event"]
    assert log == [*["synchronize", "call"] * 4, "synchronize", *sample, *sample, "synchronize"]
