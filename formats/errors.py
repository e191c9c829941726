"""Errors of the whole package: one class per kind of violation, each with its exit code for the command line.

An error says in one line what is wrong, where (file, tensor, offset), what was expected and found, and what to do next.
"""

from __future__ import annotations

import os
from typing import ClassVar, Final


class Df11Error(Exception):
    """Base of every error that df11 raises deliberately.

    ``what`` says what is wrong; the keywords say where, and what to do next. All are kept as attributes.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        self.offset = offset
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        where = [] if self.file is None else [printable(self.file, MOST_OF_A_PATH)]
        if self.tensor is not None:
            where.append(f"tensor {shortened(self.tensor)}")
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        what = printable(" ".join(self.what.split()), MOST_OF_A_SENTENCE)
        text = f"{', '.join(where)}: {what}" if where else what
        details = [
            f"{word} {printable(str(value))}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if details:
            text += f" ({', '.join(details)})"
        if self.hint is not None:
            text += f"; {printable(' '.join(self.hint.split()), MOST_OF_A_SENTENCE)}"
        return text


MOST_OF_A_VALUE: Final = 200
MOST_OF_A_PATH: Final = 1000
MOST_OF_A_SENTENCE: Final = 2000


def printable(text: str, most: int | None = MOST_OF_A_VALUE) -> str:
    """A stranger's text, for one line, wherever it is shown.

    What is invisible, ends a line or turns its direction is escaped: U+202E as a backslash and ``u202e``. ``most``:
    characters that are kept; what is longer loses its middle.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]}...{text[-(most // 2) :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(name: str) -> str:
    """A name from a file, safe to print: quoted, without control characters, and at most one line long."""
    if len(name) > MOST_OF_A_VALUE:
        return f"{name[:MOST_OF_A_VALUE]!r}..."
    return repr(name)


# Errors in the request.


class UsageError(Df11Error):
    """The call or its options do not make sense."""


class MissingExtraError(Df11Error):
    """An optional dependency is not installed."""


class DeviceError(Df11Error):
    """No GPU can run the kernels, or something between it and Python is missing."""


class NotAllowedError(Df11Error):
    """The operating system or the Hub refuses access."""

    exit_code = 3


class MissingError(Df11Error):
    """A file, folder, tensor or repository does not exist."""

    exit_code = 4


class RetryLaterError(Df11Error):
    """Network or server trouble that may go away."""

    exit_code = 5


class BudgetError(Df11Error):
    """A limit on memory or disk space cannot be kept."""

    exit_code = 6


class ConflictError(Df11Error):
    """Someone else has changed the same file, or is writing it."""

    exit_code = 7


class DifferenceError(Df11Error):
    """Decoded data differs from the data it is compared with."""

    exit_code = 1


# safetensors framing, of sources and containers alike.


class SafetensorsError(Df11Error):
    """A file is not a valid safetensors file."""


class TruncatedFileError(SafetensorsError):
    """The file ends before its header or its data do."""


class HeaderTooLargeError(SafetensorsError):
    """The header size is beyond the limit, or beyond the file."""


class HeaderJsonError(SafetensorsError):
    """The header is not the JSON that safetensors prescribes."""


class DtypeError(SafetensorsError):
    """The header names a dtype that safetensors does not have."""


class TensorSizeError(SafetensorsError):
    """A tensor's byte range does not fit its dtype and shape."""


class TensorRangeError(SafetensorsError):
    """Byte ranges overlap, leave a hole, or reach past the end of the file."""


# A checkpoint of DFloat11, docs/dfloat11.md.


class CheckpointError(Df11Error):
    """A DFloat11 checkpoint breaks a rule of its layout, or a model cannot be written in it."""


# The manifest, docs/manifest.md.


class ManifestError(Df11Error):
    """The manifest of a model folder is damaged, or is not a manifest."""


# The container, formats/SPEC.md sections 2 and 3.


class FormatError(Df11Error):
    """A file breaks a rule of formats/SPEC.md."""


class NotDf11Error(FormatError):
    """A safetensors file without df11 metadata."""


class VersionError(FormatError):
    """A container or record of a version that this program does not know."""


class FeatureError(FormatError):
    """The container requires a feature that this program does not know."""


class MetadataError(FormatError):
    """A `df11.` key is missing, or its value is invalid."""


class EntryError(FormatError):
    """An entry does not match its tensor object, or is misaligned."""


class LimitError(FormatError):
    """A number is beyond the limits of the specification, or JSON is larger than a reader takes."""


class SourceHeaderError(FormatError):
    """The stored source header does not decompress, or does not match the tensors."""


# The record, sections 4 to 8.


class RecordHeaderError(FormatError):
    """The record's magic, sizes, counts or reserved bytes are wrong."""


class DirectoryError(FormatError):
    """A segment's offset, size or weight count is wrong."""


class SegmentHeaderError(FormatError):
    """A segment's encoding, counts or section offsets are wrong."""


class CodeTableError(FormatError):
    """The alphabet does not ascend, or the code is not complete."""


class TileError(FormatError):
    """A tile's position, lane lengths or exceptions do not fit its section."""


class LaneError(FormatError):
    """A lane's codes do not end where its length says."""


class ChecksumError(FormatError):
    """Stored or decoded bytes do not match their checksum in the file."""


def missing_extra(module: str, extra: str) -> MissingExtraError:
    """The error for a dependency that is not installed."""
    return MissingExtraError(f"the package {module!r} is not installed", hint=f"run: pip install 'df11[{extra}]'")


def from_os_error(error: OSError, *, file: str | os.PathLike[str] | None = None) -> Df11Error:
    """The Df11Error for an error of the operating system."""
    import errno

    path = file if file is not None else error.filename
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BudgetError(reason, file=path, hint="free some disk space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotAllowedError(reason, file=path, hint="check the permissions of this path")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return MissingError(reason, file=path, hint="check the path")
    return UsageError(reason, file=path)
