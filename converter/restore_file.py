"""Restore the safetensors file that a container was made from, byte for byte, and prove it by its SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from df11.converter.ordered import ordered
from df11.converter.source import Progress
from df11.formats import errors, framing
from df11.formats.container import Container
from df11.formats.record import Bytes, Record, Scratch, Weights, weights_dtype


@dataclass(frozen=True, slots=True)
class RestoredLayout:
    """A safetensors file to be written from a container."""

    header: bytes
    entries: tuple[framing.Entry, ...]
    """Its tensors, in order."""
    size: int
    """Bytes."""
    sha256: str | None
    """The source's SHA-256; None for a file with BF16 values where a cast changed some."""


def restored_layout(container: Container, *, bf16: bool) -> RestoredLayout:
    """The file that a container restores to. Raises UsageError if a cast changed values, unless ``bf16`` is set."""
    source = container.source_header
    changed = [entry.name for entry in source.entries if container.info(entry.name).exact is False]
    if not changed:
        return RestoredLayout(source.raw, source.entries, container.source.bytes, container.source.sha256)
    if not bf16:
        raise errors.UsageError(
            "the source cannot be restored: "
            f"rounding to BF16 changed {len(changed)} of its {len(source.entries)} tensors",
            file=container.path,
            tensor=changed[0],
            hint="pass --bf16 to write a BF16 safetensors file instead",
        )
    entries = []
    position = 0
    for entry in source.entries:
        info = container.info(entry.name)
        size = entry.size if info.exact is None else entry.size // 2
        entries.append(framing.Entry(entry.name, info.dtype, entry.shape, position, position + size))
        position += size
    header = (
        framing.encode_header(entries, source.metadata)
        if source.metadata
        else framing.compact_json(_without_metadata(entries))
    )
    header += b" " * (-len(header) % 8)
    return RestoredLayout(header, tuple(entries), 8 + len(header) + position, None)


def _without_metadata(entries: list[framing.Entry]) -> object:
    document = json.loads(framing.encode_header(entries, {}))
    del document["__metadata__"]
    return document


def restore_file(
    container: Container, target: RestoredLayout, write: Callable[[Bytes], object], threads: int, progress: Progress
) -> str:
    """Give a container back as ``target`` says, block by block, in order; returns the SHA-256.

    Raises a DifferenceError, after the last block, if that is not the source's. ``progress`` gets bytes written.
    """
    digest = hashlib.sha256()
    head = np.frombuffer(len(target.header).to_bytes(8, "little") + target.header, np.uint8)
    digest.update(head)
    write(head)
    progress(len(head))
    with ThreadPoolExecutor(1, "df11-hash") as hasher:
        for data in decoded_blocks(container, target.entries, threads):
            hashing = hasher.submit(digest.update, data)
            write(data)
            hashing.result()
            progress(len(data))
    sha256 = digest.hexdigest()
    if target.sha256 is not None and sha256 != target.sha256:
        what = "the restored file is not the source"
        raise errors.DifferenceError(what, file=container.path, expected=f"SHA-256 {target.sha256}", found=sha256)
    return sha256


def decoded_blocks(container: Container, entries: Iterable[framing.Entry], threads: int) -> Iterator[Bytes]:
    """The bytes of tensors, in the dtypes of ``entries``, one after the other, a few MiB at a time.

    A block is valid until the next one is requested.
    """

    def produce(task: tuple[Record, int, bool] | Bytes, scratch: tuple[Scratch, ...]) -> Bytes:
        # Decode one segment, or pass on verbatim bytes.
        if isinstance(task, np.ndarray):
            return task
        record, index, widen = task
        stored, decoded, widened = scratch
        weights = decoded.take(record.kind.bytes * record.segments[index].elements).view(weights_dtype(record.kind))
        record.read_segment(index, stored).decode(weights)
        return _widen(weights, widened.take(4 * len(weights)).view(np.uint32)) if widen else weights.view(np.uint8)

    def tasks() -> Iterator[tuple[Record, int, bool] | Bytes]:
        for entry in entries:
            info = container.info(entry.name)
            widen = info.exact is not None and entry.dtype == "F32"
            if info.encoding == "df11":
                record = container.record(entry.name)
                yield from ((record, index, widen) for index in range(len(record.segments)))
            else:
                for chunk in container.verbatim_blocks(entry.name):
                    yield _widen(chunk.view(np.uint16), np.empty(len(chunk) // 2, np.uint32)) if widen else chunk

    return (data for _, data in ordered(produce, tasks(), threads))


def _widen(weights: Weights, out: npt.NDArray[np.uint32]) -> Bytes:
    # BF16 weights as the bytes of F32 values.
    np.left_shift(weights, np.uint32(16), out=out, dtype=np.uint32)
    return out.view(np.uint8)
