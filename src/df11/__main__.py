"""Entry points: ``df11``, ``df11-convert`` and ``python -m df11``."""

from __future__ import annotations

import contextlib
import gc
import os
import sys


def main() -> None:
    """``df11``: all commands."""
    sys.exit(_run(sys.argv[1:]))


def convert_main() -> None:
    """``df11-convert``: the same as ``df11 convert``."""
    sys.exit(_run(["convert", *sys.argv[1:]]))


def _run(arguments: list[str]) -> int:
    # df11 multiplies no matrices: NumPy need not start a thread a core for that, which takes a tenth of a short run.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # Until the command's work starts; imports leave nothing to collect.
    from df11.converter.terminal import INTERRUPTED
    from df11.pipelines.cli import run

    code = run(arguments)
    if code == INTERRUPTED:
        # Python would wait for its threads, of which one may wait for a server that is silent.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    main()
