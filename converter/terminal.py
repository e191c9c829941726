"""What all commands share: one progress bar, lines for people and for programs, and errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
from types import FrameType
from typing import Any, Final, Self

from df11.converter import options
from df11.formats import errors
from df11.version import __version__

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
        print(text, file=sys.stderr)  # noqa: T201


def print_line(text: str) -> None:
    """Data, on standard output. Raises UsageError if nobody reads it."""
    try:
        print(text, flush=True)  # noqa: T201
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


def run(commands: options.Group, arguments: list[str]) -> int:
    """Run a command line and return the exit code: an error is one line on standard error."""
    signals: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        signals.append(number)
        if len(signals) == 1:
            raise KeyboardInterrupt
        if (
            len(signals) > 2
        ):  # The second must not disturb what the first one has made it clean up; the third one means it.
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGTERM, interrupt)  # A cancelled CI job cleans up like an interrupted one.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # As it is in the background of a shell.
        signal.signal(signal.SIGINT, interrupt)
    try:
        call = options.read(commands, arguments)
        if call is not None:
            code = _start(*call)
        else:
            app = options.typer_app(commands, __version__, _start)
            code = app(args=arguments or ["--help"], prog_name="df11", standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt  # Typer has made an exit code of it.
    except BaseException as error:
        if "--debug" in arguments:
            import traceback

            print(redacted(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201
        # Where an interrupt meets a lock, it may come out as another error.
        text, code = _explain(KeyboardInterrupt() if signals else error)
        print(f"df11: {redacted(text)}", file=sys.stderr)  # noqa: T201
    return code or 0


def _start(command: options.Command, values: dict[str, Any]) -> int | None:
    # What a command needs that works, and --help does not: importing it takes as long as converting a small file.
    from df11.converter.pipeline import give_memory_back
    from df11.formats import hub

    if not gc.isenabled():  # The entry point has switched it off, as imports leave nothing to collect.
        gc.freeze()
        gc.enable()
    give_memory_back()
    if not values.get("quiet") and sys.stderr.isatty():
        hub.on_pause = lambda error, seconds: say(f"df11: {redacted(str(error))}; trying again in {seconds:.0f} s")
    return command(**values)


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
            return "out of memory; give a smaller --threads", errors.BudgetError.exit_code
        case KeyboardInterrupt():
            return "interrupted; run the same command again to go on", INTERRUPTED
        case _ if hasattr(error, "format_message"):  # A usage error of Typer's; it shows no public class for them.
            return f"{error.format_message()} Try --help.", errors.UsageError.exit_code
        case _:
            return f"internal error, please report it: {type(error).__name__}: {error}; --debug shows where", 70
