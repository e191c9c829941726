"""Start one command, wait for it, and write what it took as JSON: ``_child.py RESULT COMMAND...``.

A process of its own, because Linux counts the memory of the process that starts a command into the peak of that command: this one is small.
Only the standard library, run with ``python -I -S``.
"""

import json
import os
import signal
import sys
import threading
import time


def tree_rss(pid: int) -> tuple[int, int]:
    """Number of living descendants of a process, and the resident bytes of it and all of them (shared pages count in each)."""
    found, total, todo = -1, 0, [pid]
    page = os.sysconf("SC_PAGE_SIZE")
    while todo:
        current = todo.pop()
        try:
            with open(f"/proc/{current}/statm", encoding="ascii") as file:
                total += int(file.read().split()[1]) * page
            for task in os.listdir(f"/proc/{current}/task"):  # noqa: PTH208 - pathlib takes longer to import than the rest
                with open(f"/proc/{current}/task/{task}/children", encoding="ascii") as file:
                    todo += [int(child) for child in file.read().split()]
        except OSError:
            continue  # ended meanwhile
        found += 1
    return found, total


def main() -> None:
    """Run the command with this process's standard streams; exit with 0 whatever its own exit code, which is in the result."""
    result, command = sys.argv[1], sys.argv[2:]
    done = threading.Event()
    peak = 0

    def watch(pid: int) -> None:
        nonlocal peak
        while not done.wait(0.05):
            children, total = tree_rss(pid)
            if children > 0:
                peak = max(peak, total)

    # Handlers, not SIG_IGN: the command must not inherit it. A Ctrl-C reaches the command by itself.
    signal.signal(signal.SIGINT, lambda *_: None)
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    threading.Thread(target=watch, args=(pid,), daemon=True).start()
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    done.set()
    measured = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_rss": max(usage.ru_maxrss * 1024, peak),
    }
    with open(result, "w", encoding="ascii") as file:
        json.dump(measured, file)


if __name__ == "__main__":
    main()
