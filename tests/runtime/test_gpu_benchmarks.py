"""The programs that check and time a GPU, run on the CPU: a machine with a GPU is rare and must not meet mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import bench, check, cubins, models, timing, variants, weights
from benchmarks.gpu.report import Row
from df11 import runtime


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--device", "cpu", "--weights", "300000", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith("ok")] == list(check.ORDER)
    [written] = tmp_path.glob("*-gpu-check-*.json")
    assert {row["correct"] for row in json.loads(written.read_text())["checks"]} == {True}


def test_check_finds_a_wrong_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = runtime.CompressedTensor.decode

    def wrong(self: runtime.CompressedTensor, *arguments: object, **options: object) -> object:
        out = decode(self, *arguments, **options)  # type: ignore[arg-type]
        out.view(-1)[-1] = 3
        return out

    monkeypatch.setattr(runtime.CompressedTensor, "decode", wrong)
    assert check.main(["--device", "cpu", "--weights", "300000", "--only", "gaussian", "--out", str(tmp_path)]) == 1
    assert "**no**" in next(tmp_path.glob("*.md")).read_text()


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--scale", "4000", "--out", str(tmp_path)]) == 0
    [written] = tmp_path.glob("*.json")
    sections = json.loads(written.read_text())["sections"]
    assert sections.keys() == set(bench.SECTIONS)
    assert all(section["error"] is None for section in sections.values())
    assert all(
        sections[name]["rows"] for name in ("empty", "sizes", "outliers", "dtypes", "block", "embedding", "loading")
    )
    assert "GB/s of weights" in capsys.readouterr().out


def test_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["--device", "cpu", "--smallest", "--out", str(tmp_path)]) == 0
    [written] = tmp_path.glob("*.json")
    sections = json.loads(written.read_text())["sections"]
    assert sections.keys() == set(models.SECTIONS)
    for section in sections.values():
        held = {row["name"]: row["held_bytes"] for row in section["rows"]}
        assert held["df11"] < held["BF16"]
    assert "of BF16" in capsys.readouterr().out


def test_models_without_the_libraries_of_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("diffusers", "PIL", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    assert models.main(["--device", "cpu", "--smallest", "--out", str(tmp_path)]) == 1
    [written] = tmp_path.glob("*.json")
    sections = json.loads(written.read_text())["sections"]
    assert sections["image"]["error"] is None
    assert len(sections["image"]["rows"]) == 4
    assert "transformers" in sections["text"]["error"]


def test_a_token_that_differs_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: models.Bench) -> list[Row]:
        model = torch.nn.Linear(1024, 1024, dtype=torch.bfloat16)
        return self._compare("tokens", model, lambda: next(tokens))

    tokens = iter(torch.tensor(row) for row in ([1, 2, 3], [1, 2, 3], *[[1, 9, 3]] * 6))
    monkeypatch.setattr(models.Bench, "image", run)
    arguments = ["--device", "cpu", "--smallest", "--only", "image", "--out", str(tmp_path)]
    assert models.main(arguments) == 1
    [written] = tmp_path.glob("*.json")
    section = json.loads(written.read_text())["sections"]["image"]
    assert section["error"] is None
    assert [row["differing"] for row in section["rows"]] == [0, 1, 1, 1]


def test_tied_weights_stay_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.nn.Module] = []
    monkeypatch.setattr(models.Bench, "_compare", lambda _self, _what, model, _run: seen.append(model) or [])
    models.Bench(torch.device("cpu"), models.SMALLEST).text()
    model: Any = seen[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight


class SlowHost:
    """torch.cuda of a machine whose host needs this long to queue a call. ``waits``: of the GPU, in cycles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds, self.waits = 0.0, seconds, []
        event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _end: 1.0)
        cuda = torch.cuda
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "cache_bytes", lambda: 8)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(fill_=lambda _: None))
        for name, value in (
            ("Event", lambda **_: event),
            ("synchronize", lambda: None),
            ("_sleep", self.waits.append),
        ):
            monkeypatch.setattr(cuda, name, value)

    def call(self) -> None:
        self.now += self.seconds


@pytest.mark.parametrize("seconds", [40e-6, 1.3e-3, 20e-3])
def test_the_gpu_waits_until_a_call_is_queued(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    host = SlowHost(monkeypatch, seconds)
    assert timing.time_kernel(host.call, repeats=5).samples == 5
    assert len(host.waits) == 5
    assert min(host.waits) / 2e9 > 1.9 * seconds  # at the clock of a real GPU
    assert min(host.waits) >= 4_000_000


def test_bench_times_nothing_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = weights.compress
    monkeypatch.setattr(weights, "compress", lambda original: honest(original * 2))
    assert bench.main(["--device", "cpu", "--scale", "4000", "--only", "sizes", "--out", str(tmp_path)]) == 1
    assert "decodes wrongly" in next(tmp_path.glob("*.md")).read_text()


def test_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for program in (check.main, bench.main, models.main):
        assert program(["--out", str(tmp_path)]) == 2
        assert "without CUDA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_have_the_entropy_that_is_claimed() -> None:
    for make, low, high in (
        (weights.gaussian, 10.6, 10.7),
        (weights.spread, 11.5, 11.9),
        (weights.random_bits, 16, 16.1),
    ):
        original = make(1 << 20, 1, "cpu")
        assert low <= 8 * weights.compress(original).record.numel() / original.numel() <= high
    assert sum(rows * columns for rows, columns in weights.block_shapes().values()) == 104_670_720


@pytest.mark.parametrize("name", variants.CHANGES)
def test_variants_compile(name: str) -> None:
    changed = variants.source(name)
    assert (changed == variants.source("as it is")) == (name == "as it is")
    assert cubins.compile_kernels(changed, "90").kernels["df11_decode"].spill_stores == 0
