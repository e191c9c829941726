"""Run df11's command line for tests: in this process or, where signals, memory or imports matter, in another."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import df11

COMMAND = [sys.executable, "-m", "df11"]
PATIENCE = 60.0
"""Seconds to wait for a process: so many that they only pass if something hangs."""

# Runs its arguments as a child and prints the child's peak memory. It is small, because Linux counts the memory of the
# process that forked as the child's.
_MEASURE = """
import os, sys
child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    def error(self, code: int, *words: object) -> str:
        """Assert that this is a proper error: this exit code, no data, one line with ``words``. Returns the line."""
        assert self.code == code, self
        assert not self.out, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("df11: "), self
        for word in words:
            assert str(word) in lines[0], (word, lines[0])
        return lines[0]

    def fine(self) -> Result:
        """Assert that the command succeeded. Returns self."""
        assert self.code == 0, self
        return self


def environment(**more: str) -> dict[str, str]:
    """The environment for a child that finds df11 where this process found it, whatever its working directory."""
    package = Path(df11.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def run(*arguments: object) -> Result:
    """Run ``df11`` in this process."""
    from df11.pipelines import cli

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run([str(argument) for argument in arguments])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def run_process(
    *arguments: object, env: Mapping[str, str] | None = None, command: Sequence[str] = COMMAND, cwd: Path | None = None
) -> Result:
    """Run ``df11``, or another command, in a process of its own."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        env=env or environment(),
        cwd=cwd,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_without(packages: Sequence[str], folder: Path, *arguments: object, **variables: str) -> Result:
    """Run ``df11`` where some packages are not installed, even for its children; ``folder`` gets what hides them."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"import sys\n\nsys.modules.update(dict.fromkeys({list(packages)!r}))\n")
    env = environment(**variables)
    return run_process(*arguments, env={**env, "PYTHONPATH": os.pathsep.join([str(folder), env["PYTHONPATH"]])})


def peak_memory(*arguments: object) -> int:
    """Run ``df11`` to success in another process; returns its peak memory in bytes."""
    result = run_process("-m", "df11", *arguments, command=[sys.executable, "-S", "-c", _MEASURE]).fine()
    return int(result.out.splitlines()[-1])


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start ``df11`` in another process. SIGINT reaches it even if the tests run in the background of a shell."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a process started by :func:`start`."""
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out, err)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until ``condition`` holds; fails if ``process`` ends first."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)
