"""Commands, declared once as functions whose annotations describe their options, and two command-line parsers.

:func:`read` handles the usual calls and takes no time. Everything else (help, mistakes, rare spellings) goes to Typer,
which gets the same declarations from :func:`typer_app`. Importing Typer takes as long as converting a small file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, get_args

from df11.formats import errors

if TYPE_CHECKING:
    import typer


class Argument:
    """Annotation of a positional parameter. ``settings`` are those of ``typer.Argument``."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class Option:
    """Annotation of a named parameter: ``"--cast"``, or ``"--verify/--no-verify"`` for a flag.

    ``former``: an old name, which still works but is not in the help. ``settings`` are those of ``typer.Option``.
    """

    def __init__(self, *names: str, former: str | None = None, **settings: Any) -> None:
        self.names = names
        self.former = former
        self.settings = settings


Command: TypeAlias = Callable[..., int | None]
"""Returns the exit code; None is 0."""
Start: TypeAlias = Callable[[Command, dict[str, Any]], int | None]
"""Receives a command and its values."""


@dataclass(frozen=True)
class Group:
    """Commands under one name."""

    help: str
    commands: Mapping[str, Command | Group]


DEFAULT_MEMORY: Final = "256MiB"
"""Default of a conversion. It is here because the help must not import the converter."""

Debug = Annotated[bool, Option("--debug", help="Show a traceback with an error.")]
Json = Annotated[bool, Option("--json", help="Machine-readable output on stdout: JSON lines.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print errors only.")]
Threads = Annotated[
    int | None,
    Option(
        "--threads",
        "-j",
        former="--jobs",
        metavar="N",
        help="Threads that encode or decode; default: one per core.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    Option("--include", metavar="PATTERN", help="Only files that match, as in the Hub's client; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    Option("--exclude", metavar="PATTERN", help="Leave out files that match; repeatable."),
]
AllowMissing = Annotated[
    bool, Option("--allow-missing", help="Continue if an index names a shard that does not exist.")
]
Force = Annotated[bool, Option("--force", help="Replace files that df11 did not write.")]


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError
    return int(text)


_READERS: Final[Mapping[Any, Callable[[str], Any]]] = {
    str: str,
    str | None: str,
    Path: Path,
    Path | None: Path,
    int | None: _number,
}


def read(commands: Group, arguments: Sequence[str]) -> tuple[Command, dict[str, Any]] | None:
    """The command that ``arguments`` name, and the value of each parameter; None if Typer has to interpret them."""
    found: Command | Group | None = commands
    rest = iter(arguments)
    while isinstance(found, Group):
        found = found.commands.get(next(rest, ""))
    if found is None:
        return None
    values: dict[str, Any] = {}
    places: list[tuple[str, Any]] = []
    flags: dict[str, tuple[str, bool]] = {}
    options: dict[str, tuple[str, Any]] = {}
    for name, parameter in inspect.signature(found, eval_str=True).parameters.items():
        kind, declared = get_args(parameter.annotation)
        if isinstance(declared, Argument):
            places.append((name, kind))
            continue
        values[name] = parameter.default
        for spelling in declared.names:
            if kind is bool:
                on, _, off = spelling.partition("/")
                flags |= {on: (name, True)} | ({off: (name, False)} if off else {})
            else:
                options[spelling] = (name, kind)
    for argument in rest:
        spelling, equals, text = argument.partition("=")
        if not argument.startswith("-") and places:
            (name, kind), text = places.pop(0), argument
        elif argument in flags:
            name, values[name] = flags[argument]
            continue
        elif spelling in options and (not equals or spelling.startswith("--")):
            name, kind = options[spelling]
            text = text if equals else next(rest, "")
        else:
            return None
        if not text or text.startswith("-") or kind not in _READERS:
            return None
        try:
            values[name] = _READERS[kind](text)
        except ValueError:
            return None
    return None if places else (found, values)


def typer_app(commands: Group, version: str, start: Start) -> typer.Typer:
    """The same commands for Typer, and ``--version``. ``start`` gets the chosen command and its values."""
    try:
        import typer
    except ModuleNotFoundError:
        raise errors.missing_extra("typer", "convert") from None

    def show(value: bool) -> None:
        if value:
            typer.echo(f"df11 {version}")
            raise typer.Exit

    def options(
        version: bool = typer.Option(False, "--version", callback=show, is_eager=True, help="Print the version."),
    ) -> None:
        pass

    def fill(app: typer.Typer, group: Group) -> typer.Typer:
        for name, command in group.commands.items():
            if isinstance(command, Group):
                app.add_typer(fill(typer.Typer(no_args_is_help=True, help=command.help), command), name=name)
            else:
                app.command(name)(_for_typer(command, start))
        return app

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=commands.help)
    app.callback()(options)
    return fill(app, commands)


def _for_typer(function: Command, start: Start) -> Command:
    import typer

    former: dict[str, str] = {}
    parameters: list[inspect.Parameter] = []
    signature = inspect.signature(function, eval_str=True)
    for name, parameter in signature.parameters.items():
        kind, declared = get_args(parameter.annotation)
        if isinstance(declared, Argument):
            parameters.append(parameter.replace(annotation=Annotated[kind, typer.Argument(**declared.settings)]))
            continue
        parameters.append(
            parameter.replace(annotation=Annotated[kind, typer.Option(*declared.names, **declared.settings)])
        )
        if declared.former is not None:
            old = f"former_{name}"
            former[old] = name
            parameters.append(
                parameter.replace(name=old, annotation=Annotated[kind, typer.Option(declared.former, hidden=True)])
            )

    def command(**values: Any) -> int | None:
        for old, name in former.items():
            value = values.pop(old)
            values[name] = value if values[name] is None else values[name]
        return start(function, values)

    command.__doc__ = function.__doc__
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # where Typer looks
    return command
