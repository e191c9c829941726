"""What the CPU keeps of records in memory: header and directory are checked once, tables built once, within bounds."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from df11 import runtime
from df11.formats import errors, layout
from df11.formats import kernels as formats_kernels
from df11.formats.record import Weights
from df11.runtime import cpu, operators
from df11.runtime.cpu import Cpu, Records
from df11.runtime.kernels import Range
from tests.support import records, strategies

SEGMENT = layout.TILE_WEIGHTS


def record_of(weights: Weights) -> torch.Tensor:
    return torch.from_numpy(records.encode(weights, SEGMENT).copy()).clone()  # at an aligned address


def decoded(device: Cpu, record: torch.Tensor, count: int, *, kept: bool = True) -> Weights:
    out = np.zeros(count, np.uint16)
    owner = record.untyped_storage() if kept else None
    device.decode([Range(record.data_ptr(), record.numel(), count, SEGMENT, 0, count, out.ctypes.data, owner)])
    return out


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been opened, in order: records, and tables of their segments."""
    done: list[str] = []
    open_record, build = cpu.open_record, formats_kernels.build_decode_table

    def note_record(*arguments: object) -> object:
        done.append("record")
        return open_record(*arguments)  # type: ignore[arg-type]

    def note_table(*arguments: object) -> object:
        done.append("table")
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "open_record", note_record)
    monkeypatch.setattr(formats_kernels, "build_decode_table", note_table)
    return done


def test_a_second_use_opens_nothing(opened: list[str]) -> None:
    weights = strategies.make("gaussian", 3 * SEGMENT, 1)
    tensor = runtime.CompressedTensor(record_of(weights), (96, 256), SEGMENT)
    expected = torch.from_numpy(weights.view(np.int16)).view(96, 256)
    assert torch.equal(tensor.decode().view(torch.int16), expected)
    assert sorted(opened) == ["record", "table", "table", "table"]
    opened.clear()
    ids = torch.tensor([[95, 0], [7, 7]])
    assert torch.equal(tensor.decode().view(torch.int16), expected)
    assert torch.equal(tensor.rows(20, 60).view(torch.int16), expected[20:60])
    assert torch.equal(tensor.gather(ids).view(torch.int16), expected[ids])
    assert opened == []


def test_only_the_tables_that_are_needed_are_built(opened: list[str]) -> None:
    weights = strategies.make("gaussian", 3 * SEGMENT, 1)
    tensor = runtime.CompressedTensor(record_of(weights), (96, 256), SEGMENT)
    tensor.rows(40, 50)
    assert opened == ["record", "table"]


def test_it_is_kept_while_the_record_lives() -> None:
    device, weights = Cpu(), strategies.make("gaussian", 2 * SEGMENT, 2)
    record = record_of(weights)
    view = record[:]
    decoded(device, record, len(weights))
    kept = device.records.kept_bytes
    assert 2 * 4 * 2**layout.CODE_LIMIT <= kept == 2 * cpu.SEGMENT_KEPT
    del record
    gc.collect()
    assert device.records.kept_bytes == kept
    del view
    gc.collect()
    assert device.records.kept_bytes == 0


def test_another_record_in_the_same_memory(opened: list[str]) -> None:
    device, weights = Cpu(), strategies.make("gaussian", 2 * SEGMENT, 3)
    record = record_of(weights)
    decoded(device, record, len(weights))
    kept = device.records.kept_bytes
    other = weights ^ np.uint16(0x8000)  # Other signs, and a record of the same size.
    record.copy_(record_of(other))
    np.testing.assert_array_equal(decoded(device, record, len(other)), other)
    assert opened.count("record") == 2
    assert device.records.kept_bytes == kept


def test_beyond_the_bound_records_are_opened_for_each_use(opened: list[str]) -> None:
    device = Cpu()
    device.records = Records(3 * cpu.SEGMENT_KEPT)
    weights = [strategies.make("gaussian", 2 * SEGMENT, seed) for seed in range(2)]
    held = [record_of(part) for part in weights]
    for _ in range(2):
        for part, record in zip(weights, held, strict=True):
            np.testing.assert_array_equal(decoded(device, record, len(part)), part)
    assert opened.count("record") == 3  # the first once, the second twice
    assert 0 < device.records.kept_bytes <= 3 * cpu.SEGMENT_KEPT
    del record
    held.pop(0)
    gc.collect()
    opened.clear()
    for _ in range(2):
        decoded(device, held[0], 2 * SEGMENT)
    assert opened.count("record") == 1


def test_of_memory_that_is_reused_nothing_is_kept(opened: list[str]) -> None:
    device, weights = Cpu(), strategies.make("gaussian", SEGMENT, 5)
    record = record_of(weights)
    for _ in range(2):
        np.testing.assert_array_equal(decoded(device, record, len(weights), kept=False), weights)
    assert opened.count("record") == 2
    assert device.records.kept_bytes == 0


def test_a_known_record_with_another_shape_is_refused() -> None:
    weights = strategies.make("gaussian", SEGMENT, 6)
    record = record_of(weights)
    for _ in range(2):
        operators.decode(record, [len(weights)], SEGMENT)
        with pytest.raises(errors.EntryError, match="does not match its shape"):
            operators.decode(record, [len(weights) - 1], SEGMENT)


def test_many_threads_at_once() -> None:
    device = Cpu()
    weights = [strategies.make("gaussian", 2 * SEGMENT, seed) for seed in range(8)]
    held = [record_of(part) for part in weights]
    with ThreadPoolExecutor(16) as threads:
        turns = [(i % 8, threads.submit(decoded, device, held[i % 8], 2 * SEGMENT)) for i in range(200)]
        for i, turn in turns:
            np.testing.assert_array_equal(turn.result(), weights[i])
    assert device.records.kept_bytes == 16 * cpu.SEGMENT_KEPT
