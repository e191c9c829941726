"""Start one command, wait for it, and write what it used as JSON: ``_child.py RESULT COMMAND...``.

This is a process of its own and a small one, because Linux counts the memory of the parent into the peak of a new
process. Only the standard library; run with ``python -I -S``.
"""

import json
import os
import signal
import sys
import time


def main() -> None:
    """Run the command with this process's standard streams. Exits with 0; the command's exit code is in the result."""
    result, command = sys.argv[1], sys.argv[2:]
    # Handlers, not SIG_IGN: the command must not inherit that. Ctrl-C reaches the command directly.
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
