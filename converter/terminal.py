"""What all commands share: a progress bar, output for people and programs, errors as one line, exit codes."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, Self

from df11.converter import options
from df11.formats import errors
from df11.storage.secrets import without_secrets
from df11.version import __version__

INTERRUPTED: Final = 130
LONG_WAIT: Final = 5.0
"""Shortest wait, in seconds, that is reported even if standard error is not a terminal."""


class Bar:
    """One progress bar over all files, on standard error, in bytes; none if that is not a terminal."""

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
        """Start again, with this total."""
        if self._bar is not None:
            self._bar.reset(total=size)

    def advance(self, size: int) -> None:
        """Add this many bytes."""
        if self._bar is not None:
            self._bar.update(size)


def _lines(text: str) -> str:
    # Nothing that a stranger wrote is a command to the terminal.
    return "\n".join(errors.printable(line, None) for line in text.split("\n"))


def say(text: str, *, quiet: bool = False) -> None:
    """Text for people, on standard error."""
    if not quiet:
        with contextlib.suppress(OSError):  # Where it cannot be told, the work still goes on.
            print(_lines(text), file=sys.stderr, flush=True)  # noqa: T201


def print_line(text: str) -> None:
    """Data, on standard output. Raises UsageError if nobody reads it."""
    try:
        print(_lines(text), flush=True)  # noqa: T201
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends.
        raise errors.UsageError("stdout was closed") from None


def event(event: str, **values: Any) -> None:
    """A JSON line."""
    print_line(json.dumps({"event": event, **values}))


class _Messages(logging.Handler):
    # What df11 logs while a command runs: warnings about the input, and retries.
    def __init__(self, *, json_lines: bool, quiet: bool) -> None:
        super().__init__()
        self._json, self._quiet = json_lines, quiet

    def emit(self, record: logging.LogRecord) -> None:
        text = redacted(record.getMessage())
        is_warning = record.levelno >= logging.WARNING
        if self._json:
            told = str(getattr(record, "error", text))
            values = {"seconds": round(record.seconds, 3)} if hasattr(record, "seconds") else {}
            event(getattr(record, "event", "warning"), time=now(), message=redacted(told), **values)
        # A short wait matters to a person who watches, not to a log.
        is_told = is_warning or (not self._json and (sys.stderr.isatty() or getattr(record, "seconds", 0) > LONG_WAIT))
        if is_told and not self._quiet:
            say(f"df11: warning: {text}" if is_warning else text)


@contextlib.contextmanager
def _telling(*, json_lines: bool, quiet: bool) -> Iterator[None]:
    # This is the application, so it decides what happens to the library's log.
    log, messages = logging.getLogger("df11"), _Messages(json_lines=json_lines, quiet=quiet)
    before = log.level, log.propagate
    log.addHandler(messages)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(messages)
        log.level, log.propagate = before


def now() -> str:
    """The current time as in events: ISO 8601, UTC, milliseconds."""
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class VerificationFailed(Exception):  # noqa: N818 - not an error of its own
    """A failed verification, whatever the reason: exit code 1."""

    def __init__(self, error: errors.Df11Error) -> None:
        self.error = error


def run(commands: options.Group, arguments: list[str]) -> int:
    """Run a command line and return the exit code. An error is one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # What the locale cannot spell is told in another way.
            stream.reconfigure(errors="backslashreplace")
    signals: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        signals.append(number)
        if len(signals) == 1:
            raise KeyboardInterrupt
        if len(signals) > 2:  # The second must not disturb the first one's cleanup; the third is meant.
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGTERM, interrupt)  # A cancelled CI job cleans up like an interrupted one.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Ignored for a shell's background jobs.
        signal.signal(signal.SIGINT, interrupt)
    try:
        call = options.read(commands, arguments)
        if call is not None:
            code = _start(*call)
        else:
            app = options.typer_app(commands, __version__, _start)
            code = app(args=arguments or ["--help"], prog_name="df11", standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt  # Typer turned it into an exit code.
    except BaseException as error:
        if "--debug" in arguments:
            import traceback

            say(redacted(traceback.format_exc()).rstrip())
        # An interrupt that meets a lock may surface as another error.
        text, code = _explain(KeyboardInterrupt() if signals else error)
        say(f"df11: {redacted(text)}")
    return code or 0


def _start(command: options.Command, values: dict[str, Any]) -> int | None:
    # Imports that a working command needs and --help does not: they take as long as converting a small file.
    from df11.converter.pipeline import give_memory_back

    if not gc.isenabled():  # The entry point switched it off: imports leave nothing to collect.
        gc.freeze()
        gc.enable()
    give_memory_back()
    with _telling(json_lines=bool(values.get("json_lines")), quiet=bool(values.get("quiet"))):
        return command(**values)


def redacted(text: str) -> str:
    """``text`` without passwords of addresses, and without the Hub's token, wherever the client found it."""
    tokens = [os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")]
    if "huggingface_hub" in sys.modules:  # Otherwise none was read from a file.
        with contextlib.suppress(Exception):  # An unreadable file: then the text holds no token.
            tokens.append(sys.modules["huggingface_hub"].get_token() or "")
    for token in {token.strip() for token in tokens} - {""}:
        text = text.replace(token, "***")
    return without_secrets(text)


def _explain(error: BaseException) -> tuple[str, int]:
    match error:
        case VerificationFailed():
            return f"verification failed: {error.error}", errors.DifferenceError.exit_code
        case errors.Df11Error():
            return str(error), error.exit_code
        case OSError():
            return _explain(errors.from_os_error(error))
        case MemoryError():
            return "out of memory; use fewer --threads", errors.BudgetError.exit_code
        case KeyboardInterrupt():
            return "interrupted; run the same command again to continue", INTERRUPTED
        case RuntimeError() if "start new thread" in str(error):
            return "the system has no more threads; use fewer --threads", errors.BudgetError.exit_code
        case _ if hasattr(error, "format_message"):  # A usage error from Typer, which has no public class for it.
            return f"{error.format_message()} Try --help.", errors.UsageError.exit_code
        case _:
            return f"internal error, please report it: {type(error).__name__}: {error}; --debug shows where", 70
