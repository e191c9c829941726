"""The journal of a run: one at a time, and what a killed one has written is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from df11.formats import errors
from df11.storage.journal import FILE_NAME, Journal, Mark, Run, append, read
from df11.storage.names import is_left_out

RUN = Run("convert", "/models/a b\udcff")
MARKS = (
    Mark("a.df11", 5, "ab" * 32, "source"),
    Mark("b c/\n%20.json", 7, "cd" * 32, "content"),
    Mark("\udcff.txt", 0, "ef" * 32, "content"),
)


def opened(folder: Path, *begun: str) -> Journal:
    journal = Journal(folder)
    journal.open()
    journal.begin(RUN, (Mark.begun(name) for name in begun))
    return journal


def test_what_is_written_is_read(tmp_path: Path) -> None:
    journal = opened(tmp_path / "new" / "folder", "a.df11")
    append(journal.path, MARKS)
    append(journal.path, [Mark("a.df11", 6, "00" * 32, "source")])
    wanted = {mark.name: (mark,) for mark in MARKS}
    wanted["a.df11"] = (Mark.begun("a.df11"), MARKS[0], Mark("a.df11", 6, "00" * 32, "source"))
    assert journal.left(RUN) == wanted
    journal.close(is_done=False)
    assert Journal(tmp_path / "new" / "folder").left(RUN) == wanted


def test_it_goes_when_all_is_done(tmp_path: Path) -> None:
    journal = opened(tmp_path, "a")
    append(journal.path, MARKS)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    journal.close(is_done=True)
    assert list(tmp_path.iterdir()) == []
    assert Journal(tmp_path).left(RUN) == {}


def test_it_goes_if_nothing_was_named(tmp_path: Path) -> None:
    opened(tmp_path, "a", "b").close(is_done=False)
    assert list(tmp_path.iterdir()) == []
    journal = opened(tmp_path, "a")
    append(journal.path, MARKS)
    journal.close(is_done=False)
    opened(tmp_path, "a").close(is_done=False)  # That which another run has named is still to be known.
    assert set(Journal(tmp_path).left(RUN)) == {"a", *(mark.name for mark in MARKS)}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    with pytest.raises(errors.ConflictError, match="another df11 is writing to this folder"):
        Journal(tmp_path).open()
    assert journal.path.exists()
    journal.close(is_done=True)
    opened(tmp_path).close(is_done=True)


def test_torn_lines_are_skipped(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    append(journal.path, MARKS[:1])
    whole = journal.path.read_bytes()
    for torn in (b"\0\0\0", b"content 5 abc", b"content x y z\n", b"x 5 ab x\n", b"content 1\n", b"\xff" * 9 + b"\n"):
        journal.path.write_bytes(whole + torn)
        append(journal.path, MARKS[1:2])
        assert read(journal.path) == (RUN, {mark.name: (mark,) for mark in MARKS[:2]})
    journal.close(is_done=True)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ".", "a//b", ""])
def test_names_that_lead_out_are_skipped(name: str, tmp_path: Path) -> None:
    journal = opened(tmp_path)
    append(journal.path, [Mark(name, 1, "ab" * 32, "content")])
    assert journal.left(RUN) == {}
    journal.close(is_done=True)


@pytest.mark.parametrize("other", [Run("restore", RUN.source), Run("convert", "/models/b"), Run("", "")])
def test_a_run_that_does_something_else_may_not_take_it(other: Run, tmp_path: Path) -> None:
    journal = opened(tmp_path)
    append(journal.path, MARKS)
    journal.close(is_done=False)
    whole = journal.path.read_bytes()
    for refused in (journal.left, lambda run: journal.begin(run, MARKS)):
        journal.open()
        with pytest.raises(errors.ConflictError, match="has not ended here: convert of '/models/a b") as caught:
            refused(other)
        journal.close(is_done=False)
        assert caught.value.file == str(tmp_path)
        assert journal.path.read_bytes() == whole
    assert set(journal.left(RUN)) == {mark.name for mark in MARKS}


def test_a_first_line_that_is_torn_says_nothing(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    append(journal.path, MARKS)
    whole = journal.path.read_bytes()
    end = len(b"\n" + RUN.line.encode()) - 1  # Without its end, which the next line begins with, too.
    for size in range(end):
        journal.path.write_bytes(whole[:size] + whole[end:])
        assert read(journal.path) == (None, {})
        journal.path.write_bytes(whole[:size])
        append(journal.path, [Run("restore", "x"), MARKS[0]])
        assert read(journal.path) == (Run("restore", "x"), {MARKS[0].name: (MARKS[0],)})
    journal.close(is_done=True)


def test_what_somebody_has_put_there_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"content 1 ab x\n")
    (tmp_path / FILE_NAME).symlink_to("mine")
    with pytest.raises(errors.UsageError, match=FILE_NAME):
        Journal(tmp_path).open()
    assert Journal(tmp_path).left(RUN) == {}
    assert (tmp_path / "mine").read_bytes() == b"content 1 ab x\n"


def test_it_is_no_file_of_a_model() -> None:
    assert is_left_out(f"sub/{FILE_NAME}")
    assert is_left_out(f"{FILE_NAME}.lock.123")
    assert not is_left_out("df11-run")
