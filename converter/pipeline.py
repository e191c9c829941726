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
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import xxhash

from df11.converter.batches import Batch, Fate, Piece, SourceTensor, list_tensors, make_batches, split_tensor
from df11.converter.encode import EncodedSegment, SegmentEncoder
from df11.converter.exponents import COUNTED_WEIGHTS, ExponentCounts, Exponents, summarized
from df11.converter.kernels import Sha256, any_bits, cast_f32, narrow_f32
from df11.converter.manifest import TensorRow
from df11.converter.output import ContainerOutput
from df11.converter.settings import BASE_MEMORY, HEADER_MEMORY, Settings, too_little_memory
from df11.converter.source import Progress, Source
from df11.formats import errors, framing, layout
from df11.formats.container import OriginalFile
from df11.formats.record import Bytes, Weights, weights_dtype
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
    weights: Bytes
    encoder: SegmentEncoder


@dataclass(frozen=True, slots=True)
class _Outcome:
    # For one piece: its bytes in the source, and their checksum; the dtype of what is stored; its segment, or None if
    # verbatim; whether rounding was exact; its exponents, counted unless the whole tensor has too few.
    source: Bytes
    checksum: int
    dtype: str
    segment: EncodedSegment | None
    exact: bool
    exponents: Exponents


def convert_file(source: Source, writer: AtomicWriter, settings: Settings, progress: Progress) -> Converted:
    """Convert one source into one container, ready to commit. Raises a Df11Error; the caller then drops the writer."""
    tensors = list_tensors(source.header, settings.cast, settings.keep)
    batches = make_batches(tensors)
    slots, spare = _make_slots(batches, source, settings)
    output = ContainerOutput(writer, source, tensors)
    assembly = _Assembly(source, output, tensors, spare, verify=settings.verify)
    digest = source.start_sha256()
    progress(source.header.data_start)
    for batch, outcomes in _process_batches(batches, list(slots), source, digest, settings, progress):
        for piece, outcome in zip(batch.pieces, outcomes, strict=True):
            assembly.add(piece, outcome)
        progress(batch.size)
    assembly.finish(slots[0] if slots else None)
    source.check_unchanged()
    sha256 = digest.hexdigest()
    output.finish(sha256)
    rows = tuple(output.rows)
    inexact = tuple(assembly.inexact)
    return Converted(source.size, writer.position, sha256, len(tensors), inexact, rows, output.made_from)


@dataclass(slots=True)
class _Stored:
    # A tensor on its way into the container: what is known of its pieces so far.
    tensor: SourceTensor
    dtype: str
    checksums: list[int] = field(default_factory=list)
    exponents: Exponents = None
    exact: bool = True


class _Assembly:
    # Puts pieces into the container, in the order of the source.

    def __init__(
        self,
        source: Source,
        output: ContainerOutput,
        tensors: Sequence[SourceTensor],
        spare: _Slot | None,
        *,
        verify: bool,
    ) -> None:
        self._source, self._output, self._spare, self._verify = source, output, spare, verify
        self._deferred = [_Stored(tensor, tensor.dtypes[0]) for tensor in tensors if not tensor.entry.size]
        self._now: _Stored | None = None
        self.inexact: list[str] = []

    def add(self, piece: Piece, outcome: _Outcome) -> None:
        """The next piece. The outcome is not used afterwards."""
        tensor, now = piece.tensor, self._now
        if now is None or piece.start == tensor.entry.start:
            now = self._now = _Stored(tensor, outcome.dtype)
        elif outcome.dtype != now.dtype:
            self._do_again(now, outcome.dtype)
        now.checksums.append(outcome.checksum)
        now.exact = now.exact and outcome.exact
        if outcome.segment is not None:
            now.exponents = _joined(now.exponents, outcome.exponents)
            self._output.write_segment(tensor, outcome.segment)
        elif tensor.fate is Fate.COPY:
            self._output.write_verbatim(tensor, now.dtype, outcome.source, last=piece.last)
        if not piece.last:
            return
        if not now.exact:
            self.inexact.append(tensor.entry.name)
        if outcome.segment is not None and not self._output.end_record(
            tensor, now.dtype, now.exponents, exact=now.exact
        ):
            self._keep_verbatim(now, outcome)
        elif tensor.fate is Fate.DEFER:
            self._deferred.append(now)

    def _keep_verbatim(self, now: _Stored, outcome: _Outcome) -> None:
        # A record would not pay. The tensor stays in its place unless its size would misalign the next record.
        tensor = now.tensor
        if now.dtype == "BF16" or tensor.entry.size % layout.RECORD_ALIGNMENT:
            self._deferred.append(now)
        elif len(now.checksums) == 1:
            self._output.write_verbatim(tensor, now.dtype, outcome.source, last=True)
        else:
            assert self._spare is not None
            for data, last in self._read_again(now, self._spare):
                self._output.write_verbatim(tensor, now.dtype, data, last=last)

    def _do_again(self, now: _Stored, dtype: str) -> None:
        # All values were BF16 up to here: what has been written of the tensor becomes the F32 that it is.
        self._output.drop()
        now.dtype, now.exponents = dtype, None
        assert self._spare is not None
        for data, _ in self._read_again(now, self._spare):
            segment, _, exponents = _encode(
                data, dtype, now.tensor, self._spare, 0, self._source.path, verify=self._verify
            )
            now.exponents = _joined(now.exponents, exponents)
            self._output.write_segment(now.tensor, segment)

    def _read_again(self, now: _Stored, slot: _Slot) -> Iterator[tuple[Bytes, bool]]:
        # The bytes of each piece so far, and whether it is the last. They must be the ones that were hashed.
        for piece, checksum in zip(split_tensor(now.tensor), now.checksums, strict=False):
            data = slot.input[: piece.size]
            self._source.read(piece.start, data)
            if xxhash.xxh3_64_intdigest(data) != checksum:
                raise self._source.changed(now.tensor.entry.name)
            yield data, piece.last

    def finish(self, slot: _Slot | None) -> None:
        """Write what cannot stay in the source's order. ``slot``: one that nobody uses; None if there are no pieces."""
        self._deferred.sort(key=lambda one: (-framing.DTYPE_BITS[one.dtype], one.tensor.entry.start))
        for one in self._deferred:
            tensor = one.tensor
            if not one.checksums or slot is None:
                self._output.write_verbatim(tensor, one.dtype, np.empty(0, np.uint8), last=True)
                continue
            for data, last in self._read_again(one, slot):
                stored = data if one.dtype == tensor.entry.dtype else _weights(data, one.dtype, tensor, slot)[0]
                exponents = one.exponents if one.dtype == "BF16" else None
                self._output.write_verbatim(
                    tensor, one.dtype, stored.view(np.uint8), exponents, last=last, exact=one.exact
                )


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
    spare: bool
    least: int


def least_memory(source: Source, tensors: Sequence[SourceTensor]) -> int:
    """The smallest ``max_memory``, in bytes, that can convert this source with these tensors."""
    return _needs(make_batches(tensors), source).least


def _needs(batches: list[Batch], source: Source) -> _Needs:
    pieces = [(piece, batch) for batch in batches for piece in batch.pieces]
    read = max((batch.size for batch in batches), default=0)
    write = max((batch.output_size for batch in batches), default=0)
    # F32 needs space for its BF16 weights; so does a tensor whose start is not aligned for its weights.
    weights = max((_scratch(piece, batch) for piece, batch in pieces if piece.tensor.fate is Fate.CODE), default=0)
    # One more slot to do a tensor again that turns out not to be BF16, or to be better kept as it is.
    spare = any(p.tensor.fate is Fate.CODE and p.tensor.dtypes[0] != "BF16" and not p.last for p, _ in pieces)
    each = read + write + weights + ENCODER_MEMORY
    entries = source.header.entries
    base = BASE_MEMORY + HEADER_MEMORY * len(source.header.raw) + TENSOR_MEMORY * len(entries)
    base += COUNTS_MEMORY * sum(entry.elements >= COUNTED_WEIGHTS for entry in entries) + source.memory
    return _Needs(read, write, weights, each, base, spare, base + (MIN_SLOTS + spare) * each)


def _scratch(piece: Piece, batch: Batch) -> int:
    width = piece.size // piece.weights
    if (piece.start - batch.start) % width:
        return piece.size
    return 2 * piece.weights if piece.tensor.entry.dtype == "F32" else 0


def _make_slots(batches: list[Batch], source: Source, settings: Settings) -> tuple[list[_Slot], _Slot | None]:
    needs = _needs(batches, source)
    if settings.max_memory < needs.least:
        raise too_little_memory(source.path, needs.least, settings.max_memory)
    count = (settings.max_memory - needs.base) // needs.each - needs.spare
    count = max(min(count, settings.threads + 2, len(batches)), 1)
    slots = [
        _Slot(
            np.empty(needs.read, np.uint8),
            np.empty(needs.write, np.uint8),
            np.empty(needs.weights, np.uint8),
            SegmentEncoder(),
        )
        for _ in range(count + needs.spare)
    ]
    return slots[:count], slots[-1] if needs.spare else None


def _process_batches(
    batches: list[Batch], free: list[_Slot], source: Source, digest: Sha256, settings: Settings, progress: Progress
) -> Iterator[tuple[Batch, list[_Outcome]]]:
    # Batches and their outcomes in order. An outcome is valid until the next one is requested.
    waiting: deque[tuple[Batch, _Slot, Future[list[_Outcome]]]] = deque()
    ahead = iter(batches)
    narrowing = _Narrowing()
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
                dtypes = narrowing.dtypes(batch, slot)
                _hash(batch, slot, digest)
                workers.submit(encode, batch, slot, dtypes, outcomes)

        def encode(batch: Batch, slot: _Slot, dtypes: list[str], outcomes: Future[list[_Outcome]]) -> None:
            with _errors_to(outcomes):
                outcomes.set_result(_process(batch, slot, dtypes, source.path, verify=settings.verify))

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


class _Narrowing:
    # Says which pieces are stored in which dtype, asked in the order of the source: from the first value on that is not
    # BF16, a tensor is F32. So the answer depends on the source alone, not on which thread is faster.

    def __init__(self) -> None:
        self._lost = False

    def dtypes(self, batch: Batch, slot: _Slot) -> list[str]:
        """The dtype that each piece of a batch takes in the container."""
        return [self._dtype(piece, _bytes_of(piece, batch, slot)) for piece in batch.pieces]

    def _dtype(self, piece: Piece, data: Bytes) -> str:
        tensor = piece.tensor
        if not tensor.may_be_bf16:
            return tensor.dtypes[0]
        if piece.start == tensor.entry.start:
            self._lost = False
        self._lost = self._lost or any_bits(data, layout.F32) & 0xFFFF != 0
        return "F32" if self._lost else "BF16"


def _bytes_of(piece: Piece, batch: Batch, slot: _Slot) -> Bytes:
    start = piece.start - batch.start
    return slot.input[start : start + piece.size]


def _hash(batch: Batch, slot: _Slot, digest: Sha256) -> None:
    data = slot.input[: batch.size]
    piece = batch.pieces[0]
    is_one_segment = len(batch.pieces) == 1 and piece.tensor.fate is Fate.CODE and piece.tensor.entry.dtype == "BF16"
    if is_one_segment and piece.weights > 1:
        slot.encoder.hash_weights(digest, data)
    else:
        digest.update(data)


def _process(batch: Batch, slot: _Slot, dtypes: list[str], path: str, *, verify: bool) -> list[_Outcome]:
    outcomes = []
    used = 0
    for piece, dtype in zip(batch.pieces, dtypes, strict=True):
        source, tensor = _bytes_of(piece, batch, slot), piece.tensor
        if tensor.fate is not Fate.CODE:
            outcomes.append(_Outcome(source, xxhash.xxh3_64_intdigest(source), dtype, None, True, None))
            continue
        segment, exact, exponents = _encode(source, dtype, tensor, slot, used, path, verify=verify)
        used += len(segment.data)
        is_same = dtype == tensor.entry.dtype
        checksum = segment.decoded_checksum if is_same else xxhash.xxh3_64_intdigest(source)
        outcomes.append(_Outcome(source, checksum, dtype, segment, exact, exponents))
    return outcomes


def _encode(
    source: Bytes, dtype: str, tensor: SourceTensor, slot: _Slot, used: int, path: str, *, verify: bool
) -> tuple[EncodedSegment, bool, Exponents]:
    # A piece of a tensor as a segment of this dtype, whether that is exact, and its exponents. ``used``: bytes of the
    # slot's output that are taken.
    weights, exact = _weights(source, dtype, tensor, slot)
    try:
        segment = slot.encoder.encode(weights, slot.output[used:], layout.KINDS[dtype], verify=verify)
    except errors.DifferenceError as error:
        raise errors.DifferenceError(
            f"the encoded data does not decode to the source ({error})",
            file=path,
            tensor=tensor.entry.name,
            hint="this is a defect in df11 or in the memory of this machine: please report it",
        ) from None
    return segment, exact, summarized(slot.encoder.exponents, tensor.entry.elements)


def _weights(source: Bytes, dtype: str, tensor: SourceTensor, slot: _Slot) -> tuple[Weights, bool]:
    # The weights of a piece as this dtype, and whether they represent it exactly.
    bits = source.view(weights_dtype(layout.KINDS[tensor.entry.dtype]))
    if dtype == tensor.entry.dtype:
        if not bits.flags.aligned:
            bits = slot.weights[: len(source)].view(bits.dtype)
            bits.view(np.uint8)[:] = source
        return bits, True
    if not bits.flags.aligned:
        bits = bits.copy()
    out = slot.weights[: 2 * len(bits)].view(np.uint16)
    if tensor.cast:
        return out, cast_f32(bits, out)
    narrow_f32(bits, out)
    return out, True
