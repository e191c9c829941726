"""Start one command, wait for it, and write what it took as JSON: ``_child.py RESULT COMMAND...``.

A process of its own, because Linux counts the memory of the process that starts a command into the peak of that
command: this one is small. Only the standard library, run with ``python -I -S``.
"""

import json
import os
import signal
import sys
import time


def main() -> None:
    """Run the command with this process's standard streams; exit with 0: the command's exit code is in the result."""
    result, command = sys.argv[1], sys.argv[2:]
    # Handlers, not SIG_IGN: the command must not inherit it. A Ctrl-C reaches the command by itself.
    signal.signal(signal.SIGINT, lambda *_: None)
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    _, status, usage = os.wait4(pid, 0)
    measured = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall": time.perf_counter() - start,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak_rss": usage.ru_maxrss * 1024,
    }
    with open(result, "w", encoding="ascii") as file:
        json.dump(measured, file)


if __name__ == "__main__":
    main()
