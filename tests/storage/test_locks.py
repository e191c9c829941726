"""Locks on a file system without any: a link stands in for the lock, and an abandoned one is taken over."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from df11.formats import errors
from df11.storage.atomic import AtomicWriter, Lock, temporary_path
from df11.storage.names import is_left_out

NUMBERS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK]


def no_flock(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(params=NUMBERS, ids=map(errno.errorcode.get, NUMBERS))
def target(request, tmp_path, monkeypatch) -> Path:
    """A path on a file system without locks."""
    monkeypatch.setattr(fcntl, "flock", no_flock(request.param))
    return tmp_path / "a.df11"


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def beside(target: Path) -> Path:
    """The link that stands in for the lock."""
    partial = temporary_path(target, "partial")
    return partial.with_name(partial.name + ".lock")


def write(target: Path, data: bytes) -> None:
    with AtomicWriter(target) as writer:
        writer.write(data)
        writer.commit()


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_it_works_and_leaves_nothing(target):
    with AtomicWriter(target) as writer:
        assert names(target) == [".a.df11.partial", ".a.df11.partial.lock"]
        assert all(map(is_left_out, names(target)))
        assert str(beside(target).readlink()) == f"{os.uname().nodename} {os.getpid()}"
        writer.write(b"abc")
        writer.commit()
    assert target.read_bytes() == b"abc"
    assert names(target) == ["a.df11"]
    with AtomicWriter(target) as writer:
        writer.write(b"not committed")
    assert names(target) == ["a.df11"]
    with pytest.raises(KeyboardInterrupt), AtomicWriter(target):
        raise KeyboardInterrupt
    assert names(target) == ["a.df11"]
    write(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_second_writer_is_told_of_the_file(target):
    with AtomicWriter(target) as first:
        first.write(b"first")
        for _ in range(2):
            with pytest.raises(errors.ConflictError, match="another process is writing") as caught:
                AtomicWriter(target)
            assert caught.value.file == str(target)
            assert str(beside(target)) in caught.value.hint
            assert "remove" in caught.value.hint
        assert temporary_path(target, "partial").read_bytes() == b"first"
        first.commit()
    assert target.read_bytes() == b"first"
    assert names(target) == ["a.df11"]
    write(target, b"second")


def test_with_locks_no_file_is_spoken_of(tmp_path):
    with AtomicWriter(tmp_path / "a.df11"):
        assert names(tmp_path / "a.df11") == [".a.df11.partial"]
        with pytest.raises(errors.ConflictError) as caught:
            AtomicWriter(tmp_path / "a.df11")
    assert "remove" not in caught.value.hint


def test_that_of_a_dead_process_is_taken_over(target, dead):
    beside(target).symlink_to(f"{os.uname().nodename} {dead}")
    temporary_path(target, "partial").write_bytes(b"left")
    write(target, b"abc")
    assert target.read_bytes() == b"abc"
    assert names(target) == ["a.df11"]


def test_what_a_killed_writer_left_is_taken_over(target):
    program = (
        "import errno, fcntl, os, sys; from df11.storage.atomic import AtomicWriter\n"
        "def flock(*_): raise OSError(errno.ENOLCK, '')\n"
        "fcntl.flock = flock\n"
        "writer = AtomicWriter(sys.argv[1]); writer.write(b'x' * 5000); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(target) == [".a.df11.partial", ".a.df11.partial.lock"]
    write(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(target) == ["a.df11"]


def test_only_one_of_those_who_see_it_takes_it_over(target, dead, monkeypatch):
    # Between our look and our removal, another process took it over and is writing.
    beside(target).symlink_to(f"{os.uname().nodename} {dead}")
    honest, others = os.kill, []

    def kill(process, number):
        if not others:
            others.append(None)
            others[0] = AtomicWriter(target)
        honest(process, number)

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(errors.ConflictError):
        AtomicWriter(target)
    monkeypatch.setattr(os, "kill", honest)
    with others[0] as other:
        assert str(beside(target).readlink()) == f"{os.uname().nodename} {os.getpid()}"
        with pytest.raises(errors.ConflictError):
            AtomicWriter(target)
        other.write(b"abc")
        other.commit()
    assert target.read_bytes() == b"abc"
    assert names(target) == ["a.df11"]


def test_while_another_takes_it_over_it_is_held(target, dead):
    beside(target).symlink_to(f"{os.uname().nodename} {dead}")
    taken = beside(target).with_name(f"{beside(target).name}.{dead}")
    assert is_left_out(taken.name)
    taken.touch()
    with pytest.raises(errors.ConflictError):
        AtomicWriter(target)
    assert os.path.lexists(beside(target))
    taken.unlink()
    write(target, b"abc")
    assert names(target) == ["a.df11"]


def test_that_of_a_living_process_is_not(target):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        for living in (process.pid, os.getpid(), os.getppid()):
            held = f"{os.uname().nodename} {living}"
            beside(target).unlink(missing_ok=True)
            beside(target).symlink_to(held)
            with pytest.raises(errors.ConflictError):
                AtomicWriter(target)
            assert str(beside(target).readlink()) == held
        process.communicate(b"\n")


@pytest.mark.parametrize(
    "text",
    [
        b"elsewhere {dead}",
        b"{host}x {dead}",
        b"{host}",
        b"{host} ",
        b"{host} -{dead}",
        b"{host} {dead} ",
        b"{host} 0x1",
        b"{host} 99999999999999999999999",
        b"{host} \xc2\xb2",
        b"",
        b"\xff\xfe",
        b"\0" * 1000,
    ],
)
def test_that_of_who_knows_whom_is_not(text, target, dead):
    text = text.replace(b"{host}", os.uname().nodename.encode()).replace(b"{dead}", b"%d" % dead)
    beside(target).write_bytes(text)
    with pytest.raises(errors.ConflictError) as caught:
        AtomicWriter(target)
    assert str(beside(target)) in caught.value.hint
    assert beside(target).read_bytes() == text
    beside(target).unlink()  # As the hint says.
    write(target, b"abc")
    assert names(target) == ["a.df11"]


@pytest.mark.parametrize("leads_to", ["mine", "gone"])
def test_a_link_in_its_place_is_not_followed(leads_to, target):
    target.with_name("mine").write_bytes(b"mine")
    beside(target).symlink_to(leads_to)
    with pytest.raises(errors.ConflictError) as caught:
        AtomicWriter(target)
    assert str(beside(target)) in caught.value.hint
    assert beside(target).is_symlink()
    assert target.with_name("mine").read_bytes() == b"mine"
    assert not target.with_name("gone").exists()


@pytest.mark.parametrize("size", [*range(225, 256, 3)])
def test_long_names(size, target, dead):
    path = target.with_name("x" * size)
    write(path, b"abc")
    with AtomicWriter(path) as first, pytest.raises(errors.ConflictError):
        first.write(b"other")
        AtomicWriter(path)
    assert path.read_bytes() == b"abc"
    beside(path).symlink_to(f"{os.uname().nodename} {dead}")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path) == [path.name]


def test_another_error_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.EIO))
    with pytest.raises(errors.UsageError, match=os.strerror(errno.EIO)) as caught:
        AtomicWriter(tmp_path / "a.df11")
    assert caught.value.file == str(tmp_path / "a.df11")
    assert not any(tmp_path.iterdir())


def test_without_the_module_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(errors.UsageError, match="Windows"):
        AtomicWriter(tmp_path / "a.df11")
    assert not any(tmp_path.iterdir())


def test_the_lock_alone(target):
    target.write_bytes(b"data")
    with target.open("rb") as file, target.open("rb") as other:
        lock = Lock(file, target)
        with pytest.raises(BlockingIOError):
            Lock(other, target)
        lock.close()
        lock.close()
        Lock(other, target).close()
    assert names(target) == ["a.df11"]
