"""The benchmark from end to end at the smallest sizes, and what it does when something is wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench, compare, harness, measure, peers, results
from benchmarks.harness import Board, Program
from benchmarks.results import Result

SMALLEST = ("--size", "0.0001", "--rounds", "1", "--no-peers")

AT_REST, PEAK, KEPT = "at rest", "peak of the first forward, above that", "kept for backward"
BEYOND = f"{KEPT}, beyond the model"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "BUILD", tmp_path / "build")
    return tmp_path / "build"


def written(build: Path) -> list[Result]:
    [path] = build.glob("*.json")
    assert compare.main([str(path), str(path)]) == 0
    return results.read(path)[1]


def test_convert(build: Path, tmp_path: Path) -> None:
    assert bench.main(["convert", *SMALLEST, "--folder", str(tmp_path)]) == 0
    found = {result.name: result for result in written(build)}
    names = ("1 MB: df11", "1 MB in 8 shards: df11")
    for case in (*(f"convert {name} --no-verify" for name in names), *(f"restore {name}" for name in names)):
        assert found[case].value > 0.01
        assert found[f"{case}, CPU time"].value > 0.01
        assert 10 < found[f"{case}, peak memory"].value < 500
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_memory(build: Path, tmp_path: Path) -> None:
    assert bench.main(["memory", *SMALLEST, "--folder", str(tmp_path)]) == 0
    found = {result.name: result.value for result in written(build)}
    assert 10 < found["at rest: df11"] < found["convert one tensor of 1 MB: df11"] < 500
    assert len(found) == 10


def test_cores_beside_those_of_another_checkout(build: Path, tmp_path: Path) -> None:
    against = f"{results.ROOT}:{sys.executable}"
    assert bench.main(["cores", *SMALLEST, "--folder", str(tmp_path), "--against", against]) == 0
    found = {result.name: result for result in written(build)}
    for kernel in ("encode", "encode, verified", "decode", "compare", "count exponents", "cast from F32"):
        ours, theirs, ratio = (found[f"{kernel}: {name}"] for name in ("df11", "against", "speed, df11 / against"))
        assert 0.01 < ours.value < 1000
        for a, b, pair in zip(ours.samples, theirs.samples, ratio.samples, strict=True):
            assert a / b == pytest.approx(pair, rel=1e-4)


def test_dtypes(build: Path, tmp_path: Path) -> None:
    assert bench.main(["dtypes", *SMALLEST, "--folder", str(tmp_path)]) == 0
    found = {result.name: result.value for result in written(build)}
    most = {"BF16": 0.68, "F16": 0.86, "F32": 0.85, "F32 that is BF16": 0.34}
    most |= {"E4M3, a scale for a row": 0.86, "E5M2, a scale for a row": 0.75}
    for name, ratio in most.items():
        assert ratio - 0.06 < found[f"{name}: df11"] < ratio
    for dtype in ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"):
        assert 0.001 < found[f"encode {dtype}"] < 1000
        assert 0.001 < found[f"decode {dtype}: speed, {dtype} / BF16"] < 1000


def test_model_beside_that_of_another_checkout(build: Path, tmp_path: Path) -> None:
    against = f"{results.ROOT}:{sys.executable}"
    assert bench.main(["model", *SMALLEST, "--folder", str(tmp_path), "--against", against]) == 0
    found = {result.name: result for result in written(build)}
    assert len([name for name in found if name.startswith("a layer of 256 x 256, ")]) == 2
    weights = 12 * 256 * 256
    # Of a tied model, autograd keeps the whole.
    for case, model, kept in (
        ("1 x 256, tied", weights + 2000 * 256, weights + 2000 * 256),
        ("1 x 256, untied", weights + 2 * 2000 * 256, weights + 2000 * 256),
    ):
        for name, share in (("BF16", 1), ("df11", 0.68), ("against", 0.68)):
            value = {what: found[f"{case}, {what}: {name}"].value for what in (AT_REST, PEAK, KEPT, BEYOND)}
            assert value[AT_REST] < model * 2 / 2**20 + 10
            assert 0 <= value[PEAK] < 20
            assert value[KEPT] - value[BEYOND] == pytest.approx(kept * 2 / 2**20 * share, rel=0.04)
            assert 0 < value[BEYOND] < 0.2
            assert found[f"{case}, forward: {name}"].value > 0
        assert found[f"{case}, forward: speed, df11 / BF16"].ratio
        assert len(found[f"{case}, forward: speed, df11 / against"].samples) == 8


def test_omnigen2(build: Path, tmp_path: Path) -> None:
    assert bench.main(["omnigen2", *SMALLEST, "--scale", "0.0001", "--folder", str(tmp_path)]) == 0
    found = {(result.name, result.unit): result.value for result in written(build)}
    parts = [found[f"scale 0.0001: {part}", "bytes"] for part in ("transformer", "mllm", "vae")]
    assert found["scale 0.0001: all", "bytes"] == sum(parts)
    assert 0.6 < found["scale 0.0001: all, entropy bound", "of BF16"] < 0.7


def test_programs_take_turns(tmp_path: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "output"
    # Fails if its output was not removed first.
    line = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); open(sys.argv[3], 'x')"
    programs = [Program(name, [sys.executable, "-c", line, str(log), name, str(output)], output) for name in "AB"]
    board = Board("section")
    taken = board.turns("case", programs, [("A", "B")], 3)
    assert log.read_text() == "ABABAB"
    found = {result.name: result for result in board.found}
    speed = found["case: speed, A / B"]
    assert speed.ratio
    assert list(speed.samples) == [b.wall / a.wall for a, b in zip(taken["A"], taken["B"], strict=True)]
    assert found["case: A"].samples == tuple(run.wall for run in taken["A"])


def test_what_a_child_took() -> None:
    # 0.3 s of work, and 64 MiB of memory that is touched, whatever the size of this process.
    code = "import time\nx = bytearray(b'1') * (64 << 20)\nwhile time.process_time() < 0.3: pass\nprint('said')"
    taken = measure.run([sys.executable, "-c", code])
    assert taken.stdout == "said\n"
    assert taken.wall >= 0.25
    assert taken.cpu == taken.user + taken.system >= 0.3
    assert 64 << 20 < taken.peak_rss < 100 << 20
    with pytest.raises(measure.CommandError, match=r"exit code 3 from .*: why"):
        measure.run([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(measure.CommandError, match="could not be started"):
        measure.run(["/nowhere/at/all"])


def test_a_program_that_no_longer_answers() -> None:
    code = "print(input(), flush=True); raise SystemExit(3)"
    with (
        pytest.raises(measure.CommandError, match="it ended with exit code 3"),
        harness.asking([Program("it", [sys.executable, "-c", code])]) as programs,
    ):
        assert programs["it"]("one") == "one"
        for _ in range(2):
            programs["it"]("two")


def test_what_fails_does_not_end_the_run(
    build: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise measure.CommandError("it broke")

    monkeypatch.setitem(bench.SECTIONS, "convert", fail)
    monkeypatch.setitem(bench.SECTIONS, "sizes", lambda work: work.board.add("x", "s", "lower", [1]))
    # A Python that only fails cannot make an environment for the peers.
    monkeypatch.setattr(peers, "sys", SimpleNamespace(executable=shutil.which("false"), version_info=sys.version_info))
    assert bench.main(["convert", "sizes", *SMALLEST[:-1], "--folder", str(tmp_path)]) == 1
    assert [result.name for result in written(build)] == ["x"]
    said = capsys.readouterr()
    assert "convert: it broke" in said.out
    assert "without peers: " in said.err


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["start", "--against", str(tmp_path)]) == 2
    assert "is not a checkout of df11" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "no such section: speed" in capsys.readouterr().err


def test_without_peers_there_is_nothing_to_run(tmp_path: Path) -> None:
    assert peers.Peers().lmzip("--version") == peers.Peers().smallest(tmp_path, tmp_path) == []


def test_room_is_asked_for(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "--size", "1e9", "--no-peers", "--folder", str(tmp_path)]
    assert bench.main(arguments) == 1
    assert "name another folder with --folder" in capsys.readouterr().err
    assert harness.checkouts(None)[0].path == results.ROOT
    assert not list(build.glob("*.json"))
