"""AtomicWriter: a file has its name only once it is complete, and there is one writer at a time."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from df11.formats import errors
from df11.storage import atomic as writer_module
from df11.storage.atomic import AtomicWriter, temporary_path, write_bytes
from df11.storage.names import is_left_out


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.df11"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_comes_with_commit(target: Path) -> None:
    with AtomicWriter(target) as writer:
        assert names(target.parent) == [".a.df11.partial"]
        writer.write(b"abc")
        assert not target.exists()
        writer.commit()
        assert names(target.parent) == ["a.df11"]
    assert target.read_bytes() == b"abc"
    assert names(target.parent) == ["a.df11"]


def test_without_commit_nothing_is_left(target: Path) -> None:
    target.write_bytes(b"old")
    with AtomicWriter(target) as writer:
        writer.write(b"new")
    assert names(target.parent) == ["a.df11"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), AtomicWriter(target) as writer:
        writer.write(b"new")
        raise error
    assert names(target.parent) == []


def test_commit_replaces(target: Path) -> None:
    target.write_bytes(b"a much longer old file")
    with AtomicWriter(target) as writer:
        writer.write(b"new")
        writer.commit()
    assert target.read_bytes() == b"new"


def test_a_second_writer_is_refused(target: Path) -> None:
    with AtomicWriter(target) as first:
        first.write(b"first")
        with pytest.raises(errors.ConflictError) as caught:
            AtomicWriter(target)
        assert caught.value.file == str(target)
        assert temporary_path(target, "partial").read_bytes() == b"first"
        first.commit()
    assert target.read_bytes() == b"first"
    with AtomicWriter(target) as second:
        second.write(b"second")
        second.commit()
    assert target.read_bytes() == b"second"


def test_writers_of_other_files_do_not_meet(target: Path) -> None:
    with AtomicWriter(target) as first, AtomicWriter(target.with_name("b.df11")) as second:
        first.write(b"1")
        second.write(b"2")
        first.commit()
        second.commit()
    assert names(target.parent) == ["a.df11", "b.df11"]


def test_many_threads_one_winner_at_a_time(target: Path) -> None:
    # Each writes its own letter all over. Whoever wins, the file has only one letter.
    outcomes: list[bool] = []

    def run(letter: bytes) -> None:
        for _ in range(20):
            try:
                with AtomicWriter(target) as writer:
                    for _ in range(10):
                        writer.write(letter * 100)
                    writer.commit()
                outcomes.append(True)
            except errors.ConflictError:
                outcomes.append(False)
            if target.exists():
                content = target.read_bytes()
                assert len(content) == 1000
                assert len(set(content)) == 1

    failures: list[BaseException] = []

    def guarded(letter: bytes) -> None:
        try:
            run(letter)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(outcomes) == 60
    assert any(outcomes)
    assert names(target.parent) == ["a.df11"]


def test_what_a_killed_writer_left_is_overwritten(target: Path) -> None:
    program = (
        "import os, sys; from df11.storage.atomic import AtomicWriter; "
        "writer = AtomicWriter(sys.argv[1]); writer.write(b'x' * 5000); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(target.parent) == [".a.df11.partial"]
    assert temporary_path(target, "partial").stat().st_size == 5000
    with AtomicWriter(target) as writer:
        writer.write(b"new")
        writer.commit()
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["a.df11"]


@given(chunks=st.lists(st.tuples(st.binary(max_size=50), st.none() | st.integers(0, 200)), max_size=8))
def test_bytes_lie_where_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[bytes, int | None]]
) -> None:
    target = tmp_path_factory.mktemp("writes") / "a.df11"
    expected = bytearray()
    with AtomicWriter(target) as writer:
        for data, offset in chunks:
            start = len(expected) if offset is None else offset
            if data:
                expected.extend(bytes(max(0, start + len(data) - len(expected))))
                expected[start : start + len(data)] = data
            else:
                expected.extend(bytes(max(0, start - len(expected))))
            writer.write(data, offset)
            assert writer.position == len(expected)
        writer.commit()
    content = target.read_bytes()
    assert content == expected[: len(content)]
    assert not any(expected[len(content) :])  # Writing no bytes beyond the end does not extend the file.


def test_arrays_are_written_as_bytes(target: Path) -> None:
    with AtomicWriter(target) as writer:
        writer.write(np.arange(3, dtype="<u2"))
        writer.write(np.empty(0, np.uint8))
        writer.write(memoryview(b"end"))
        writer.commit()
    assert target.read_bytes() == b"\0\0\1\0\2\0end"


def test_rewind_drops_the_end(target: Path) -> None:
    with AtomicWriter(target) as writer:
        writer.write(b"0123456789")
        writer.rewind(4)
        assert writer.position == 4
        writer.write(b"ab")
        writer.commit()
    assert target.read_bytes() == b"0123ab"


def test_commit_is_durable(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The data is on disk before the name is, and the name is before commit returns.
    steps: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def renamed(*arguments: Any, **options: Any) -> None:
        steps.append("rename")
        replace(*arguments, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    with AtomicWriter(target) as writer:
        writer.write(b"abc")
        writer.commit()
    assert steps == ["sync file", "rename", "sync folder"]


def test_write_back_starts_early(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 10)
    synced = threading.Event()
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        synced.set()

    monkeypatch.setattr(os, "fsync", fsync)
    with AtomicWriter(target) as writer:
        writer.write(b"123456789")
        assert not synced.wait(0.05)
        writer.write(b"0")
        assert synced.wait(10)
        writer.commit()
    assert target.read_bytes() == b"1234567890"


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, errors.BudgetError),
        (errno.EDQUOT, errors.BudgetError),
        (errno.EFBIG, errors.BudgetError),
        (errno.EACCES, errors.NotAllowedError),
        (errno.EROFS, errors.NotAllowedError),
        (errno.EIO, errors.UsageError),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fails(
    target: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[errors.Df11Error], call: str
) -> None:
    target.write_bytes(b"old")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(error) as caught, AtomicWriter(target) as writer:
        monkeypatch.setattr(os, call, fail)
        writer.write(b"new")
        writer.commit()
    assert caught.value.file == str(target)
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["a.df11"]


def test_early_write_back_that_fails_is_reported(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The error comes once; a later fsync may succeed although data is lost.
    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 10)
    failures = iter([OSError(errno.EIO, "Input/output error")])
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        for failure in failures:
            raise failure
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(errors.UsageError, match="Input/output error"), AtomicWriter(target) as writer:
        for _ in range(50):
            writer.write(b"0123456789")
            threading.Event().wait(0.002)
        writer.commit()
    assert names(target.parent) == []


def test_short_writes_go_on(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: honest(descriptor, data[:3], offset))
    with AtomicWriter(target) as writer:
        writer.write(b"0123456789")
        writer.commit()
    assert target.read_bytes() == b"0123456789"


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingError) as caught:
        AtomicWriter(tmp_path / "missing" / "a.df11")
    assert caught.value.file == str(tmp_path / "missing")
    for _ in range(2):
        write_bytes(tmp_path / "missing" / "deep" / "a.df11", b"x", root=tmp_path / "missing")
    assert (tmp_path / "missing" / "deep" / "a.df11").read_bytes() == b"x"


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.Df11Error):
        AtomicWriter(tmp_path / "file" / "sub" / "a.df11", root=tmp_path)
    with pytest.raises(errors.Df11Error):
        AtomicWriter(tmp_path / "file" / "a.df11")


def test_a_folder_in_the_way_of_the_file(target: Path) -> None:
    target.mkdir()
    with pytest.raises(errors.UsageError), AtomicWriter(target) as writer:
        writer.write(b"abc")
        writer.commit()
    assert names(target.parent) == ["a.df11"]
    assert target.is_dir()


# Permissions, names, links.


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(getattr(request, "param", 0o022))
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize(
    ("mode", "umask", "expected"),
    [
        (0o600, 0o022, 0o600),
        (0o644, 0o022, 0o644),
        (0o640, 0o022, 0o640),
        (0o666, 0o022, 0o644),
        (0o666, 0o002, 0o664),
        (0o755, 0o022, 0o644),
        (0o400, 0o022, 0o600),
        (0o644, 0o077, 0o600),
    ],
    indirect=["umask"],
)
@pytest.mark.parametrize("left", [None, 0o600, 0o666])
@pytest.mark.usefixtures("umask")
def test_no_more_is_allowed_than_for_the_source(target: Path, mode: int, expected: int, left: int | None) -> None:
    partial = temporary_path(target, "partial")
    allowed = mode & 0o066 | 0o600
    if left is not None:  # Left by a killed writer of another source.
        partial.write_bytes(b"left")
        partial.chmod(left)
    with AtomicWriter(target, mode=mode) as writer:
        assert mode_of(partial) & ~allowed == 0  # From the first byte on.
        writer.write(b"abc")
        writer.commit()
    assert mode_of(target) == {None: expected, 0o600: 0o600, 0o666: allowed}[left]


@pytest.mark.usefixtures("umask")
def test_a_new_file_is_as_any_other(target: Path) -> None:
    with AtomicWriter(target) as writer:
        writer.commit()
    assert mode_of(target) == 0o644
    write_bytes(target.with_name("b"), b"1", mode=0o640)
    assert mode_of(target.with_name("b")) == 0o640


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_permissions(target: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    temporary_path(target, "partial").touch(0o666)
    temporary_path(target, "partial").chmod(0o666)
    monkeypatch.setattr(os, "fchmod", failing(number))
    with AtomicWriter(target, mode=0o600) as writer:
        writer.write(b"abc")
        writer.commit()
    assert target.read_bytes() == b"abc"


def test_a_file_that_somebody_else_can_read_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = temporary_path(target, "partial")
    partial.touch()
    partial.chmod(0o666)
    monkeypatch.setattr(os, "fchmod", failing(errno.EPERM))  # As it is theirs.
    with pytest.raises(errors.NotAllowedError) as caught:
        AtomicWriter(target, mode=0o600)
    assert caught.value.file == str(target)
    assert not names(target.parent)  # It was this user's own, and empty.


def failing(number: int) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    return fail


LONG = ["x" * 250 + ".df11", "é" * 125 + ".df11", *("y" * size for size in range(225, 256, 3)), "重" * 85]


@pytest.mark.parametrize("name", LONG)
def test_long_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert 225 <= len(os.fsencode(name)) <= 255
    for kind in ("partial", "download"):
        temporary = temporary_path(path, kind)
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(f".{kind}")
        assert is_left_out(temporary.name)
        assert temporary_path(path, kind) == temporary
        assert temporary != temporary_path(path.with_name(name[:-1] + "z"), kind)
    with AtomicWriter(path) as writer:
        with pytest.raises(errors.ConflictError):
            AtomicWriter(path)
        writer.write(b"abc")
        writer.commit()
    assert names(tmp_path) == [name]
    assert path.read_bytes() == b"abc"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError) as caught, AtomicWriter(tmp_path / ("x" * 256)) as writer:
        writer.commit()
    assert caught.value.file == str(tmp_path / ("x" * 256))
    assert names(tmp_path) == []


def test_short_names_are_kept() -> None:
    assert temporary_path("/a/b.df11", "partial") == Path("/a/.b.df11.partial")
    assert temporary_path("b.df11", "download") == Path(".b.df11.download")


def test_a_link_under_the_temporary_name_is_refused(target: Path) -> None:
    mine = target.with_name("mine")
    mine.write_bytes(b"mine")
    mine.chmod(0o640)
    partial = temporary_path(target, "partial")
    for leads_to in (mine, target.with_name("gone")):
        partial.symlink_to(leads_to)
        with pytest.raises(errors.UsageError) as caught:
            AtomicWriter(target)
        assert caught.value.file == str(partial)
        assert partial.is_symlink()
        partial.unlink()
    assert (mine.read_bytes(), mode_of(mine)) == (b"mine", 0o640)
    assert names(target.parent) == ["mine"]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_something_else_under_the_temporary_name_is_refused(target: Path, kind: str) -> None:
    partial = temporary_path(target, "partial")
    partial.mkdir() if kind == "folder" else os.mkfifo(partial)
    with pytest.raises(errors.UsageError) as caught:
        AtomicWriter(target)
    assert caught.value.file == str(partial)
    assert partial.is_dir() == (kind == "folder")


# Folders that cannot be made durable.


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced(target: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder_call(target.parent, monkeypatch, number)
    with AtomicWriter(target) as writer:
        writer.write(b"abc")
        writer.commit()
    assert target.read_bytes() == b"abc"
    assert names(target.parent) == ["a.df11"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_that_fails_is_an_error(target: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder_call(target.parent, monkeypatch, number)
    with pytest.raises(errors.Df11Error, match=os.strerror(number)) as caught, AtomicWriter(target) as writer:
        writer.write(b"abc")
        writer.commit()
    assert caught.value.file == str(target)


def folder_call(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let fsync fail for this folder."""
    honest, it = os.fsync, folder.stat().st_ino

    def replaced(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == it:
            raise OSError(number, os.strerror(number))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", replaced)


def test_small_files(tmp_path: Path) -> None:
    for data in (b"1", b"2"):
        write_bytes(tmp_path / "new" / "deep" / "x", data, root=tmp_path / "new")
    assert (tmp_path / "new" / "deep" / "x").read_bytes() == b"2"
    assert names(tmp_path / "new" / "deep") == ["x"]
