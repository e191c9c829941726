"""A process that has imported everything, and forks to run df11's command line: a run then takes some hundredths of a
second. It is started with shim.c loaded, by machine.py; each line on its standard input is a request, as JSON.
"""

from __future__ import annotations

import _strptime  # noqa: F401
import ctypes
import encodings.idna  # noqa: F401
import json
import os
import signal
import ssl
import sys
import tempfile
import threading
import time
from typing import Any

import huggingface_hub
import huggingface_hub.lfs
import huggingface_hub.repocard
import jinja2
import markupsafe  # noqa: F401
import pyarrow.parquet  # noqa: F401
from huggingface_hub import file_download, hf_api  # noqa: F401
from huggingface_hub.utils import _http

from df11.__main__ import _run
from df11.converter import apply, convert, pipeline, restore, scan, verify  # noqa: F401
from df11.pipelines import canvas, card, cli, job, plots, prepare, report, run, transfer  # noqa: F401
from df11.storage import client, download, hub, local  # noqa: F401
from tests.crash.broken import DEFECTS

PATIENCE = 60.0
"""Seconds a run may take."""
MODES = ("off", "watch", "kill", "fail", "fail on", "short", "stop")


def prepare_process() -> None:
    """Whatever takes long and writes nothing, before the fork: certificates, the client's session."""
    context = ssl.create_default_context()
    ssl.create_default_context = lambda *_, **__: context  # type: ignore[assignment]
    client.WAITS = (0.01, 0.01)
    _http.time = type("Impatient", (), {**vars(time), "sleep": staticmethod(lambda _: None)})  # type: ignore[assignment]
    run.draw_plots = lambda _manifest: {plots.path(name): name.encode() for name in plots.NAMES}  # type: ignore[assignment]
    huggingface_hub.HfApi()
    jinja2.Environment(autoescape=True).from_string("{{ a }}").render(a=1)
    tempfile.gettempdir()  # Python tries out where it may write.


def be_the_command(request: dict[str, Any]) -> None:
    """The forked process: df11's own main, watched from its first to its last call."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["root"])
    os.environ.update(request["environment"])
    kinds = " ".join(request["kinds"]).encode()
    number, error = request["at"], request["error"]
    ctypes.CDLL(None).arm(
        request["root"].encode(), log, MODES.index(request["mode"]), ctypes.c_long(number), error, kinds
    )
    if request["broken"]:
        DEFECTS[request["broken"]]()
    code = _run(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    os._exit(code)


def wait(process: int) -> dict[str, Any]:
    """How a forked process ended, or that it has stopped."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED)
        if found:
            return {"stopped": True} if os.WIFSTOPPED(status) else {"code": os.waitstatus_to_exitcode(status)}
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return {"hang": True}


def main() -> None:
    """Answer requests until there are none."""
    prepare_process()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "start":
                process = os.fork()
                if process == 0:
                    be_the_command(request)
                answer: dict[str, Any] = {"process": process}
            case "wait":
                answer = wait(request["process"])
            case "continue":
                os.kill(request["process"], signal.SIGCONT)
                answer = {}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
