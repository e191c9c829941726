"""The programs that check and time a GPU, run on the CPU: a machine with a GPU is rare and must not meet mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import bench, check, cubins, models, variants, weights
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
    assert all(sections[name]["rows"] for name in ("empty", "sizes", "outliers", "block", "embedding", "loading"))
    assert "GB/s of BF16" in capsys.readouterr().out


def test_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["--device", "cpu", "--smallest", "--out", str(tmp_path)]) == 0
    [written] = tmp_path.glob("*.json")
    sections = json.loads(written.read_text())["sections"]
    assert sections.keys() == set(models.SECTIONS)
    for section in sections.values():
        held = {row["name"]: row["held_bytes"] for row in section["rows"]}
        assert held["df11"] < held["BF16"]
    assert "of BF16" in capsys.readouterr().out


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
