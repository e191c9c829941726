"""What the comparison says about two results files, with made-up samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, results
from benchmarks.results import Result

MACHINE: dict[str, Any] = {
    "date": "2026-11-26T01:02:03+00:00",
    "commit": "c11504e",
    "cpu": "A processor",
    "cores": 2,
    "memory_bytes": 24 << 30,
    "kernel": "Linux 6",
    "versions": {"df11": "0.1.0", "numpy": "2.4.6"},
    "file_system": "tmpfs",
}


def seconds(*samples: float) -> Result:
    return Result.of("convert", "4 GB: df11", "s", "lower", samples)


def speed(*samples: float) -> Result:
    return Result.of("convert", "4 GB: speed, df11 / lmzip", "x", "higher", samples, ratio=True)


def size(count: int) -> Result:
    return Result.of("sizes", "MiniLM: df11", "bytes", "lower", [count])


def peak(*samples: float) -> Result:
    return Result.of("memory", "4 GB: df11", "MiB", "lower", samples)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (seconds(10, 11, 12), seconds(7, 8, 9), "faster"),
        (seconds(10, 11, 12), seconds(13, 14, 15), "slower"),
        (speed(1.2, 1.25, 1.3), speed(1.31, 1.4, 1.5), "faster"),
        (speed(1.2, 1.25, 1.3), speed(1.1, 1.15, 1.19), "slower"),
        (peak(114, 114, 115), peak(61, 62, 63), "smaller"),
        (size(1_000_000), size(1_000_001), "larger"),  # counts have no noise
        (seconds(10.00, 10.01, 10.02), seconds(10.10, 10.11, 10.12), "slower"),  # 1 %, but apart
        (seconds(10), seconds(10.2), None),  # one sample: 2 % may be noise
        (seconds(10), seconds(10.5), "slower"),
        (seconds(10, 11, 12), seconds(11.5, 12, 12.5), "perhaps slower"),  # 9 %, but they overlap
        (seconds(10, 11, 12), seconds(10.5, 11.1, 12), None),
        (size(5), size(5), None),
        # Among eight samples, one outlier does not hide a change; among fewer it does.
        (seconds(*[10.0, 10.1] * 4, 20.0), seconds(*[11.0, 11.1] * 4, 5.0), "slower"),
        (seconds(10.0, 10.1, 20.0), seconds(11.0, 11.1, 5.0), "perhaps slower"),
    ],
)
def test_words(a: Result, b: Result, words: str | None) -> None:
    lines = compare.compare([a], [b])
    said = [line.split(a.name)[0].strip() for line in lines if a.name in line]
    assert said == ([words] if words else [])
    certain = words is not None and "perhaps" not in words
    assert lines[-1] == (f"1 {words}, 0 the same within the noise." if certain else "1 the same within the noise.")


def test_values_and_ranges_are_told() -> None:
    lines = compare.compare([seconds(10, 11, 12), size(1_000_000)], [seconds(5, 5.5, 6), size(990_000)])
    assert lines == [
        "convert",
        "  faster          4 GB: df11: 11 -> 5.5 s (-50.0%; 10..12 -> 5..6)",
        "sizes",
        "  smaller         MiniLM: df11: 1,000,000 -> 990,000 bytes (-1.0%)",
        "1 faster, 1 smaller, 0 the same within the noise.",
    ]


def test_what_is_in_one_file_only() -> None:
    lines = compare.compare([seconds(1), size(2)], [size(2), speed(3)])
    assert lines[-4:] == [
        *("Only in A:", "  convert: 4 GB: df11 (s)"),
        *("Only in B:", "  convert: 4 GB: speed, df11 / lmzip (x)"),
    ]


def test_of_other_machines_only_ratios_and_sizes_count() -> None:
    a, b = [seconds(10, 11), speed(1, 1.1), size(3)], [seconds(5, 6), speed(2, 2.1), size(3)]
    lines = compare.compare(a, b, other_machine=True)
    assert [line.split()[0] for line in lines[:2]] == ["convert", "faster"]
    assert not any("df11: " in line for line in lines)
    assert lines[-1].startswith("Timings left out, as the machines differ: 1.")


def save(path: Path, found: list[Result], **machine: Any) -> str:
    results.write(path, found, MACHINE | machine)
    return str(path)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = [seconds(1.23456789, 2), dataclasses.replace(size(10_476_366_822), samples=())]
    content, read = results.read(Path(save(tmp_path / "a.json", found)))
    assert content["machine"] == MACHINE
    assert read[0].samples == (1.23457, 2)
    assert read[1] == found[1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.json", [seconds(10, 11, 12), size(5)])
    b = save(tmp_path / "b.json", [seconds(1, 2, 3), size(5)], commit="abcdef0")
    assert compare.main([a, b]) == 0
    said = capsys.readouterr().out
    assert "commit c11504e" in said
    assert "commit abcdef0" in said
    assert "1 faster, 1 the same" in said
    assert "differ" not in said


def test_other_machine_and_versions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.json", [seconds(10)])
    other = {"cpu": "Another", "memory_bytes": (24 << 30) + 4096, "versions": {"df11": "0.2.0"}}
    b = save(tmp_path / "b.json", [seconds(1)], **other)
    assert compare.main([a, b]) == 0
    said = capsys.readouterr().out
    assert "The machines differ. cpu: A processor, Another.\n" in said
    assert "Versions differ. df11: 0.1.0, 0.2.0; numpy: 2.4.6, None." in said
    assert "Timings left out, as the machines differ: 1." in said


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        {"format": 2},
        {"format": 1, "machine": MACHINE},
        {"format": 1, "machine": {}, "results": []},
        {"format": 1, "machine": MACHINE, "results": [{"section": "x", "samples": []}]},
        {"format": 1, "machine": MACHINE, "results": [dataclasses.asdict(seconds(1)) | {"value": "fast"}]},
    ],
)
def test_files_that_cannot_be_used(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save(tmp_path / "good.json", []), tmp_path / "bad.json"
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    assert compare.main([good, str(bad)]) == 2
    assert compare.main([str(tmp_path / "missing.json"), good]) == 2
    assert f"compare: {bad}: " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_can_be_compared(path: Path) -> None:
    content, found = results.read(path)
    assert found or {"sections", "checks", "crash"} & content.keys()
    assert len({(result.section, result.name, result.unit) for result in found}) == len(found)
    assert all(result.low <= result.value <= result.high for result in found)
