"""Continue after a run that ended in any way: keep what is finished, replace nothing unasked, leave no partial file."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

import df11
from df11.formats import errors
from df11.storage.atomic import AtomicWriter
from tests.support import commands, sources
from tests.support.sources import bf16, f32, tree_bytes


@pytest.fixture
def source(tmp_path):
    """A source, and its name for a container."""
    return sources.write(tmp_path / "x.safetensors", [bf16("a", (150, 100)), f32("b", (500,), 1)])


def stamp(path):
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def convert(*arguments, **options):
    (file,) = df11.convert(*arguments, **options).files
    return file


# Finished outputs.


def test_a_finished_output_is_skipped(source, tmp_path):
    target = tmp_path / "x.df11"
    first = convert(source, target)
    before = stamp(target)
    again = convert(source, target)
    assert (first.status, again.status) == ("converted", "skipped")
    assert stamp(target) == before
    assert (again.output_bytes, again.source_sha256, again.tensors) == (
        first.output_bytes,
        first.source_sha256,
        first.tensors,
    )


@pytest.mark.parametrize("cast", [None, "bf16"])
@pytest.mark.parametrize("how", ["damaged", "planted"])
def test_a_finished_output_must_hold_the_source(how, cast, tmp_path):
    source, target = tmp_path / "x.safetensors", tmp_path / "x.df11"
    sources.write(source, [bf16("a", (300, 100)), f32("b", (300, 100), 1)])
    convert(source, target, cast=cast)
    good = target.read_bytes()
    if how == "damaged":
        bad = bytearray(good)
        bad[-5000] ^= 1
    else:  # Sound, and of the same size, but for its hash: it is of another file.
        sources.write(tmp_path / "y.safetensors", [bf16("a", (300, 100)), f32("b", (300, 100), 2)])
        convert(tmp_path / "y.safetensors", tmp_path / "y.df11", cast=cast)
        theirs, mine = (sources.sha256(tmp_path / f"{name}.safetensors").encode() for name in "yx")
        bad = bytearray((tmp_path / "y.df11").read_bytes().replace(theirs, mine))
        assert mine in bad
    target.write_bytes(bad)
    assert convert(source, target, cast=cast).status == "converted"
    assert target.read_bytes() == good
    assert convert(source, target, cast=cast).status == "skipped"


def test_a_source_that_was_only_touched_is_skipped(source, tmp_path):
    convert(source, tmp_path / "x.df11")
    os.utime(source, (1, 1))
    assert convert(source, tmp_path / "x.df11").status == "skipped"


def test_a_source_that_changed_needs_force(source, tmp_path):
    target = tmp_path / "x.df11"
    convert(source, target)
    before = target.read_bytes()
    data = bytearray(source.read_bytes())
    data[-5] ^= 1  # The same size, and the same times.
    times = source.stat()
    source.write_bytes(data)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    commands.run("convert", source, target).error(2, target, "--force")
    assert target.read_bytes() == before
    assert commands.run("convert", source, target, "--force", "--json").fine().events[0]["status"] == "converted"
    assert df11.verify(target, source).compared
    assert set(tree_bytes(tmp_path)) == {"x.safetensors", "x.df11"}


def test_another_cast_needs_force(source, tmp_path):
    target = tmp_path / "x.df11"
    convert(source, target)
    commands.run("convert", source, target, "--cast", "bf16").error(2, target, "--force")
    assert convert(source, target, cast="bf16", force=True).cast_tensors == 1
    commands.run("convert", source, target).error(2, target, "--force")
    assert convert(source, target, cast="bf16").status == "skipped"


def test_a_cast_with_nothing_to_cast_changes_nothing(tmp_path):
    source, target = sources.write(tmp_path / "x.safetensors", [bf16("a", (900,))]), tmp_path / "x.df11"
    convert(source, target)
    before = target.read_bytes()
    assert convert(source, target, cast="bf16").status == "skipped"
    assert convert(source, target, cast="bf16", resume=False, force=True).status == "converted"
    assert target.read_bytes() == before
    assert convert(source, target).status == "skipped"


def test_what_is_right_is_converted_again_only_if_nothing_is_to_be_kept(source, tmp_path):
    target = tmp_path / "x.df11"
    convert(source, target)
    before = target.read_bytes(), stamp(target)
    assert convert(source, target, force=True).status == "skipped"
    assert stamp(target) == before[1]
    assert convert(source, target, resume=False, force=True).status == "converted"
    assert target.read_bytes() == before[0]
    assert stamp(target) != before[1]


def test_without_resume_nothing_is_skipped(source, tmp_path):
    target = tmp_path / "x.df11"
    assert convert(source, target, resume=False).status == "converted"
    before = stamp(target)
    commands.run("convert", source, target, "--no-resume").error(2, target, "--force")
    assert stamp(target) == before
    assert convert(source, target, resume=False, force=True).status == "converted"
    assert stamp(target) != before


@pytest.mark.parametrize("content", ["nothing", "text", "truncated", "another container", "a safetensors file"])
def test_another_file_at_the_target_is_only_replaced_by_force(content, source, tmp_path):
    target = tmp_path / "x.df11"
    convert(source, target)
    right = target.read_bytes()
    other = sources.write(tmp_path / "other.safetensors", [bf16("z", (500,))])
    convert(other, tmp_path / "other.df11")
    wrong = {
        "nothing": b"",
        "text": b"my notes\n" * 100,
        "truncated": right[:-1],
        "another container": (tmp_path / "other.df11").read_bytes(),
        "a safetensors file": other.read_bytes(),
    }[content]
    target.write_bytes(wrong)
    commands.run("convert", source, target).error(2, target, "--force")
    assert target.read_bytes() == wrong
    commands.run("convert", source, target, "--force").fine()
    assert target.read_bytes() == right


def test_a_tree_goes_on_with_what_is_missing(tmp_path):
    for index in range(4):
        sources.write(tmp_path / "model" / f"{index}.safetensors", [bf16("w", (3000,), index)])
    (tmp_path / "model" / "config.json").write_text("{}")
    df11.convert(tmp_path / "model", tmp_path / "out")
    whole = tree_bytes(tmp_path / "out")
    for name in ("1.df11", "3.df11", "config.json"):
        (tmp_path / "out" / name).unlink()
    before = stamp(tmp_path / "out" / "0.df11")
    report = df11.convert(tmp_path / "model", tmp_path / "out")
    assert [file.status for file in report.files] == ["skipped", "converted", "skipped", "converted"]
    assert tree_bytes(tmp_path / "out") == whole
    assert stamp(tmp_path / "out" / "0.df11") == before


def test_what_a_killed_run_left_is_overwritten(source, tmp_path):
    convert(source, tmp_path / "fresh.df11")
    (tmp_path / ".x.df11.partial").write_bytes(b"\xff" * 100_000)
    assert convert(source, tmp_path / "x.df11").status == "converted"
    assert (tmp_path / "x.df11").read_bytes() == (tmp_path / "fresh.df11").read_bytes()
    assert not (tmp_path / ".x.df11.partial").exists()


# A dry run.


def test_a_dry_run_writes_nothing(tmp_path):
    for name in ("a", "sub/b"):
        sources.write(tmp_path / "model" / f"{name}.safetensors", [bf16("w", (3000,))])
    (tmp_path / "model" / "config.json").write_text("{}")
    before = tree_bytes(tmp_path)
    result = commands.run("convert", tmp_path / "model", tmp_path / "out", "--dry-run").fine()
    assert tree_bytes(tmp_path) == before
    assert not (tmp_path / "out").exists()
    lines = result.out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("a", "sub/b"), strict=True):
        assert str(tmp_path / "model" / f"{name}.safetensors") in line
        assert str(tmp_path / "out" / f"{name}.df11") in line
    *files, done = commands.run("convert", tmp_path / "model", tmp_path / "out", "--dry-run", "--json").fine().events
    assert [(file["status"], file["output_bytes"], file["source_sha256"]) for file in files] == [
        ("planned", None, None)
    ] * 2
    assert (done["event"], done["files"], done["output_bytes"], done["copied"]) == ("done", 2, 0, 1)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_finds_unusable_sources(tmp_path):
    sources.write(tmp_path / "model" / "a.safetensors", [bf16("w", (3000,))])
    (tmp_path / "model" / "b.safetensors").write_bytes(b"no")
    commands.run("convert", tmp_path / "model", tmp_path / "out", "--dry-run").error(2, "b.safetensors")


# Ended from outside. The file is large enough for a signal to arrive during the conversion.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A source of 200 MB, its container, and the container's hash."""
    folder = tmp_path_factory.mktemp("large")
    source = sources.write_large(folder / "x.safetensors", "BF16", 200_000_000)
    df11.convert(source, folder / "x.df11")
    digest = sources.sha256(folder / "x.df11")
    (folder / "x.df11").unlink()
    yield source, digest
    source.unlink()


def start_and_stop(partial, *arguments, again=lambda: None) -> subprocess.Popen[str]:
    """Start ``df11``, and stop it once it has written some output. A signal then arrives while it is working.

    ``again``: prepares another try.
    """
    for _ in range(20):
        process = commands.start(*arguments, "--jobs", 1)
        commands.wait_until(lambda: partial.exists() and partial.stat().st_size > 4_000_000, process)
        process.send_signal(signal.SIGSTOP)
        if (
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code == os.CLD_STOPPED
            and partial.exists()
        ):
            return process
        # On a busy machine, the command may have ended before. Its output is then the first one again.
        process.send_signal(signal.SIGCONT)
        commands.finish(process).fine()
        partial.with_name(partial.name.removeprefix(".").removesuffix(".partial")).unlink()
        again()
    raise AssertionError("the command always ended before it could be stopped")


def interrupt(process, number) -> None:
    """Send a signal to a stopped process, and let it continue."""
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)


def start_conversion(source, target) -> subprocess.Popen[str]:
    """A conversion, stopped while it works."""
    return start_and_stop(target.with_name(f".{target.name}.partial"), "convert", source, target)


def check_and_remove(target, digest) -> None:
    """Check that the only file in the folder is the right container; remove it, as it is large."""
    assert sources.sha256(target) == digest
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    target.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_and_the_same_command_goes_on(number, large, tmp_path):
    source, digest = large
    target = tmp_path / "x.df11"
    process = start_conversion(source, target)
    interrupt(process, number)
    commands.finish(process).error(130, "interrupted", "again")
    assert list(tmp_path.iterdir()) == []
    commands.run("convert", source, target).fine()
    check_and_remove(target, digest)


def test_an_interrupt_keeps_what_was_there(large, tmp_path):
    source, _ = large
    target = tmp_path / "x.df11"
    target.write_bytes(b"mine")
    process = start_and_stop(
        tmp_path / ".x.df11.partial", "convert", source, target, "--force", again=lambda: target.write_bytes(b"mine")
    )
    interrupt(process, signal.SIGTERM)
    commands.finish(process).error(130)
    assert tree_bytes(tmp_path) == {"x.df11": b"mine"}


def test_a_kill_leaves_no_final_file_and_the_same_command_goes_on(large, tmp_path):
    source, digest = large
    target = tmp_path / "x.df11"
    process = start_conversion(source, target)
    process.kill()
    assert commands.finish(process).code == -signal.SIGKILL
    assert not target.exists()
    commands.run("convert", source, target).fine()
    check_and_remove(target, digest)


def test_an_interrupt_of_a_restore_leaves_nothing(large, tmp_path):
    source, _ = large
    container, target = tmp_path / "x.df11", tmp_path / "back" / "y.safetensors"
    df11.convert(source, container, verify=False)
    partial = target.with_name(f".{target.name}.partial")
    process = start_and_stop(partial, "restore", container, target)
    interrupt(process, signal.SIGTERM)
    commands.finish(process).error(130)
    assert list(target.parent.iterdir()) == []
    container.unlink()


# Two at once.


def test_two_processes_on_one_target(large, tmp_path):
    source, digest = large
    target = tmp_path / "x.df11"
    both = [commands.start("convert", source, target, "--json") for _ in range(2)]
    results = [commands.finish(process) for process in both]
    codes = sorted(result.code for result in results)
    assert codes in ([0, 7], [0, 0]), results
    for result in results:
        if result.code == 7:
            result.error(7, target)
        else:
            assert result.events[0]["status"] in ("converted", "skipped")
    check_and_remove(target, digest)


def test_a_target_that_somebody_writes_is_a_conflict(source, tmp_path):
    target = tmp_path / "x.df11"
    with AtomicWriter(target) as writer:
        writer.write(b"work in progress")
        commands.run_process("convert", source, target).error(7, target)
        commands.run_process("convert", source, target, "--force").error(7, target)
        assert (tmp_path / ".x.df11.partial").read_bytes() == b"work in progress"
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}
    commands.run("convert", source, target).fine()


def test_a_target_that_appears_meanwhile_is_a_conflict(source, tmp_path):
    target = tmp_path / "x.df11"

    def appear(_):
        target.write_bytes(b"theirs")

    with pytest.raises(errors.ConflictError) as caught:
        df11.convert(source, target, on_progress=appear)
    assert caught.value.exit_code == 7
    assert tree_bytes(tmp_path)["x.df11"] == b"theirs"
    assert set(tree_bytes(tmp_path)) == {"x.safetensors", "x.df11"}


def test_an_error_of_the_caller_leaves_nothing(source, tmp_path):
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        df11.convert(source, tmp_path / "out" / "x.df11", on_progress=fail)
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


@pytest.mark.parametrize("pause", [0.0, 0.005, 0.03])
def test_two_signals_do_no_harm(pause, large, tmp_path):
    # As some CI systems send them, and impatient people.
    source, digest = large
    target = tmp_path / "x.df11"
    process = start_conversion(source, target)
    interrupt(process, signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    assert commands.finish(process).code == 130
    assert not target.exists()
    if not pause:
        commands.run("convert", source, target).fine()
        check_and_remove(target, digest)
