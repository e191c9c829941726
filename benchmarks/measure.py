"""Run commands as whole processes and measure them: wall time, CPU time, peak memory."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_CHILD: Final = Path(__file__).with_name("_child.py")


class CommandError(Exception):
    """A measured command failed; the message ends with its last output."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One process: seconds of wall time; seconds of CPU time in user and in kernel mode; peak resident bytes.

    All but the first come from wait4. The peak is therefore that of the largest process among it and its children.
    """

    wall: float
    user: float
    system: float
    peak_rss: int
    stdout: str

    @property
    def cpu(self) -> float:
        """Seconds of CPU time."""
        return self.user + self.system


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end. Raises CommandError if its exit code is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        launcher = [sys.executable, "-I", "-S", str(_CHILD), str(result), *command]
        pipe = subprocess.PIPE
        process = subprocess.Popen(launcher, stdout=pipe, stderr=pipe, text=True, env=env, errors="replace")
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            process.terminate()  # which also ends the command
            process.wait()
            raise
        if not result.exists():
            raise CommandError(f"{command[0]} could not be started: {stderr.strip()[-400:]}")
        measured = json.loads(result.read_text())
    if exit_code := measured.pop("exit_code"):
        said = (stderr.strip() or stdout.strip())[-400:]
        raise CommandError(f"exit code {exit_code} from {' '.join(command)}: {said}")
    return Measured(**measured, stdout=stdout)


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, like Ctrl-C, so that temporary folders are removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, as under nohup
            signal.signal(number, interrupt)


def df11(*arguments: object) -> list[str]:
    """The df11 command line of this interpreter."""
    return [sys.executable, "-m", "df11", *map(str, arguments)]


def events(stdout: str) -> list[dict[str, Any]]:
    """The JSON lines that df11 prints with ``--json``."""
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_bytes(path: Path, suffix: str = "") -> int:
    """Size in bytes of a file, or of all files in a folder whose names end with ``suffix``."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob(f"*{suffix}") if file.is_file())


def use_once(folder: Path, size: int) -> None:
    """Fill ``size`` bytes of a folder in memory and free them: a virtual machine's first use of its memory is slow."""
    path = folder / "zeros"
    block = bytes(64 << 20)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    path.unlink()
