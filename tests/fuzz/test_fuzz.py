"""Every input that ever failed, and a short walk through edited ones; `make fuzz` takes longer ones, with a fuzzer."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import pytest

from df11.formats import errors
from tests.fuzz import batches, oracle, registry, tally
from tests.fuzz.oracle import Fault, Target

TARGETS = pytest.mark.parametrize("target", registry.TARGETS.values(), ids=registry.TARGETS)
PROGRAMS = pytest.mark.parametrize("program", registry.PROGRAMS.values(), ids=registry.PROGRAMS)
FILES = [(name, path) for name in registry.TARGETS for path in registry.corpus(name)]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Sources in which nothing can be compressed are nothing special here."""
    caplog.set_level(logging.ERROR, logger="df11")


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    files = [path for path in registry.CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert {path.parent.name for path in files} <= {*registry.TARGETS, *registry.PROGRAMS}
    assert not [path for path in files if path.name.startswith(registry.FAILING)], "name them for what they are"


@pytest.mark.parametrize(("name", "path"), FILES, ids=[f"{name}-{path.name}" for name, path in FILES])
def test_what_once_failed(name: str, path: Path) -> None:
    oracle.judge(registry.TARGETS[name].act, path.read_bytes())


@TARGETS
def test_seeds_are_accepted(target: Target) -> None:
    assert all(oracle.judge(target.act, seed).accepted for seed in target.seeds())


@TARGETS
def test_edited_inputs(target: Target) -> None:
    found = tally.wander(target, Random(target.name), 120)
    accepted = sum(accepted for _, accepted in found)
    assert 1 < accepted < len(found)  # Edits that all fail, or none, would test little.


@PROGRAMS
def test_kernels(program: object) -> None:
    assert isinstance(program, batches.Program)
    inputs = [path.read_bytes() for path in registry.corpus(program.name)]
    assert program.run([*inputs, *program.seeds(), *batches.batch(program, Random(program.name), 150)]) == []


# The oracle itself.


def refuse(message: str) -> oracle.Act:
    def act(_: bytes) -> None:
        error = errors.UsageError("wrong")
        error.__class__ = type("Loud", (errors.UsageError,), {"__str__": lambda _: message})
        raise error

    return act


def crash(_: bytes) -> None:
    raise ValueError("not ours")


def take_memory(_: bytes) -> None:
    bytearray(oracle.MOST_MEMORY + (50 << 20))[:: 1 << 12] = bytes((oracle.MOST_MEMORY >> 12) + (50 << 8))


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (crash, r"ValueError at test_fuzz.py:\d+: not ours"),
        (take_memory, "it took 3"),
        (refuse("a\nb"), "not one printable line"),
        (refuse("\x1b[31m"), "not one printable line"),
        (refuse("x" * 3000), "3000 characters"),
        (refuse("malloc of size 17179869184 failed"), "asked for more memory"),
    ],
    ids=["exception", "memory", "lines", "control", "long", "refused-memory"],
)
def test_the_oracle_sees(act: oracle.Act, what: str) -> None:
    with pytest.raises(Fault, match=what):
        oracle.judge(act, b"x")


def test_the_oracle_sees_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "MOST_SECONDS", 0.01)
    with pytest.raises(Fault, match="it took"):
        oracle.judge(lambda _: [sum(range(1000)) for _ in range(3000)] and None, b"x")
    assert oracle.judge(lambda _: None, b"x").accepted
