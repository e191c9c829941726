"""The whole command line: the converter's commands, and ``df11 job``, ``df11 hub``, ``df11 report``."""

from __future__ import annotations

import dataclasses
import enum
import json
import time
from pathlib import Path
from typing import Annotated, Any, Final

from df11.converter import cli, terminal
from df11.converter.options import (
    AllowMissing,
    Argument,
    Debug,
    Exclude,
    Force,
    Group,
    Include,
    Json,
    Option,
    Quiet,
    Threads,
)
from df11.formats import errors

JobFile = Annotated[Path, Argument(metavar="JOB.toml", help="A job file; see docs/jobs.md.")]


class EngineName(enum.StrEnum):
    """What works on the shards."""

    PROCESS = "process"
    RAY = "ray"


class _Log:
    # Prints events as JSON lines, or as text for people.
    def __init__(self, *, json_lines: bool, quiet: bool) -> None:
        self._json, self._quiet = json_lines, quiet

    def __call__(self, event: str, **values: Any) -> None:
        if self._json:
            line = json.dumps({"event": event, "time": terminal.now(), **values})
            terminal.print_line(terminal.redacted(line))
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
            return f"{errors.printable(values['file'])}: {values['status']}, {sizes} in {seconds:.1f} s"
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
        Option("--engine", help="Where to work: in this process, or on the Ray cluster that RAY_ADDRESS names."),
    ] = EngineName.PROCESS,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Run a job file. Run again, it continues where it stopped, or does nothing."""
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
    """Show what a job would do, with sizes and needs; nothing is changed."""
    del debug
    from df11.pipelines.job import read_job
    from df11.pipelines.prepare import prepare
    from df11.pipelines.run import describe

    todo = read_job(job)
    log = _Log(json_lines=json_lines, quiet=not json_lines)
    for model in todo.models:
        plan = describe(prepare(model, todo.limits))
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
        rows.append(f"  {errors.printable(file['file'])}: {what}")
    rows += [f"  {errors.printable(name)}: removed, as the source no longer has it" for name in plan["removed"]]
    commit = f" at commit {plan['commit']}" if plan["commit"] else ""
    needs = (
        f"needs {size(memory)} of memory, and up to {size(plan['disk_bytes'])} of disk for files before their upload"
    )
    return "\n".join([f"{plan['source']}{commit} -> {plan['target']}", *rows, f"  {needs}"])


def hub_push(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="A converted model folder.")],
    target: Annotated[
        str, Argument(metavar="TARGET", help="owner/name or hf://owner/name@branch; created if it does not exist.")
    ],
    private: Annotated[bool, Option("--private", help="Create the repository private; refuse a public one.")] = False,
    public: Annotated[
        bool,
        Option(
            "--public", help="Create the repository public. Default: the Hub decides, but private if the source was."
        ),
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    allow_missing: AllowMissing = False,
    threads: Threads = None,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a converted model folder: verify it, write its model card, read back what was sent."""
    del debug
    from df11.pipelines.transfer import push

    if private and public:
        raise errors.UsageError("--private and --public", hint="give one of them")

    log = _Log(json_lines=json_lines, quiet=quiet)
    with terminal.Bar("push", quiet=quiet) as bar:
        report = push(
            folder,
            target,
            private=private or (False if public else None),
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing,
            threads=threads,
            log=log,
            on_total=bar.total,
            on_progress=bar.advance,
        )
    if json_lines:
        log("done", **dataclasses.asdict(report))
    else:
        terminal.say(
            f"{report.target}: {report.delivered} files sent, {report.kept} already there, commit {report.commit}",
            quiet=quiet,
        )


def hub_pull(
    source: Annotated[str, Argument(metavar="SOURCE", help="owner/name, or hf://owner/name@revision/folder.")],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The folder to write to.")],
    include: Include = None,
    exclude: Exclude = None,
    allow_missing: AllowMissing = False,
    force: Force = False,
    threads: Threads = None,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Download a converted model folder: every hash is compared with the Hub's, every new container verified."""
    del debug
    from df11.pipelines.transfer import pull

    with terminal.Bar("pull", quiet=quiet) as bar:
        report = pull(
            source,
            folder,
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing,
            force=force,
            threads=threads,
            on_total=bar.total,
            on_progress=bar.advance,
        )
    if json_lines:
        terminal.event("done", **dataclasses.asdict(report))
    else:
        terminal.say(
            f"{folder}: {report.fetched} files fetched, {report.kept} already there, {report.bytes:,} bytes; "
            "all hashes and checksums correct",
            quiet=quiet,
        )


def report_command(
    model: Annotated[str, Argument(metavar="MODEL", help="A converted model folder, or hf://owner/name.")],
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Folder for report.html and its pictures.")
    ] = Path("df11-report"),
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw the contents of a converted model folder: a page and pictures, from its manifest."""
    del debug
    from df11.pipelines.report import write_report

    for path in write_report(model, output, force=force):
        terminal.say(str(path), quiet=quiet)


COMMANDS: Final = Group(
    "BF16 models a third smaller, without changing a bit.",
    {
        **cli.COMMANDS,
        "report": report_command,
        "job": Group("Convert models from the Hub to the Hub, unattended.", {"run": job_run, "plan": job_plan}),
        "hub": Group("Upload and download converted model folders.", {"push": hub_push, "pull": hub_pull}),
    },
)


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    return terminal.run(COMMANDS, arguments)
