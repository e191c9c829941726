"""Convert one file: one thread reads, one hashes, several encode, and the caller's thread writes, in the order of the source.

Memory is a fixed number of slots, whatever the size of the file and of its tensors.
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

from df11.converter.encode import EncodedSegment, SegmentEncoder
from df11.converter.kernels import Sha256, cast_f32
from df11.converter.manifest import COUNTED_WEIGHTS, ExponentCounts, Exponents, TensorRow, summarized
from df11.converter.output import ContainerOutput
from df11.converter.plan import Batch, Cast, Fate, TensorPlan, plan_batches, plan_tensors, split_tensor
from df11.converter.source import Progress, Source
from df11.formats import errors, framing
from df11.formats.record import Bytes, Weights
from df11.formats.writer import AtomicWriter

BASE_MEMORY: Final = 80 << 20
"""Bytes that the interpreter and its libraries keep: up to 66 MiB measured."""
HEADER_MEMORY: Final = 15
"""Bytes that the source's header and the new one take for each byte of the source's: 13.6 measured on one name of 12 MB."""
TENSOR_MEMORY: Final = 2560
"""Bytes that a tensor takes besides, from its plan to its row: 2460 measured on 100,000 tiny tensors that are all read at once."""
COUNTS_MEMORY: Final = 2560
"""Bytes of the counts that a row keeps of a tensor that is not small, if every exponent occurs in it."""
ENCODER_MEMORY: Final = 4 << 20
"""Bytes that a thread takes to encode, besides its slot's buffers."""
HEARTBEAT: Final = 0.5
"""Seconds after which progress is told of no bytes, where none come."""
MIN_SLOTS: Final = 2


_M_MMAP_THRESHOLD: Final = -3
"""Of malloc.h: from how many bytes on a block is asked of the system, and goes back to it when it is freed."""


def give_memory_back() -> None:
    """Let freed buffers go back to the system, in all of this process: for programs, as a library must not decide that.

    glibc keeps freed blocks of up to 32 MiB for later, in an arena for each thread: over many shards 100 MiB more than are in use.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Another C library.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of a conversion. ``jobs``: encoding threads; ``max_memory``: bytes, of the whole process."""

    jobs: int
    max_memory: int
    cast: Cast
    verify: bool


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of one file."""

    source_bytes: int
    output_bytes: int
    source_sha256: str
    tensors: int
    inexact: tuple[str, ...]
    """Tensors that the cast has changed."""
    rows: tuple[TensorRow, ...]
    """Of the manifest, in the order of the container; ``file`` is the container's name without its folder."""


@dataclass(frozen=True, slots=True)
class _Slot:
    # The memory of one batch on its way from the reader to the writer.
    input: Bytes
    output: Bytes
    weights: Weights
    encoder: SegmentEncoder


@dataclass(frozen=True, slots=True)
class _Outcome:
    # Of one piece: its bytes in the source; a checksum, of its weights if it is coded, else of its bytes; its segment, or None if it is
    # verbatim; whether its cast was exact; its exponents, counted unless the whole tensor has too few.
    source: Bytes
    checksum: int
    segment: EncodedSegment | None
    exact: bool
    exponents: Exponents


def convert_file(source: Source, writer: AtomicWriter, settings: Settings, progress: Progress) -> Converted:
    """Convert one source into one container, ready to be committed. Raises a Df11Error; the caller drops the writer then."""
    plans = plan_tensors(source.header, settings.cast)
    batches = plan_batches(plans)
    slots = _make_slots(batches, source, settings)
    output = ContainerOutput(writer, source, plans, settings.cast)
    deferred = [plan for plan in plans if plan.fate is Fate.DEFER]
    inexact: dict[str, None] = {}
    checksums: dict[str, list[int]] = {}
    exponents: dict[str, Exponents] = {}
    digest = source.start_sha256()
    progress(source.header.data_start)
    for batch, outcomes in _process_batches(batches, list(slots), source, digest, settings, progress):
        for piece, outcome in zip(batch.pieces, outcomes, strict=True):
            plan = piece.tensor
            name = plan.entry.name
            checksums.setdefault(name, []).append(outcome.checksum)
            if not outcome.exact:
                inexact[name] = None
            if outcome.segment is not None:
                exponents[name] = _joined(exponents.get(name), outcome.exponents)
                output.write_segment(plan, outcome.segment)
                if piece.last and output.end_record(plan, exponents[name], exact=name not in inexact):
                    del checksums[name], exponents[name]
                elif piece.last:
                    deferred.append(plan)
            elif plan.fate is Fate.COPY:
                output.write_verbatim(plan, outcome.source, last=piece.last)
        progress(batch.size)
    deferred.sort(key=lambda plan: (-framing.DTYPE_BITS[plan.target_dtype], plan.entry.start))
    for plan in deferred:
        name = plan.entry.name
        _copy_deferred(
            plan, source, slots[0], output, checksums.get(name, []), exponents.get(name), exact=name not in inexact
        )
    source.check_unchanged()
    sha256 = digest.hexdigest()
    output.finish(sha256)
    return Converted(source.size, writer.position, sha256, len(plans), tuple(inexact), tuple(output.rows))


def _joined(one: Exponents, other: Exponents) -> Exponents:
    # Those of two parts of a tensor, or of the first.
    if isinstance(one, ExponentCounts) and isinstance(other, ExponentCounts):
        return ExponentCounts.of(one.array() + other.array())
    return other


@dataclass(frozen=True, slots=True)
class _Needs:
    # Bytes of memory: of a slot and its parts, of all besides the slots, and at least.
    read: int
    write: int
    weights: int
    each: int
    base: int
    least: int


def least_memory(source: Source, plans: Sequence[TensorPlan]) -> int:
    """Bytes that ``max_memory`` must allow at least, to convert this source by these plans."""
    return _needs(plan_batches(plans), source).least


def _needs(batches: list[Batch], source: Source) -> _Needs:
    pieces = [(piece, batch) for batch in batches for piece in batch.pieces]
    read = max((batch.size for batch in batches), default=0)
    write = max((batch.output_size for batch in batches), default=0)
    # A cast needs a place to put its weights; so does a tensor that does not start where its weights can be read.
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
        raise errors.BudgetError(
            "--max-memory is too small for this file",
            file=source.path,
            expected=f"at least {mebibytes(needs.least)}",
            found=mebibytes(settings.max_memory),
        )
    count = max(min((settings.max_memory - needs.base) // needs.each, settings.jobs + 2, len(batches)), 1)
    return [
        _Slot(
            np.empty(needs.read, np.uint8),
            np.empty(needs.write, np.uint8),
            np.empty(needs.weights, np.uint16),
            SegmentEncoder(),
        )
        for _ in range(count)
    ]


def mebibytes(size: int) -> str:
    """A size as an option spells it, rounded up."""
    return f"{-(-size >> 20)}MiB"


def _process_batches(
    batches: list[Batch], free: list[_Slot], source: Source, digest: Sha256, settings: Settings, progress: Progress
) -> Iterator[tuple[Batch, list[_Outcome]]]:
    # Batches and their outcomes in order. An outcome is valid until the next one is asked for.
    waiting: deque[tuple[Batch, _Slot, Future[list[_Outcome]]]] = deque()
    ahead = iter(batches)
    with ExitStack() as stack:

        def pool(threads: int, name: str) -> ThreadPoolExecutor:
            executor = ThreadPoolExecutor(threads, name)
            stack.callback(executor.shutdown, cancel_futures=True)
            return executor

        workers = pool(min(settings.jobs, len(free)), "df11-encode")
        hasher = pool(1, "df11-hash")
        reader = pool(1, "df11-read")
        # After an error, or an interrupt, the reader must not wait for a server before its pool can end.
        stack.push(lambda kind, *_: source.stop() if kind is not None else None)

        # A batch goes from stage to stage; the last one, or one that fails, settles its outcomes.
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
                progress(
                    0
                )  # A server can be silent for minutes; meanwhile a caller can say, by an error, that nobody wants the outcome any more.
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
                f"what was encoded does not decode to the source ({error})",
                file=path,
                tensor=piece.tensor.entry.name,
                hint="this is a defect in df11 or in the memory of this machine: please report it",
            ) from None
        used += len(segment.data)
        exponents = summarized(slot.encoder.exponents, piece.tensor.entry.elements)
        outcomes.append(_Outcome(source, segment.decoded_checksum, segment, exact, exponents))
    return outcomes


def _weights(source: Bytes, scratch: Weights, *, cast: bool) -> tuple[Weights, bool]:
    # The BF16 weights of a piece, and whether they are all that it holds.
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
    plan: TensorPlan,
    source: Source,
    slot: _Slot,
    output: ContainerOutput,
    checksums: list[int],
    exponents: Exponents,
    *,
    exact: bool,
) -> None:
    # Read a tensor once more; its bytes must be those that were hashed.
    if not plan.entry.size:
        output.write_verbatim(plan, np.empty(0, np.uint8), last=True, exact=exact)
    for piece, checksum in zip(split_tensor(plan), checksums, strict=True):
        data = slot.input[: piece.size]
        source.read(piece.start, data)
        if plan.cast:
            data = _weights(data, slot.weights, cast=True)[0].view(np.uint8)
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise source.changed(plan.entry.name)
        output.write_verbatim(plan, data, exponents, last=piece.last, exact=exact)
