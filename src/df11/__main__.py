"""Entry points: ``df11``, ``df11-convert`` and ``python -m df11``."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys


def main() -> None:
    """``df11``: all commands."""
    sys.exit(_run(sys.argv[1:]))


def convert_main() -> None:
    """``df11-convert``: the same as ``df11 convert``."""
    sys.exit(_run(["convert", *sys.argv[1:]]))


def _run(arguments: list[str]) -> int:
    # From here on an interrupt, or a cancelled job, is one line; later terminal.run knows how to clean up.
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _open_streams()
        return _start(arguments)
    except KeyboardInterrupt:
        os.write(2, b"df11: interrupted; run the same command again to go on\n")
        os._exit(130)


def _open_streams() -> None:
    # A stream that is closed has no object, and the next file that is opened would get its number, and its lines.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the end


def _start(arguments: list[str]) -> int:
    # df11 multiplies no matrices. Without this, NumPy starts one thread per core for that: a tenth of a short run.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # There is one progress bar, and it is ours; so are the lines about what went wrong.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.pop("MPLBACKEND", None)  # No window is opened.
    if not os.environ.get("TERMINAL_WIDTH", "0").isdecimal():  # Typer would take it for a number.
        del os.environ["TERMINAL_WIDTH"]
    gc.disable()  # Until the command's work starts; imports leave no garbage.
    from df11.converter.terminal import INTERRUPTED
    from df11.pipelines.cli import run

    code = run(arguments)
    if code == INTERRUPTED:
        # Python would wait for all threads, and one may be waiting for a silent server.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    main()
