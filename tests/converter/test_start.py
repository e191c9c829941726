"""How a command starts: what it imports, and that a command line means the same with and without Typer."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from hypothesis import example, given, settings
from hypothesis import strategies as st

from df11.converter import options, terminal
from df11.pipelines import cli
from df11.version import __version__
from tests.support import commands, sources

# Modules that are useless for work on local files. Each costs time, most of them more than df11 itself.
UNNEEDED = (
    "typer click pydantic rich shellingham annotated_types tqdm pyarrow huggingface_hub httpx httpx2 requests torch "
    "matplotlib jinja2 "
    "shutil ssl socket email http asyncio urllib.request importlib.metadata multiprocessing unittest "
    "df11.storage.hub df11.storage.client df11.storage.ranges df11.converter.parquet df11.runtime "
    "df11.pipelines.job df11.pipelines.prepare df11.pipelines.run df11.pipelines.report df11.pipelines.transfer "
    "df11.pipelines.wording "
)
PROGRAM = """
import atexit, gc, sys
atexit.register(lambda: print(gc.isenabled(), *sys.modules, file=sys.stderr))
from df11.__main__ import main
main()
"""


def modules_of(*arguments: object) -> tuple[str, set[str]]:
    """Run ``df11``: whether its garbage collector is on at the end, and what it imported."""
    result = commands.run_process(*arguments, command=[sys.executable, "-c", PROGRAM]).fine()
    collects, *modules = result.err.splitlines()[-1].split()
    return collects, set(modules)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sources.write(tmp_path / "x.safetensors", [sources.bf16("w", (300, 200))])


def test_work_on_local_files_imports_only_what_it_needs(source, tmp_path):
    container = tmp_path / "x.df11"
    for arguments in (
        ["convert", source, container, "--threads", "1", "--max-memory=300MB", "--quiet"],
        ["verify", container, "--against", source],
        ["restore", container, tmp_path / "back"],
        ["inspect", container, "--json"],
    ):
        collects, modules = modules_of(*arguments)
        assert sorted(modules.intersection(UNNEEDED.split())) == []
        assert {"numpy", "df11.pipelines.cli"} <= modules  # The list is that of imported modules.
        assert collects == "True"


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["convert", "--help"], ["hub", "push", "--help"]], ids=" ".join
)
def test_help_does_not_import_what_works(arguments):
    _, modules = modules_of(*arguments)
    assert "typer" in modules
    assert sorted(modules & {"numpy", "df11.converter.convert", "df11.pipelines.run"}) == []


def test_an_import_changes_nothing_for_others():
    code = "import gc, os; before = dict(os.environ); import df11, df11.runtime, df11.pipelines.cli; df11.convert"
    code += "; print(gc.isenabled(), gc.get_freeze_count(), dict(os.environ) == before)"
    assert commands.run_process(command=[sys.executable, "-c", code]).fine().out.split() == ["True", "0", "True"]


def test_without_typer_the_usual_calls_work_and_others_say_what_is_missing(source, tmp_path):
    hide, container = tmp_path / "hide", tmp_path / "x.df11"
    commands.run_without(["typer", "tqdm"], hide, "convert", source, container, "--json").fine()
    for arguments in (["--help"], ["convert"], ["convert", source, container, "-j1"]):
        commands.run_without(["typer", "tqdm"], hide, *arguments).error(2, "typer", "pip install 'df11[convert]'")


# What a command line means.

Call = tuple[options.Command, dict[str, Any]]


def by_typer(arguments: list[str]) -> Call | None:
    """The call that Typer reads; None for a mistake, or if there is nothing to do."""
    calls: list[Call] = []
    app = options.typer_app(cli.COMMANDS, __version__, lambda command, values: calls.append((command, values)))
    try:
        typer.main.get_command(app)(args=arguments, prog_name="df11", standalone_mode=False)
    except Exception as error:
        assert hasattr(error, "format_message"), error
        assert not calls
    return calls[0] if calls else None


def leaves(group: options.Group, *before: str) -> dict[tuple[str, ...], options.Command]:
    found = {}
    for name, command in group.commands.items():
        more = leaves(command, *before, name) if isinstance(command, options.Group) else {(*before, name): command}
        found.update(more)
    return found


LEAVES = leaves(cli.COMMANDS)
SPELLINGS = (
    "--threads -j --jobs --max-memory --max-disk --cast --keep-f32 --verify --no-verify --resume --no-resume --force "
    "--dry-run --json --quiet -q --debug --against --bf16 --engine --private --public --include --exclude "
    "--allow-missing --output -o --shapes --to --patterns --file-per-unit --help --version --nonsense --thread "
)
VALUES = [
    "a",
    "b/c.df11",
    "hf://o/n",
    "1",
    "07",
    "-1",
    "1_0",
    " 2",
    "٣",
    "1234567890",
    "256MiB",
    "bf16",
    "process",
    "",
    "-",
    "--",
    "a=b",
    "ü\udcff",
]
tokens = st.one_of(
    st.sampled_from(VALUES),
    st.sampled_from(SPELLINGS.split()),
    st.builds("{}={}".format, st.sampled_from(SPELLINGS.split()), st.sampled_from(VALUES)),
    st.builds("{}{}".format, st.sampled_from(["-j", "-q", "-o"]), st.sampled_from(["1", "q", "j3", "x"])),
)


def test_the_spellings_are_all_that_there_are():
    declared = set()
    for path in LEAVES:
        text = commands.run(*path, "--help").fine().out
        declared |= set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", text))
    assert declared - set(SPELLINGS.split()) == set()


def test_help_shows_what_is_written(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for path, command in LEAVES.items():
        shown = commands.run(*path, "--help").fine().out
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            _, declared = get_args(parameter.annotation)
            assert declared.settings["help"] in shown  # Brackets would be taken for markup.


@given(
    path=st.sampled_from(sorted(LEAVES)),
    places=st.lists(st.sampled_from(VALUES[:4]), max_size=2),
    more=st.lists(tokens, max_size=5),
)
@settings(max_examples=400, deadline=None)
@example(path=("inspect",), places=["a"], more=[""])
def test_what_is_read_without_typer_is_what_typer_reads(path, places, more):
    arguments = [*path, *places, *more]
    call = options.read(cli.COMMANDS, arguments)
    assert call is None or call == by_typer(arguments)
    assert options.read(cli.COMMANDS, [*more, *arguments]) in (None, by_typer([*more, *arguments]))


USUAL = [
    "convert SRC DST",
    "convert --json SRC --threads 4 DST -q --force --dry-run --no-verify --verify --no-resume --resume --debug",
    "convert SRC DST --max-memory=1GiB --max-disk 10GB --cast bf16 -j 2",
    "verify SRC --against DST --json -j 1",
    "restore SRC DST --bf16 --threads=3",
    "inspect SRC --json",
    "hub push SRC hf://o/n --private",
    "hub pull hf://o/n DST --force --threads 2",
    "report SRC -o DST",
    "report SRC --output=DST",
    "job plan JOB --json",
    "job run JOB --quiet",
]


@pytest.mark.parametrize("line", USUAL)
def test_the_usual_calls_do_not_wait_for_typer(line):
    call = options.read(cli.COMMANDS, line.split())
    assert call is not None
    assert call == by_typer(line.split())


MISTAKES = [
    "",
    "--help",
    "convert",
    "convert SRC",
    "convert SRC DST more",
    "convert SRC DST --jobs",
    "convert SRC DST --threads 0x2",
    "convert SRC DST --force=yes",
    "convert SRC DST --thread 2",
    "convert -- SRC DST",
    "convert SRC DST -qj2",
    "hub",
    "hub nonsense",
    "nonsense",
]


@pytest.mark.parametrize("line", MISTAKES)
def test_all_else_is_left_to_typer(line):
    assert options.read(cli.COMMANDS, line.split()) is None


@pytest.mark.parametrize("spelling", ["--threads 3", "--threads=3", "-j 3", "-j3", "--jobs 3", "--jobs=3"])
@pytest.mark.parametrize(
    "call", ["convert a b", "verify a", "restore a b", "hub push a hf://o/n", "hub pull hf://o/n a"]
)
def test_the_number_of_threads(call, spelling, monkeypatch):
    given = []
    monkeypatch.setattr(terminal, "_start", lambda _, values: given.append(values))
    assert commands.run(*f"{call} {spelling}".split()).fine().err == ""
    assert [values["threads"] for values in given] == [3]
    text = commands.run(*call.split()[:-1], "--help").fine().out
    assert "--threads" in text
    assert "--jobs" not in text


def test_help_names_all_commands():
    for group, names in {
        (): ["convert", "verify", "restore", "inspect", "report", "job", "hub"],
        ("job",): ["run", "plan"],
        ("hub",): ["push", "pull"],
    }.items():
        text = commands.run(*group, "--help").fine().out
        places = [re.search(rf"^\W+{name}\s+[A-Z]", text, re.MULTILINE) for name in names]
        assert all(places)
        assert [place.start() for place in places] == sorted(place.start() for place in places)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("convert", ["Missing argument 'SRC'"]),
        ("convert a b c", ["unexpected extra argument"]),
        ("convert a b --nonsense", ["No such option", "--nonsense"]),
        ("convert a b --threads many", ["--threads"]),
        ("convert a b --jobs many", ["--jobs"]),
        ("convert a b --threads", ["--threads", "requires an argument"]),
        ("convert a b --max-memory", ["--max-memory", "requires an argument"]),
        ("conver a b", ["No such command 'conver'", "'convert'"]),
        ("job run a --engine none", ["--engine", "'process'", "'ray'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_way_to_help(line, words):
    assert commands.run(*line.split()).error(2, *words).endswith(" Try --help.")
