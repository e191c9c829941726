"""Convert one file. One thread reads, one hashes, several encode; the caller's thread writes in the source's order.

Memory is a fixed number of slots, whatever the size of the file and its tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from df11.converter.batches import Batch, Fate, SourceTensor, list_tensors, make_batches, split_tensor
from df11.converter.encode import EncodedSegment, SegmentEncoder
from df11.converter.exponents import COUNTED_WEIGHTS, ExponentCounts, Exponents, summarized
from df11.converter.kernels import Sha256, cast_f32
from df11.converter.manifest import TensorRow
from df11.converter.output import ContainerOutput
from df11.converter.settings import BASE_MEMORY, HEADER_MEMORY, Settings, too_little_memory
from df11.converter.source import Progress, Source
from df11.formats import errors, framing
from df11.formats.container import OriginalFile
from df11.formats.record import Bytes, Weights
from df11.storage.atomic import AtomicWriter

TENSOR_MEMORY: Final = 2560
"""Bytes per tensor, from its entry to its row: 2460 measured on 100,000 tiny tensors that are read together."""
COUNTS_MEMORY: Final = 2560
"""Bytes of the counts in a large tensor's row, if every exponent occurs."""
PARQUET_MEMORY: Final = 40 << 20
"""Bytes that pyarrow takes to read and write manifests."""
ENCODER_MEMORY: Final = 4 << 20
"""Bytes that each encoding thread takes, besides its slot's buffers."""
HEARTBEAT: Final = 0.5
"""Seconds between progress calls with zero bytes, while no bytes arrive."""
MIN_SLOTS: Final = 2


_M_MMAP_THRESHOLD: Final = -3
"""From malloc.h: blocks of at least this size are allocated from the system, and returned to it when freed."""


def give_memory_back() -> None:
    """Return freed buffers to the system, in this whole process: for programs, as a library must not decide that.

    glibc keeps freed blocks of up to 32 MiB, in an arena per thread. Over many shards, that adds 100 MiB.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Another C library.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@dataclass(frozen=True, slots=True)
class Converted:
    """The result for one file."""

    source_bytes: int
    output_bytes: int
    source_sha256: str
    tensors: int
    inexact: tuple[str, ...]
    """Tensors whose values the cast changed."""
    rows: tuple[TensorRow, ...]
    """Rows of the manifest, in the order of the container; ``file`` is the container's name without its folder."""
    made_from: tuple[OriginalFile, ...]
    """The files that the source was decoded from; none if it was a file itself."""


@dataclass(frozen=True, slots=True)
class _Slot:
    # The memory of one batch on its way from the reader to the writer.
    input: Bytes
    output: Bytes
    weights: Weights
    encoder: SegmentEncoder


@dataclass(frozen=True, slots=True)
class _Outcome:
    # For one piece: its bytes in the source; a checksum, of its weights if coded, else of its bytes; its segment, or
    # None if verbatim; whether its cast was exact; its exponents, counted unless the whole tensor has too few.
    source: Bytes
    checksum: int
    segment: EncodedSegment | None
    exact: bool
    exponents: Exponents


def convert_file(source: Source, writer: AtomicWriter, settings: Settings, progress: Progress) -> Converted:
    """Convert one source into one container, ready to commit. Raises a Df11Error; the caller then drops the writer."""
    tensors = list_tensors(source.header, settings.cast)
    batches = make_batches(tensors)
    slots = _make_slots(batches, source, settings)
    output = ContainerOutput(writer, source, tensors, settings.cast)
    deferred = [tensor for tensor in tensors if tensor.fate is Fate.DEFER]
    inexact: dict[str, None] = {}
    checksums: dict[str, list[int]] = {}
    exponents: dict[str, Exponents] = {}
    digest = source.start_sha256()
    progress(source.header.data_start)
    for batch, outcomes in _process_batches(batches, list(slots), source, digest, settings, progress):
        for piece, outcome in zip(batch.pieces, outcomes, strict=True):
            tensor = piece.tensor
            name = tensor.entry.name
            checksums.setdefault(name, []).append(outcome.checksum)
            if not outcome.exact:
                inexact[name] = None
            if outcome.segment is not None:
                exponents[name] = _joined(exponents.get(name), outcome.exponents)
                output.write_segment(tensor, outcome.segment)
                if piece.last and output.end_record(tensor, exponents[name], exact=name not in inexact):
                    del checksums[name], exponents[name]
                elif piece.last:
                    deferred.append(tensor)
            elif tensor.fate is Fate.COPY:
                output.write_verbatim(tensor, outcome.source, last=piece.last)
        progress(batch.size)
    deferred.sort(key=lambda tensor: (-framing.DTYPE_BITS[tensor.target_dtype], tensor.entry.start))
    for tensor in deferred:
        name = tensor.entry.name
        _copy_deferred(
            tensor, source, slots[0], output, checksums.get(name, []), exponents.get(name), exact=name not in inexact
        )
    source.check_unchanged()
    sha256 = digest.hexdigest()
    output.finish(sha256)
    rows = tuple(output.rows)
    return Converted(source.size, writer.position, sha256, len(tensors), tuple(inexact), rows, output.made_from)


def _joined(one: Exponents, other: Exponents) -> Exponents:
    # The exponents of two parts of a tensor, or of the first.
    if isinstance(one, ExponentCounts) and isinstance(other, ExponentCounts):
        return ExponentCounts.of(one.array() + other.array())
    return other


@dataclass(frozen=True, slots=True)
class _Needs:
    # Bytes of memory: per slot and for its parts, for everything besides the slots, and the least in total.
    read: int
    write: int
    weights: int
    each: int
    base: int
    least: int


def least_memory(source: Source, tensors: Sequence[SourceTensor]) -> int:
    """The smallest ``max_memory``, in bytes, that can convert this source with these tensors."""
    return _needs(make_batches(tensors), source).least


def _needs(batches: list[Batch], source: Source) -> _Needs:
    pieces = [(piece, batch) for batch in batches for piece in batch.pieces]
    read = max((batch.size for batch in batches), default=0)
    write = max((batch.output_size for batch in batches), default=0)
    # A cast needs space for its weights; so does a tensor whose start is not aligned for its weights.
    weights = max(
        (p.weights for p, b in pieces if p.tensor.fate is Fate.CODE and (p.tensor.cast or (p.start - b.start) % 2)),
        default=0,
    )
    each = read + write + 2 * weights + ENCODER_MEMORY
    entries = source.header.entries
    base = BASE_MEMORY + HEADER_MEMORY * len(source.header.raw) + TENSOR_MEMORY * len(entries)
    base += COUNTS_MEMORY * sum(entry.elements >= COUNTED_WEIGHTS for entry in entries) + source.memory
    return _Needs(read, write, weights, each, base, base + MIN_SLOTS * each)


def _make_slots(batches: list[Batch], source: Source, settings: Settings) -> list[_Slot]:
    needs = _needs(batches, source)
    if settings.max_memory < needs.least:
        raise too_little_memory(source.path, needs.least, settings.max_memory)
    count = max(min((settings.max_memory - needs.base) // needs.each, settings.threads + 2, len(batches)), 1)
    return [
        _Slot(
            np.empty(needs.read, np.uint8),
            np.empty(needs.write, np.uint8),
            np.empty(needs.weights, np.uint16),
            SegmentEncoder(),
        )
        for _ in range(count)
    ]


def _process_batches(
    batches: list[Batch], free: list[_Slot], source: Source, digest: Sha256, settings: Settings, progress: Progress
) -> Iterator[tuple[Batch, list[_Outcome]]]:
    # Batches and their outcomes in order. An outcome is valid until the next one is requested.
    waiting: deque[tuple[Batch, _Slot, Future[list[_Outcome]]]] = deque()
    ahead = iter(batches)
    with ExitStack() as stack:

        def pool(threads: int, name: str) -> ThreadPoolExecutor:
            executor = ThreadPoolExecutor(threads, name)
            stack.callback(executor.shutdown, cancel_futures=True)
            return executor

        workers = pool(min(settings.threads, len(free)), "df11-encode")
        hasher = pool(1, "df11-hash")
        reader = pool(1, "df11-read")
        # After an error or an interrupt, the reader must not wait for a server, or its pool could not end.
        stack.push(lambda kind, *_: source.stop() if kind is not None else None)

        # A batch passes from stage to stage. The last stage, or one that fails, sets its outcomes.
        def read(batch: Batch, slot: _Slot, outcomes: Future[list[_Outcome]]) -> None:
            with _errors_to(outcomes):
                source.read(batch.start, slot.input[: batch.size])
                hasher.submit(hash_batch, batch, slot, outcomes)

        def hash_batch(batch: Batch, slot: _Slot, outcomes: Future[list[_Outcome]]) -> None:
            with _errors_to(outcomes):
                _hash(batch, slot, digest)
                workers.submit(encode, batch, slot, outcomes)

        def encode(batch: Batch, slot: _Slot, outcomes: Future[list[_Outcome]]) -> None:
            with _errors_to(outcomes):
                outcomes.set_result(_process(batch, slot, source.path, verify=settings.verify))

        while True:
            while free and (following := next(ahead, None)) is not None:
                waiting.append((following, free.pop(), Future()))
                reader.submit(read, *waiting[-1])
            if not waiting:
                break
            batch, slot, outcomes = waiting.popleft()
            while not wait([outcomes], HEARTBEAT).done:
                # A server can be silent for minutes. Meanwhile, the callback can cancel the work by raising an error.
                progress(0)
            yield batch, outcomes.result()
            free.append(slot)


@contextlib.contextmanager
def _errors_to(outcomes: Future[list[_Outcome]]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        outcomes.set_exception(error)


def _hash(batch: Batch, slot: _Slot, digest: Sha256) -> None:
    data = slot.input[: batch.size]
    piece = batch.pieces[0]
    is_one_segment = len(batch.pieces) == 1 and piece.tensor.fate is Fate.CODE and not piece.tensor.cast
    if is_one_segment and piece.weights > 1:
        slot.encoder.hash_weights(digest, data)
    else:
        digest.update(data)


def _process(batch: Batch, slot: _Slot, path: str, *, verify: bool) -> list[_Outcome]:
    outcomes = []
    used = 0
    for piece in batch.pieces:
        start = piece.start - batch.start
        source = slot.input[start : start + piece.size]
        if piece.tensor.fate is not Fate.CODE:
            outcomes.append(_Outcome(source, xxhash.xxh3_64_intdigest(source), None, True, None))
            continue
        weights, exact = _weights(source, slot.weights, cast=piece.tensor.cast)
        try:
            segment = slot.encoder.encode(weights, slot.output[used:], verify=verify)
        except errors.DifferenceError as error:
            raise errors.DifferenceError(
                f"the encoded data does not decode to the source ({error})",
                file=path,
                tensor=piece.tensor.entry.name,
                hint="this is a defect in df11 or in the memory of this machine: please report it",
            ) from None
        used += len(segment.data)
        exponents = summarized(slot.encoder.exponents, piece.tensor.entry.elements)
        outcomes.append(_Outcome(source, segment.decoded_checksum, segment, exact, exponents))
    return outcomes


def _weights(source: Bytes, scratch: Weights, *, cast: bool) -> tuple[Weights, bool]:
    # The BF16 weights of a piece, and whether they represent it exactly.
    if cast:
        bits = source.view(np.uint32)
        if not bits.flags.aligned:
            bits = bits.copy()
        out = scratch[: len(bits)]
        return out, cast_f32(bits, out)
    weights = source.view(np.uint16)
    if not weights.flags.aligned:
        scratch[: len(weights)] = weights
        weights = scratch[: len(weights)]
    return weights, True


def _copy_deferred(
    tensor: SourceTensor,
    source: Source,
    slot: _Slot,
    output: ContainerOutput,
    checksums: list[int],
    exponents: Exponents,
    *,
    exact: bool,
) -> None:
    # Read a tensor again; its bytes must be the ones that were hashed.
    if not tensor.entry.size:
        output.write_verbatim(tensor, np.empty(0, np.uint8), last=True, exact=exact)
    for piece, checksum in zip(split_tensor(tensor), checksums, strict=True):
        data = slot.input[: piece.size]
        source.read(piece.start, data)
        if tensor.cast:
            data = _weights(data, slot.weights, cast=True)[0].view(np.uint8)
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise source.changed(tensor.entry.name)
        output.write_verbatim(tensor, data, exponents, last=piece.last, exact=exact)
