"""The command line: ``df11 convert`` (also ``df11-convert``), ``verify``, ``restore``, ``inspect``.

Each command imports its dependencies when it runs: NumPy alone takes ten times as long as Python's own start.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from df11.converter.options import (
    DEFAULT_MEMORY,
    AllowMissing,
    Argument,
    Command,
    Debug,
    Exclude,
    Force,
    Include,
    Json,
    Option,
    Quiet,
    Threads,
)
from df11.converter.terminal import Bar, VerificationFailed, event, print_line, say
from df11.formats import errors

if TYPE_CHECKING:
    from df11.converter.convert import ConversionReport, FileReport

ContainerPath = Annotated[Path, Argument(metavar="PATH", help="A .df11 file or a folder of them.")]


def convert_command(
    src: Annotated[
        str,
        Argument(metavar="SRC", help="A .safetensors file or a folder, or hf://owner/name@revision/path on the Hub."),
    ],
    dst: Annotated[str, Argument(metavar="DST", help="A .df11 file for a file, a folder for a folder.")],
    threads: Threads = None,
    max_memory: Annotated[
        str, Option("--max-memory", metavar="SIZE", help="Memory for the whole process.")
    ] = DEFAULT_MEMORY,
    max_disk: Annotated[
        str | None,
        Option(
            "--max-disk",
            metavar="SIZE",
            help="For unreliable networks: download shards from the Hub first, one at a time, within SIZE.",
            show_default=False,
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    allow_missing: AllowMissing = False,
    shapes: Annotated[
        str | None,
        Option(
            "--shapes",
            metavar="ORIGINAL",
            help="Of a DFloat11 checkpoint: the original model, whose headers tell shapes; a path, or hf://owner/name.",
            show_default=False,
        ),
    ] = None,
    cast: Annotated[
        str | None, Option("--cast", metavar="bf16", help="Round F32 tensors to BF16.", show_default=False)
    ] = None,
    keep_f32: Annotated[
        list[str] | None,
        Option("--keep-f32", metavar="PATTERN", help="Tensors that --cast leaves alone, or @wan etc.; repeatable."),
    ] = None,
    verify: Annotated[
        bool, Option("--verify/--no-verify", help="Decode and compare everything before writing it.")
    ] = True,
    resume: Annotated[bool, Option("--resume/--no-resume", help="Keep finished outputs of the same source.")] = True,
    force: Force = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be done; write nothing.")] = False,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a safetensors file, or a whole model folder, to .df11."""
    del debug
    from df11.converter.convert import convert

    def on_file(report: FileReport) -> None:
        if json_lines:
            event("file", **asdict(report))
        elif report.status == "planned" and not quiet:
            names = f"{_path(report.source)} -> {_path(report.output)}"
            print_line(f"{names}: {report.source_bytes:,} bytes, {report.tensors} tensors")

    with Bar("convert", quiet=quiet or dry_run) as bar:
        report = convert(
            src,
            dst,
            threads=threads,
            max_memory=max_memory,
            max_disk=max_disk,
            cast=_cast(cast),
            keep_f32=keep_f32 or (),
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing,
            shapes=shapes,
            verify=verify,
            resume=resume,
            force=force,
            dry_run=dry_run,
            on_total=bar.total,
            on_progress=bar.advance,
            on_file=on_file,
        )
    if json_lines:
        event(
            "done",
            files=len(report.files),
            source_bytes=report.source_bytes,
            output_bytes=report.output_bytes,
            ratio=round(report.ratio, 6),
            seconds=round(report.seconds, 3),
            copied=report.copied,
        )
    elif dry_run:
        say(
            f"{len(report.files)} files would be converted and {report.copied} copied; nothing was written", quiet=quiet
        )
    else:
        say(_summary(report, is_cast=cast is not None), quiet=quiet)


def _path(path: str) -> str:
    return errors.printable(path, errors.MOST_OF_A_PATH)


def _cast(value: str | None) -> Literal["bf16"] | None:
    if value is None:
        return None
    if value == "bf16":
        return "bf16"
    raise errors.UsageError("--cast", expected="bf16", found=value)


def _summary(report: ConversionReport, *, is_cast: bool) -> str:
    skipped = sum(file.status == "skipped" for file in report.files)
    text = f"{report.source_bytes:,} -> {report.output_bytes:,} bytes ({report.ratio:.4f}) in {report.seconds:.1f} s"
    text += f", {len(report.files)} files"
    if skipped:
        text += f", {skipped} of them already finished"
    if report.copied:
        text += f", plus {report.copied} copied"
    casts = sum(file.cast_tensors for file in report.files)
    if casts:
        exact = sum(file.exact_tensors for file in report.files)
        text += f"; {casts} F32 tensors stored as BF16, {exact} of them without loss"
    if not is_cast and (left := sum(file.f32_tensors for file in report.files)):
        text += f"; {left} F32 tensors are not BF16: --cast bf16 would round them"
    return text


def verify_command(
    path: ContainerPath,
    against: Annotated[
        str | None,
        Option(
            "--against",
            metavar="SRC",
            help="Also compare with this source, bit for bit: a path, or hf://owner/name on the Hub.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decode everything and check every checksum."""
    del debug
    from df11.converter.verify import verify

    try:
        with Bar("verify", quiet=quiet) as bar:
            report = verify(path, against, threads=threads, on_total=bar.total, on_progress=bar.advance)
    except (errors.FormatError, errors.SafetensorsError) as error:
        raise VerificationFailed(error) from error
    if json_lines:
        event("done", **asdict(report))
    compared = "equal to the source" if report.compared else "all checksums correct"
    say(f"{report.files} files, {report.tensors} tensors, {report.bytes:,} decoded bytes: {compared}", quiet=quiet)


def restore_command(
    path: ContainerPath,
    dst: Annotated[Path, Argument(metavar="DST", help="A file for a file, a folder for a folder.")],
    bf16: Annotated[
        bool, Option("--bf16", help="If a cast changed values, write a BF16 safetensors file instead.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    allow_missing: AllowMissing = False,
    threads: Threads = None,
    force: Force = False,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the original file back, byte for byte, proven by its SHA-256."""
    del debug
    from df11.converter.restore import restore

    with Bar("restore", quiet=quiet) as bar:
        report = restore(
            path,
            dst,
            bf16=bf16,
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing,
            force=force,
            threads=threads,
            on_total=bar.total,
            on_progress=bar.advance,
        )
    for file in report.files:
        if json_lines:
            event("file", **asdict(file))
        proof = "written as BF16, so not the source" if file.bf16 else "SHA-256 is the source's"
        say(f"{_path(file.output)}: {file.bytes:,} bytes, SHA-256 {file.sha256}, {proof}", quiet=quiet)
    if json_lines:
        event("done", files=len(report.files), bytes=sum(file.bytes for file in report.files), copied=report.copied)


def export_command(
    model: ContainerPath,
    out: Annotated[Path, Argument(metavar="OUT", help="A file for a file, a folder for a folder.")],
    to: Annotated[
        str | None, Option("--to", metavar="LAYOUT", help="dfloat11 or safetensors.", show_default=False)
    ] = None,
    patterns: Annotated[
        Path | None,
        Option(
            "--patterns",
            metavar="FILE",
            help="For dfloat11, of a model that is not known: a JSON file with its pattern_dict.",
            show_default=False,
        ),
    ] = None,
    file_per_unit: Annotated[bool, Option("--file-per-unit", help="For dfloat11: a file for each unit.")] = False,
    threads: Threads = None,
    force: Force = False,
    json_lines: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a converted model as DFloat11's loaders read it, or as plain safetensors files."""
    del debug
    from df11.converter.export import export

    with Bar("export", quiet=quiet) as bar:
        report = export(
            model,
            out,
            to or "",
            patterns=patterns,
            file_per_unit=file_per_unit,
            threads=threads,
            force=force,
            on_total=bar.total,
            on_progress=bar.advance,
        )
    if json_lines:
        for file in report.files:
            event("file", **asdict(file))
        event("done", files=len(report.files), bytes=report.bytes, units=report.units, seconds=round(report.seconds, 3))
    say(f"{len(report.files)} files, {report.bytes:,} bytes in {report.seconds:.1f} s", quiet=quiet)


def inspect_command(path: ContainerPath, json_lines: Json = False, debug: Debug = False) -> None:
    """List tensors, sizes and the source's hash; of a DFloat11 checkpoint, its units."""
    del debug
    from df11.converter.dfloat11 import describe as dfloat11
    from df11.converter.files import list_containers
    from df11.converter.inspect import as_text, describe
    from df11.formats.container import Container

    checkpoints = dfloat11.describe(path)
    for checkpoint in checkpoints:
        print_line(json.dumps(checkpoint) if json_lines else dfloat11.as_text(checkpoint))
    for file in [] if checkpoints else list_containers(path):
        with Container(file) as container:
            description = describe(container)
        print_line(json.dumps(description) if json_lines else as_text(description))


COMMANDS: Final[dict[str, Command]] = {
    "convert": convert_command,
    "verify": verify_command,
    "restore": restore_command,
    "export": export_command,
    "inspect": inspect_command,
}
