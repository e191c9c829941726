"""A part of what ``make crash`` tries, and proof that it would find what it looks for."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest

from tests.crash import bits, oracle
from tests.crash.__main__ import world
from tests.crash.broken import DEFECTS
from tests.crash.campaign import Campaign
from tests.crash.disk import after_power_cut
from tests.crash.machine import Call, Fault, lay_out, snapshot
from tests.crash.scenarios import SCENARIOS, World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into calls as Linux lets it")

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
CHECKS = 4
"""Per command: the same ones every time."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("crash")) as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_does_no_harm(name: str, place: World) -> None:
    campaign = Campaign(place, BY_NAME[name])
    checks = list(campaign.checks())
    for check in random.Random(name).sample(checks, CHECKS):
        check()
    assert campaign.tally.violations == []


WHERE = {
    "writes_in_place": ("convert a folder: again", "kill", "a.df11"),
    "does_not_sync_files": ("convert a folder: again", "kill", "a.df11"),
    "does_not_sync_folders": ("convert a folder: new", "kill", "target"),
    "keeps_no_journal": ("convert a folder: again", "kill", "target"),
    "locks_nothing": ("convert a folder", "writers", "a.df11"),
    "ignores_errors": ("convert a file", "fail", "a.df11"),
    "believes_short_writes": ("convert a file", "fail", "a.df11"),
    "leaves_temporary_files": ("convert a folder", "kill", "b.df11"),
    "crashes_on_errors": ("restore a file", "fail", "a.safetensors"),
}
"""For each defect, a command that shows it, the kind of fault, and a part of the names at which to look."""


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect: str, place: World) -> None:
    name, what, part = WHERE[defect]
    campaign = Campaign(place, BY_NAME[name], broken=defect)
    if what == "kill":
        campaign.kill(len(campaign.calls) + 1)
    for call in reversed(campaign.points):
        if campaign.tally.violations:
            break
        if part not in call.path:
            continue
        if what == "kill":
            campaign.kill(call.number)
        elif what == "writers":
            campaign.two_writers(call.number, changed=True)
        else:
            for fault in (Fault("fail", call.number, 5), Fault("short", call.number)):
                campaign.fail(call, fault)
    assert campaign.tally.violations, f"{defect}: nobody noticed"


def test_the_shim_sees_what_is_done(place: World) -> None:
    lay_out(place.root, {"work": None})
    place.put({"source/x.txt": b"not a model"})
    ended = place.machine.run(["convert", "source", "target"])
    assert ended.calls == ()
    assert oracle.bad_end(ended, killed=False) == []
    place.put({"source/x.safetensors": bits.make(place.machine.folder / "x").with_suffix(".safetensors").read_bytes()})
    ended = place.machine.run(["convert", "source/x.safetensors", "x.df11"])
    assert ended.code == 0
    kinds = [call.kind for call in ended.calls]
    assert kinds[0] == "create"
    assert kinds[-3:] == ["fsync", "rename", "fsync"]
    assert after_power_cut({}, ended.calls, str(place.root))[0] == {"x.df11": (place.root / "x.df11").read_bytes()}


def test_what_a_power_cut_leaves() -> None:
    def call(kind: str, path: str, inode: int = 0, offset: int = 0, data: bytes = b"", other: str = "") -> Call:
        return Call(0, kind, True, inode, offset, f"/r/{path}" if path else "/r", f"/r/{other}", data)

    written = [
        call("create", ".x", 1),
        call("write", ".x", 1, 0, b"new"),
        call("fsync", ".x", 1),
        call("write", ".x", 1, 3, b"er"),
        call("rename", ".x", 1, other="x"),
    ]
    before = {"x": b"old"}
    assert after_power_cut(before, written, "/r") == [before, {"x": b"new"}, {"x": b"new\0\0"}]
    assert after_power_cut(before, [*written, call("fsync", "")], "/r")[0] == {"x": b"new"}
    made = [call("mkdir", "d"), call("create", "d/x", 1), call("fsync", "d")]
    assert after_power_cut({}, made, "/r")[0] == {}
    assert after_power_cut({}, [*made, call("fsync", "")], "/r")[0] == {"d": None, "d/x": b""}
    assert after_power_cut(before, [call("unlink", "x")], "/r")[:2] == [before, {}]


def test_each_bit_matters(place: World) -> None:
    container = bits.make(place.machine.folder / "bits")
    flips = bits.flip(container, range(5, 8 * container.stat().st_size, 97))
    assert flips.missed == ()
    assert flips.noticed > 0.98 * flips.bits


def test_a_state_is_set_again(place: World) -> None:
    lay_out(place.root, {"work": None})
    place.put({"a/b": b"1", "c": b"2"})
    place.commit("me/x", {"a": b"1"})
    state = place.state()
    place.put({"a/b": b"3", "d/e": b"4", "c": None})
    place.commit("me/x", {"a": b"2"})
    place.commit("me/y", {"a": b"2"})
    place.set(state)
    assert snapshot(place.root) == {"work": None, "a": None, "a/b": b"1", "c": b"2"}
    assert place.state().heads == state.heads
