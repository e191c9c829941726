"""The whole command line: the converter's commands, and ``df11 job``, ``df11 hub``, ``df11 report``."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import time
from pathlib import Path
from typing import Annotated, Any, Final

from df11.converter import cli, terminal
from df11.converter.options import Argument, Debug, Force, Group, Json, Option, Quiet, Threads

JobFile = Annotated[Path, Argument(metavar="JOB.toml", help="A job file; docs/jobs.md describes it.")]


class EngineName(enum.StrEnum):
    """Who works on the shards."""

    PROCESS = "process"
    RAY = "ray"


class _Log:
    # Events as JSON lines, or as words for people.
    def __init__(self, *, json_lines: bool, quiet: bool) -> None:
        self._json, self._quiet = json_lines, quiet

    def __call__(self, event: str, **values: Any) -> None:
        if self._json:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            terminal.print_line(terminal.redacted(json.dumps({"event": event, "time": now, **values})))
        if (text := _in_words(event, values)) is not None and (event == "error" or not (self._quiet or self._json)):
            terminal.say(terminal.redacted(text))


def _in_words(event: str, values: dict[str, Any]) -> str | None:
    from df11.pipelines.wording import size

    match event:
        case "plan":
            planned = [file for file in values["files"] if file["status"] == "planned"]
            return f"{values['source']} -> {values['target']}: {len(planned)} of {len(values['files'])} files to do"
        case "file":
            seconds = sum(values["seconds"].values())
            sizes = f"{size(values['source_bytes'])} -> {size(values['output_bytes'])}"
            return f"{values['file']}: {values['status']}, {sizes} in {seconds:.1f} s"
        case "retry":
            return f"{values['message']}; trying again in {values['seconds']:.0f} s"
        case "checked":
            return f"{values['target']}: {values['files']} files read back, all as sent"
        case "error":
            return f"df11: {values['message']}"
        case _:
            return None


def job_run(
    job: JobFile,
    engine: Annotated[
        EngineName,
        Option("--engine", help="Work in this process, or on the Ray cluster that RAY_ADDRESS names."),
    ] = EngineName.PROCESS,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Do what a job file says; run again, it goes on where it was, or does nothing."""
    del debug
    from df11.pipelines.job import read_job
    from df11.pipelines.run import run_job

    todo = read_job(job)
    log = _Log(json_lines=json_lines, quiet=quiet)
    started = time.monotonic()
    with terminal.Bar("job", quiet=quiet) as bar:
        report = run_job(todo, on_ray=engine is EngineName.RAY, log=log, on_total=bar.total, on_progress=bar.advance)
    source, output = sum(one.source_bytes for one in report.models), sum(one.output_bytes for one in report.models)
    if json_lines:
        log(
            "done",
            models=len(report.models),
            failed=len(report.failures),
            source_bytes=source,
            output_bytes=output,
            seconds=round(time.monotonic() - started, 3),
        )
    elif report.models:
        terminal.say(
            f"{len(report.models)} models done: {source:,} -> {output:,} bytes in {time.monotonic() - started:.1f} s",
            quiet=quiet,
        )
    return report.failures[0][1].exit_code if report.failures else 0


def job_plan(job: JobFile, json_lines: Json = False, debug: Debug = False) -> None:
    """Say what a job would do, with sizes and needs; nothing is changed."""
    del debug
    from df11.pipelines.job import read_job
    from df11.pipelines.plan import plan_model
    from df11.pipelines.run import describe

    todo = read_job(job)
    log = _Log(json_lines=json_lines, quiet=not json_lines)
    for model in todo.models:
        plan = describe(plan_model(model, todo.limits))
        if json_lines:
            log("plan", **plan)
        else:
            terminal.print_line(_plan_in_words(plan, todo.limits.memory))


def _plan_in_words(plan: dict[str, Any], memory: int) -> str:
    from df11.pipelines.wording import size

    rows = []
    for file in plan["files"]:
        what = (
            "kept"
            if file["status"] == "kept"
            else f"{file['kind']}, {size(file['source_bytes'])} -> about {size(file['expected_bytes'])}"
        )
        rows.append(f"  {file['file']}: {what}")
    rows += [f"  {name}: removed, as the source no longer has it" for name in plan["removed"]]
    commit = f" at commit {plan['commit']}" if plan["commit"] else ""
    needs = f"needs {size(memory)} of memory and up to {size(plan['disk_bytes'])} of disk for files waiting for their upload"
    return "\n".join([f"{plan['source']}{commit} -> {plan['target']}", *rows, f"  {needs}"])


def hub_push(
    tree: Annotated[Path, Argument(metavar="TREE", help="A converted folder.")],
    target: Annotated[
        str, Argument(metavar="TARGET", help="hf://owner/name or hf://owner/name@branch; created if it is not there.")
    ],
    private: Annotated[bool, Option("--private", help="Create the repository private; refuse a public one.")] = False,
    threads: Threads = None,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a converted folder: verify it, write its card, read back what was sent."""
    del debug
    from df11.pipelines.transfer import push

    log = _Log(json_lines=json_lines, quiet=quiet)
    with terminal.Bar("push", quiet=quiet) as bar:
        report = push(tree, target, private=private, jobs=threads, log=log, on_total=bar.total, on_progress=bar.advance)
    if json_lines:
        log("done", **dataclasses.asdict(report))
    else:
        terminal.say(
            f"{report.target}: {report.delivered} files sent, {report.kept} there already, commit {report.commit}",
            quiet=quiet,
        )


def hub_pull(
    source: Annotated[str, Argument(metavar="SOURCE", help="hf://owner/name, also with @revision or /folder.")],
    folder: Annotated[Path, Argument(metavar="DIR", help="Where to.")],
    force: Force = False,
    threads: Threads = None,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Download a converted tree: every hash is compared with the Hub's, every container verified."""
    del debug
    from df11.pipelines.transfer import pull

    with terminal.Bar("pull", quiet=quiet) as bar:
        report = pull(source, folder, force=force, jobs=threads, on_total=bar.total, on_progress=bar.advance)
    if json_lines:
        terminal.event("done", **dataclasses.asdict(report))
    else:
        terminal.say(
            f"{folder}: {report.fetched} files fetched, {report.kept} there already, {report.bytes:,} bytes; all hashes and checksums right",
            quiet=quiet,
        )


def report_command(
    tree: Annotated[str, Argument(metavar="TREE", help="A converted folder, or hf://owner/name.")],
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Folder for report.html and its pictures.")
    ] = Path("df11-report"),
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw what is in a converted tree: a page and pictures, from its manifest."""
    del debug
    from df11.pipelines.report import write_report

    for path in write_report(tree, output):
        terminal.say(str(path), quiet=quiet)


COMMANDS: Final = Group(
    "BF16 models a third smaller, without changing a bit.",
    {
        **cli.COMMANDS,
        "report": report_command,
        "job": Group("Convert models unattended: from the Hub to the Hub.", {"run": job_run, "plan": job_plan}),
        "hub": Group("Converted trees to and from the Hub.", {"push": hub_push, "pull": hub_pull}),
    },
)


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    return terminal.run(COMMANDS, arguments)
