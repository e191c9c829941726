"""The command line: standard output, text for people, exit codes, entry points, and the cost of an import."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading

import pytest

import df11
from tests.support import commands, sources
from tests.support.sources import bf16, f32, random_tensor, tree_bytes


@pytest.fixture
def model(tmp_path):
    """A folder with two shards and another file."""
    sources.write(tmp_path / "model" / "a.safetensors", [bf16("a", (150, 100)), random_tensor("b", "I64", (3,))])
    sources.write(tmp_path / "model" / "sub" / "b.safetensors", [f32("c", (500,), 1), f32("d", (700,), 2, exact=True)])
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


# Standard output: data, in the documented form.

FILE_MEMBERS = {"event", "source", "output", "source_bytes", "output_bytes", "source_sha256", "tensors", "status"}
DONE_MEMBERS = {"event", "files", "source_bytes", "output_bytes", "ratio", "seconds"}
MORE_FILE_MEMBERS = {"cast_tensors", "exact_tensors", "f32_tensors"}
MORE_DONE_MEMBERS = {"copied"}


def test_the_events_of_a_conversion(model, tmp_path):
    out = tmp_path / "out"
    result = commands.run("convert", model, out, "--json", "--cast", "bf16").fine()
    *files, done = result.events
    assert [file["event"] for file in files] == ["file", "file"]
    for file, name in zip(files, ("a", "sub/b"), strict=True):
        source, output = model / f"{name}.safetensors", out / f"{name}.df11"
        assert file == {
            "event": "file",
            "source": str(source),
            "output": str(output),
            "source_bytes": source.stat().st_size,
            "output_bytes": output.stat().st_size,
            "source_sha256": sources.sha256(source),
            "tensors": 2,
            "status": "converted",
            "cast_tensors": 0 if name == "a" else 2,
            "exact_tensors": 0 if name == "a" else 1,
            "f32_tensors": 0,
        }
        assert set(file) == FILE_MEMBERS | MORE_FILE_MEMBERS
    assert set(done) == DONE_MEMBERS | MORE_DONE_MEMBERS
    assert (done["event"], done["files"], done["copied"]) == ("done", 2, 1)
    for member in ("source_bytes", "output_bytes"):
        assert done[member] == sum(file[member] for file in files)
    assert done["ratio"] == pytest.approx(done["output_bytes"] / done["source_bytes"], abs=1e-6)
    assert isinstance(done["seconds"], float)
    assert done["seconds"] >= 0
    # Once more: nothing is left to do.
    *files, done = commands.run("convert", model, out, "--json", "--cast", "bf16").fine().events
    assert [file["status"] for file in files] == ["skipped", "skipped"]
    assert [file["output_bytes"] for file in files] == [
        (out / f"{name}.df11").stat().st_size for name in ("a", "sub/b")
    ]
    assert [file["source_sha256"] for file in files] == [
        sources.sha256(model / f"{name}.safetensors") for name in ("a", "sub/b")
    ]
    assert [(file["tensors"], file["cast_tensors"], file["exact_tensors"]) for file in files] == [(2, 0, 0), (2, 2, 1)]
    assert (done["files"], done["copied"]) == (2, 1)


def test_the_description_of_a_container(model, tmp_path):
    out = tmp_path / "out"
    commands.run("convert", model / "a.safetensors", out / "a.df11").fine()
    commands.run("convert", model / "sub" / "b.safetensors", out / "b.df11", "--cast", "bf16").fine()
    first, second = commands.run("inspect", out, "--json").fine().events
    with df11.open(out / "a.df11") as container:
        stored = container.info("a").stored_bytes
    assert first == {
        "path": str(out / "a.df11"),
        "format_version": 1,
        "writer": f"df11 {df11.__version__}",
        "bytes": (out / "a.df11").stat().st_size,
        "source": {
            "sha256": sources.sha256(model / "a.safetensors"),
            "bytes": (model / "a.safetensors").stat().st_size,
            "cast": None,
        },
        "tensors": [
            {
                "name": "a",
                "dtype": "BF16",
                "shape": [150, 100],
                "encoding": "df11",
                "stored_bytes": stored,
                "bits_per_weight": round(8 * stored / 15_000, 4),
            },
            {
                "name": "b",
                "dtype": "I64",
                "shape": [3],
                "encoding": "verbatim",
                "stored_bytes": 24,
                "bits_per_weight": 64.0,
            },
        ],
    }
    assert 10 < first["tensors"][0]["bits_per_weight"] < 12
    assert second["source"]["cast"] == "bf16"
    assert {tensor["name"]: tensor["exact"] for tensor in second["tensors"]} == {"c": False, "d": True}


def test_the_description_for_people(tmp_path):
    tensors = [bf16("weight", (150, 100)), bf16("empty", (0, 3)), f32("scalar", (), 1), f32("lost", (999,), 2)]
    source = sources.write(tmp_path / "x.safetensors", tensors)
    commands.run("convert", source, tmp_path / "x.df11", "--cast", "bf16").fine()
    result = commands.run("inspect", tmp_path / "x.df11").fine()
    assert not result.err
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert "150x100" in lines["weight"]
    assert "df11" in lines["weight"]
    assert "rounded" in lines["lost"]
    assert "rounded" not in lines["weight"]
    assert "0x3" in lines["empty"]
    assert sources.sha256(source) in result.out
    assert f"{source.stat().st_size:,}" in result.out


def test_text_is_for_people_and_goes_to_standard_error(model, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    for arguments in (
        ["convert", model, out],
        ["convert", model, out],
        ["verify", out],
        ["verify", out, "--against", model],
        ["restore", out, back],
    ):
        result = commands.run(*arguments).fine()
        assert not result.out
        assert result.err
        assert "\r" not in result.err


def test_a_conversion_ends_with_a_summary(model, tmp_path):
    result = commands.run("convert", model, tmp_path / "out", "--cast", "bf16").fine()
    (line,) = result.err.splitlines()
    assert re.search(r"2 files.*plus 1 copied; 2 F32 tensors stored as BF16, 1 of them without loss", line)
    (line,) = commands.run("convert", model, tmp_path / "out", "--cast", "bf16").fine().err.splitlines()
    assert "2 of them already finished" in line


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_quiet_is_silent(flag, model, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    for arguments in (
        ["convert", model, out, "--dry-run"],
        ["convert", model, out],
        ["convert", model, out],
        ["verify", out],
        ["verify", out, "--against", model],
        ["restore", out, back],
        ["restore", out, back],
    ):
        result = commands.run(*arguments, flag).fine()
        assert (result.out, result.err) == ("", "")
    commands.run("convert", model / "a.safetensors", tmp_path, flag).error(2)
    # Data are still data.
    assert len(commands.run("convert", model, out, flag, "--json").fine().events) == 3


# The progress bar.


def in_terminal(*arguments, **variables: str) -> tuple[int, str]:
    """Run df11 with standard error on a terminal: (exit code, what it shows)."""
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 100))
    arguments = [*commands.COMMAND, *map(str, arguments)]
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=other, env=commands.environment(**variables)
    ) as process:
        os.close(other)
        shown = b""
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # The other end is closed.
                break
            if not piece:
                break
            shown += piece
    os.close(main)
    return process.returncode, shown.decode()


def test_a_terminal_shows_one_bar_for_all_files(model, tmp_path):
    code, shown = in_terminal("convert", model, tmp_path / "out")
    assert code == 0
    assert "convert:" in shown
    assert "100%" in shown
    assert shown.count("\n") == 2  # The bar, and the summary.
    for command, *more in (["verify"], ["restore", tmp_path / "back"]):
        code, shown = in_terminal(command, tmp_path / "out", *more)
        assert code == 0
        assert f"{command}:" in shown
        assert "100%" in shown


def test_no_bar_if_quiet_even_on_a_terminal(model, tmp_path):
    assert in_terminal("convert", model, tmp_path / "out", "--quiet") == (0, "")


def test_an_error_on_a_terminal_has_a_line_of_its_own(model, tmp_path):
    commands.run("convert", model, tmp_path / "out").fine()
    (tmp_path / "out" / "sub" / "b.df11").write_bytes(b"mine")
    code, shown = in_terminal("convert", model, tmp_path / "out")
    assert code == 2
    assert re.search(r"^df11: .*b\.df11: .*$", shown, re.MULTILINE)
    assert "Traceback" not in shown


# Entry points and options.


def test_version_and_help():
    assert commands.run("--version").fine().out == f"df11 {df11.__version__}\n"
    text = commands.run("--help").fine().out
    for command in ("convert", "verify", "restore", "inspect"):
        assert command in text
        assert "--debug" in commands.run(command, "--help").fine().out
    assert commands.run("convert", "--help").fine().out.count("--no-verify") == 1


def test_every_documented_option_is_there():
    text = (
        commands.run_process("convert", "--help", env=commands.environment(COLUMNS="200", TERM="dumb", NO_COLOR="1"))
        .fine()
        .out
    )
    documented = "--threads -j --max-memory --cast --verify --no-verify --resume --no-resume --force --dry-run --json "
    documented += "--quiet --debug"
    for option in documented.split():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option


@pytest.mark.parametrize("entry", ["df11-convert", "df11"])
def test_the_entry_points(entry, model, tmp_path):
    function, before = {"df11-convert": ("convert_main", []), "df11": ("main", ["convert"])}[entry]
    code = f"import sys; from df11.__main__ import {function}; sys.argv[0] = {entry!r}; {function}()"
    result = commands.run_process(
        *before, model, tmp_path / "out", "--json", command=[sys.executable, "-c", code]
    ).fine()
    assert result.events[-1]["event"] == "done"
    commands.run_process(*before, model / "none", tmp_path / "out", command=[sys.executable, "-c", code]).error(
        4, "none"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "only-one"],
        ["convert", "SRC", "DST", "three"],
        ["convert", "SRC", "DST", "--nonsense"],
        ["convert", "SRC", "DST", "--jobs", "many"],
        ["convert", "SRC", "DST", "--jobs", "0"],
        ["convert", "SRC", "DST", "--jobs", "-1"],
        ["convert", "SRC", "DST", "--cast", "fp8"],
        ["convert", "SRC", "DST", "--cast", ""],
        ["convert", "SRC", "DST", "--max-memory", "a lot"],
        ["convert", "SRC", "DST", "--max-memory", "-1"],
        ["verify", "SRC", "--jobs", "0"],
        ["restore", "SRC", "DST", "--jobs", "-3"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_a_call_that_makes_no_sense(arguments, model, tmp_path):
    paths = {"SRC": str(model / "a.safetensors"), "DST": str(tmp_path / "x.df11")}
    before = tree_bytes(tmp_path)
    commands.run(*[paths.get(argument, argument) for argument in arguments]).error(2)
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize(
    "size",
    [
        "268435456",
        "256MiB",
        "256mib",
        "0.25GiB",
        "262144K i".replace(" ", ""),
        "300MB",
        "0.3 GB",
        "1T",
        "9" * 400 + "T",
    ],
)
def test_sizes_of_memory(size, model, tmp_path):
    commands.run("convert", model / "a.safetensors", tmp_path / "x.df11", "--max-memory", size).fine()


def test_a_traceback_only_with_debug(tmp_path):
    arguments = ["convert", tmp_path / "none", tmp_path / "x"]
    commands.run(*arguments).error(4)
    result = commands.run(*arguments, "--debug")
    assert result.code == 4
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("df11: ")


def test_an_unexpected_error_is_one_line_too(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("some defect")

    monkeypatch.setattr("df11.converter.convert.convert", fail)
    commands.run("convert", model, tmp_path / "out").error(70, "ZeroDivisionError", "some defect", "--debug")


def test_the_hub_is_not_mistaken_for_a_folder(tmp_path):
    commands.run("convert", "hf://owner", tmp_path / "out").error(2, "hf://owner")


NAMES = ["with space", "ünïcode 重み", "new\nline", "-dash", "\udcff not UTF-8"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file(name, tmp_path):
    folder = tmp_path / name
    source = sources.write(folder / f"{name}.safetensors", [bf16("w", (700,))])
    container = folder / f"{name}.df11"
    events = commands.run("convert", source, container, "--json").fine().events
    assert (events[0]["source"], events[0]["output"]) == (str(source), str(container))
    assert commands.run("inspect", container, "--json").fine().events[0]["path"] == str(container)
    commands.run("verify", container, "--against", source).fine()
    commands.run("restore", container, folder / "back").fine()
    assert (folder / "back").read_bytes() == source.read_bytes()
    commands.run("convert", folder / "none.safetensors", container).error(4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "SRC", "new.df11", "--dry-run"],
        ["inspect", "DST"],
        ["restore", "DST", "back"],
        ["convert", "none", "x"],
    ],
)
def test_a_name_that_is_no_text_can_be_printed(arguments, tmp_path):
    name = NAMES[-1]
    source = sources.write(tmp_path / f"{name}.safetensors", [bf16("w", (700,))])
    df11.convert(source, tmp_path / f"{name}.df11")
    paths = {"SRC": source, "DST": tmp_path / f"{name}.df11", "none": tmp_path / f"{name}.none"}
    result = commands.run_process(*[paths.get(argument, argument) for argument in arguments], cwd=tmp_path)
    assert result.code == (4 if "none" in arguments else 0), result


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_nobody_reads_the_output(command, model, tmp_path):
    commands.run("convert", model, tmp_path / "out").fine()
    target = [tmp_path / "out2", "--json", "--quiet"] if command == "convert" else []
    source = model if command == "convert" else tmp_path / "out"
    read, write = os.pipe()
    os.close(read)
    arguments = [*commands.COMMAND, command, str(source), *map(str, target)]
    done = subprocess.run(
        arguments, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=commands.environment()
    )
    os.close(write)
    # Not 1, which says that data differ; no traceback; nothing half-written.
    commands.Result(done.returncode, "", done.stderr).error(2)
    if command == "convert":
        assert all(not name.endswith(".partial") for name in tree_bytes(tmp_path))


# What is missing, and what is not imported.


def test_a_missing_extra_is_one_line(model, tmp_path):
    line = commands.run_without(["pyarrow"], tmp_path / "hide", "convert", model, tmp_path / "out", "--quiet").error(2)
    assert "pip install 'df11[convert]'" in line
    assert "pyarrow" in line
    assert not list(tmp_path.glob("**/*.df11*"))


def test_where_nothing_can_be_locked_it_reads_and_says_that_it_does_not_write(model, tmp_path):
    """Windows has no fcntl."""
    commands.run("convert", model, tmp_path / "out").fine()
    line = commands.run_without(
        ["fcntl"], tmp_path / "hide", "convert", model / "a.safetensors", tmp_path / "x.df11", "--quiet"
    ).error(2)
    assert "Windows" in line
    assert "WSL" in line
    assert not list(tmp_path.glob("*x.df11*"))
    commands.run_without(["fcntl"], tmp_path / "hide", "verify", tmp_path / "out").fine()


def test_tqdm_is_only_needed_on_a_terminal(model, tmp_path):
    commands.run_without(["tqdm"], tmp_path / "hide", "convert", model, tmp_path / "out").fine()
    path = os.pathsep.join([str(tmp_path / "hide"), commands.environment()["PYTHONPATH"]])
    code, shown = in_terminal("verify", tmp_path / "out", PYTHONPATH=path)
    assert code in (0, 2)  # Done without a bar, or one line that says how to fix it.
    assert code == 0 or shown.count("pip install 'df11[convert]'") == 1
    assert "Traceback" not in shown
    assert "internal error" not in shown


HEAVY = ["pyarrow", "typer", "tqdm", "huggingface_hub", "torch", "cupy", "rich", "requests"]


@pytest.mark.parametrize("module", ["df11", "df11.runtime", "df11.formats", "df11.formats.container"])
def test_an_import_is_light(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}} & set({HEAVY!r})))"
    assert commands.run_process(command=[sys.executable, "-c", code]).fine().out.split() == []


def test_every_public_name_is_there():
    code = (
        "import df11; print(all(getattr(df11, name) is not None for name in df11.__all__)); df11.runtime; df11.nonsense"
    )
    result = commands.run_process(command=[sys.executable, "-c", code])
    assert result.out == "True\n"
    assert "AttributeError: module 'df11' has no attribute 'nonsense'" in result.err


def test_inspect_needs_nothing_but_the_base(model, tmp_path):
    commands.run("convert", model, tmp_path / "out").fine()
    code = f"import df11; c = df11.open({str(tmp_path / 'out' / 'a.df11')!r}); "
    code += "print(c.keys(), c.tensor('b').shape); c.close()"
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); {code}"
    assert commands.run_process(command=[sys.executable, "-c", blocked]).fine().out == "['a', 'b'] (3,)\n"


def test_json_is_one_object_a_line(model, tmp_path):
    commands.run("convert", model, tmp_path / "out").fine()
    for arguments in (
        ["inspect", tmp_path / "out"],
        ["verify", tmp_path / "out"],
        ["restore", tmp_path / "out", tmp_path / "back"],
    ):
        lines = commands.run(*arguments, "--json").fine().out.splitlines()
        assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full_do_no_harm(closed, model, tmp_path):
    script = f"{sys.executable} -m df11 convert {model} {tmp_path / 'out'} {closed}"
    assert commands.run_process(command=["sh", "-c", script]).code == 0
    commands.run("verify", tmp_path / "out").fine()


def test_the_environment_of_other_programs(model, tmp_path):
    df11.convert(model, tmp_path / "out")
    (tmp_path / "out" / "matplotlibrc").write_bytes(b"\x1b[2J : 1\n\xff\xfe\n")
    env = commands.environment(MPLBACKEND="none", TERMINAL_WIDTH="wide")
    result = commands.run_process("report", ".", "-o", tmp_path / "report", env=env, cwd=tmp_path / "out").fine()
    assert result.err.splitlines()[0] == str(tmp_path / "report" / "report.html")
    commands.run_process("verify", env=env).error(2, "Missing argument")


def test_a_system_without_more_threads(model, tmp_path, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    commands.run("convert", model, tmp_path / "out").error(6, "no more threads", "--threads")
