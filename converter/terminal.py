"""What all commands share: options, one progress bar, lines for people and for programs, and errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, Any, Final, Self

import typer

from df11.converter.pipeline import give_memory_back
from df11.formats import errors, hub

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", metavar="N", help="Threads that encode or decode. [default: one a core]", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]

INTERRUPTED: Final = 130


class Bar:
    """One progress bar over all files, on standard error, in bytes; none where nobody looks."""

    def __init__(self, what: str, *, quiet: bool) -> None:
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                raise errors.missing_extra("tqdm", "convert") from None
            self._bar = tqdm(desc=what, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def total(self, size: int) -> None:
        """Start anew, with this as the whole."""
        if self._bar is not None:
            self._bar.reset(total=size)

    def advance(self, size: int) -> None:
        """So many bytes more."""
        if self._bar is not None:
            self._bar.update(size)


def say(text: str, *, quiet: bool = False) -> None:
    """Words for people, on standard error."""
    if not quiet:
        typer.echo(text, err=True)


def print_line(text: str) -> None:
    """Data, on standard output. Raises UsageError if nobody reads it."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
        raise errors.UsageError("nobody reads standard output any more") from None


def event(event: str, **values: Any) -> None:
    """A JSON line."""
    print_line(json.dumps({"event": event, **values}))


class VerificationFailed(Exception):  # noqa: N818 - not an error of its own
    """A verification that failed, for whatever reason: exit code 1."""

    def __init__(self, error: errors.Df11Error) -> None:
        self.error = error


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def run(app: typer.Typer, arguments: list[str]) -> int:
    """Run a command line and return the exit code: an error is one line on standard error."""
    debug = "--debug" in arguments
    give_memory_back()
    signal.signal(signal.SIGTERM, _terminate)  # A cancelled CI job cleans up like an interrupted one.
    if "--quiet" not in arguments and "-q" not in arguments:
        if sys.stderr.isatty():
            hub.on_pause = lambda error, seconds: say(f"df11: {redacted(str(error))}; trying again in {seconds:.0f} s")
    try:
        code = app(args=arguments or ["--help"], prog_name="df11", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt  # Typer has made an exit code of it.
    except BaseException as error:
        if debug:
            print(redacted(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201
        text, code = _explain(error)
        print(f"df11: {redacted(text)}", file=sys.stderr)  # noqa: T201
    return code if isinstance(code, int) else 0


def redacted(text: str) -> str:
    """``text`` without the Hub's token, whoever has put it there, and wherever the client has it from."""
    tokens = [os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")]
    if "huggingface_hub" in sys.modules:  # Else nobody has read one from a file.
        with contextlib.suppress(Exception):  # A file that cannot be read: then there is no token in the text.
            tokens.append(sys.modules["huggingface_hub"].get_token() or "")
    for token in {token.strip() for token in tokens} - {""}:
        text = text.replace(token, "***")
    return text


def _explain(error: BaseException) -> tuple[str, int]:
    match error:
        case VerificationFailed():
            return f"verification failed: {error.error}", errors.DifferenceError.exit_code
        case errors.Df11Error():
            return str(error), error.exit_code
        case OSError():
            return _explain(errors.from_os_error(error))
        case MemoryError():
            return "out of memory; give a smaller --jobs", errors.BudgetError.exit_code
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted; run the same command again to go on", INTERRUPTED
        case _ if hasattr(error, "format_message"):  # A usage error of Typer's; it shows no public class for them.
            return f"{error.format_message()} Try --help.", errors.UsageError.exit_code
        case _:
            return f"internal error, please report it: {type(error).__name__}: {error}; --debug shows where", 70
