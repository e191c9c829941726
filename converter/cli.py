"""The command line: ``df11 convert`` (also ``df11-convert``), ``verify``, ``restore``, ``inspect``."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final, Literal, Self

import typer

from df11.converter.convert import DEFAULT_MEMORY, ConversionReport, FileReport, convert
from df11.converter.inspect import as_text, describe
from df11.converter.restore import restore
from df11.converter.tree import list_containers
from df11.converter.verify import verify
from df11.formats import compiled, errors
from df11.formats.container import Container
from df11.version import __version__

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="BF16 models a third smaller, without changing a bit."
)

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", metavar="N", help="Threads that encode or decode. [default: one a core]", show_default=False)
]
ContainerPath = Annotated[Path, typer.Argument(metavar="PATH", help="A .df11 file or a folder of them.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"df11 {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


_INTERRUPTED: Final = 130


class _Bar:
    # One progress bar over all files, on standard error, in bytes.
    def __init__(self, what: str, *, quiet: bool) -> None:
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                raise errors.missing_extra("tqdm", "convert") from None
            self._bar = tqdm(desc=what, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def total(self, size: int) -> None:
        if self._bar is not None:
            self._bar.reset(total=size)

    def advance(self, size: int) -> None:
        if self._bar is not None:
            self._bar.update(size)


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        typer.echo(text, err=True)


def _print(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
        raise errors.UsageError("nobody reads standard output any more") from None


def _event(event: str, **values: Any) -> None:
    _print(json.dumps({"event": event, **values}))


@app.command("convert")
def convert_command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A .safetensors file or a folder.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="A .df11 file for a file, a folder for a folder.")],
    jobs: Jobs = None,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of the whole process.")] = DEFAULT_MEMORY,
    cast: Annotated[str | None, typer.Option(metavar="bf16", help="Round F32 tensors to BF16.", show_default=False)] = None,
    verify: Annotated[bool, typer.Option(help="Decode and compare everything before it is written.")] = True,
    resume: Annotated[bool, typer.Option(help="Keep finished outputs of the same source.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a safetensors file, or a whole model folder, to .df11."""
    del debug

    def on_file(report: FileReport) -> None:
        if json_lines:
            _event("file", **asdict(report))
        elif report.status == "planned" and not quiet:
            _print(f"{report.source} -> {report.output}: {report.source_bytes:,} bytes, {report.tensors} tensors")

    with _Bar("convert", quiet=quiet or dry_run) as bar:
        report = convert(
            src,
            dst,
            jobs=jobs,
            max_memory=max_memory,
            cast=_cast(cast),
            verify=verify,
            resume=resume,
            force=force,
            dry_run=dry_run,
            on_total=bar.total,
            on_progress=bar.advance,
            on_file=on_file,
        )
    if json_lines:
        _event(
            "done",
            files=len(report.files),
            source_bytes=report.source_bytes,
            output_bytes=report.output_bytes,
            ratio=round(report.ratio, 6),
            seconds=round(report.seconds, 3),
            copied=report.copied,
        )
    elif dry_run:
        _say(f"{len(report.files)} files would be converted and {report.copied} copied; nothing was written", quiet=quiet)
    else:
        _say(_summary(report), quiet=quiet)


def _cast(value: str | None) -> Literal["bf16"] | None:
    if value is None:
        return None
    if value == "bf16":
        return "bf16"
    raise errors.UsageError("--cast", expected="bf16", found=value)


def _summary(report: ConversionReport) -> str:
    skipped = sum(file.status == "skipped" for file in report.files)
    text = f"{report.source_bytes:,} -> {report.output_bytes:,} bytes ({report.ratio:.4f}) in {report.seconds:.1f} s, {len(report.files)} files"
    if skipped:
        text += f", {skipped} of them finished before"
    if report.copied:
        text += f", {report.copied} others copied"
    casts = sum(file.cast_tensors for file in report.files)
    if casts:
        exact = sum(file.exact_tensors for file in report.files)
        text += f"; {casts} tensors cast from F32, {exact} of them without any change"
    return text


@app.command("verify")
def verify_command(
    path: ContainerPath,
    against: Annotated[Path | None, typer.Option(metavar="SRC", help="Also compare with this source, bit for bit.", show_default=False)] = None,
    jobs: Jobs = None,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decode everything and check every checksum."""
    del debug
    try:
        with _Bar("verify", quiet=quiet) as bar:
            report = verify(path, against, jobs=jobs, on_total=bar.total, on_progress=bar.advance)
    except (errors.FormatError, errors.SafetensorsError) as error:
        raise _Failed(error) from error
    if json_lines:
        _event("done", **asdict(report))
    compared = "equal to the source" if report.compared else "all checksums right"
    _say(f"{report.files} files, {report.tensors} tensors, {report.bytes:,} decoded bytes: {compared}", quiet=quiet)


class _Failed(Exception):  # noqa: N818 - not an error of its own
    # A verification that failed, for whatever reason: exit code 1.
    def __init__(self, error: errors.Df11Error) -> None:
        self.error = error


@app.command("restore")
def restore_command(
    path: ContainerPath,
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A file for a file, a folder for a folder.")],
    bf16: Annotated[bool, typer.Option("--bf16", help="Where a cast has changed values, write a BF16 safetensors file.")] = False,
    jobs: Jobs = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the source back, byte for byte, proven by its SHA-256."""
    del debug
    with _Bar("restore", quiet=quiet) as bar:
        report = restore(path, dst, bf16=bf16, force=force, jobs=jobs, on_total=bar.total, on_progress=bar.advance)
    for file in report.files:
        if json_lines:
            _event("file", **asdict(file))
        proof = "written as BF16; not the source" if file.bf16 else "SHA-256 is the source's"
        _say(f"{file.output}: {file.bytes:,} bytes, SHA-256 {file.sha256}, {proof}", quiet=quiet)
    if json_lines:
        _event("done", files=len(report.files), bytes=sum(file.bytes for file in report.files), copied=report.copied)


@app.command("inspect")
def inspect_command(path: ContainerPath, json_lines: Json = False, debug: Debug = False) -> None:
    """List tensors, sizes and the source's hash."""
    del debug
    for file in list_containers(path):
        with Container(file) as container:
            description = describe(container)
        _print(json.dumps(description) if json_lines else as_text(description))


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code: an error is one line on standard error."""
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, _terminate)  # A cancelled CI job cleans up like an interrupted one.
    if "--quiet" not in arguments and "-q" not in arguments:
        compiled.announce = functools.cache(lambda text: print(f"df11: {text}", file=sys.stderr))  # noqa: T201 - once
    try:
        code = app(args=arguments or ["--help"], prog_name="df11", standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt  # Typer has made an exit code of it.
    except BaseException as error:
        if debug:
            traceback.print_exc()
        text, code = _explain(error)
        print(f"df11: {text}", file=sys.stderr)  # noqa: T201
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> tuple[str, int]:
    match error:
        case _Failed():
            return f"verification failed: {error.error}", errors.DifferenceError.exit_code
        case errors.Df11Error():
            return str(error), error.exit_code
        case OSError():
            return _explain(errors.from_os_error(error))
        case MemoryError():
            return "out of memory; give a smaller --jobs", errors.BudgetError.exit_code
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted; run the same command again to go on", _INTERRUPTED
        case _ if hasattr(error, "format_message"):  # A usage error of Typer's; it shows no public class for them.
            return f"{error.format_message()} Try --help.", errors.UsageError.exit_code
        case _:
            return f"internal error, please report it: {type(error).__name__}: {error}; --debug shows where", 70
