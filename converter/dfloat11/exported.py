"""Files in DFloat11's layout, and plain safetensors files, made of containers while they are written.

A unit is decoded three times: to count its exponents, for its codes, and for its signs and mantissas. That takes less
time than encoding it, and the memory stays the same for units of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from df11.converter.dfloat11 import kernels
from df11.converter.dfloat11.codes import EXPONENTS, Counts, UnitCode, choose_code
from df11.converter.dfloat11.layout import CODES, THREAD_BYTES, THREADS, joined
from df11.converter.kernels import count_exponents
from df11.converter.restore_file import decoded_blocks, restored_layout
from df11.converter.source import Progress
from df11.formats import errors, framing
from df11.formats.container import Container
from df11.formats.record import Bytes, Weights
from df11.storage.entry import Entry
from df11.storage.file import File
from df11.storage.store import Store

MOST_WEIGHTS: Final = (1 << 31) - 1
CHUNK: Final = 1 << 19
"""Weights that are encoded together."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: its name, decoded dtype and shape; positions mean nothing."""

    file: Entry
    """Its container in the store."""
    entry: framing.Entry
    stored_name: str
    """Its name there, which is another one for a copy."""

    @property
    def size(self) -> int:
        """Bytes, decoded."""
        return self.entry.elements * framing.DTYPE_BITS[self.entry.dtype] // 8


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit to write: the BF16 tensors that it holds, and the code for them."""

    name: str
    parts: tuple[Tensor, ...]
    code: UnitCode
    code_bytes: int

    @property
    def weights(self) -> int:
        """Weights of all parts."""
        return sum(part.entry.elements for part in self.parts)

    @property
    def splits(self) -> Bytes:
        """The bytes of ``split_positions``."""
        ends = np.cumsum([part.entry.elements for part in self.parts], dtype=np.int64)
        return ends[:-1].view(np.uint8)

    def entries(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its U8 tensors, in the order in which they are written."""
        blocks = -(-self.code_bytes // (THREAD_BYTES * THREADS))
        yield CODES, (self.code_bytes,)
        yield "gaps", (-(-5 * blocks * THREADS // 8),)
        yield "output_positions", (4 * (blocks + 1),)
        yield "luts", self.code.luts.shape
        yield "sign_mantissa", (self.weights,)


def count_unit(store: Store, name: str, parts: Sequence[Tensor], threads: int, progress: Progress) -> Unit:
    """Read a unit and choose its code. Raises CheckpointError if that layout cannot hold it."""
    total = np.zeros(256, np.int64)
    for part in parts:
        counts: Counts = np.zeros(256, np.int64)
        for weights in _weights(store, [part], threads):
            counts += count_exponents(weights)
            progress(2 * len(weights))
        if counts[EXPONENTS:].any():
            what = f"DFloat11's layout has no exponents from {EXPONENTS} on: infinity, NaN, values from 2^113 on"
            hint = "write plain safetensors: --to safetensors"
            raise errors.CheckpointError(what, file=store.locate(part.file.name), tensor=part.entry.name, hint=hint)
        total += counts
    if not 0 < total.sum() <= MOST_WEIGHTS:
        what = f"a unit of DFloat11's layout has 1 to {MOST_WEIGHTS} weights"
        where = store.locate(parts[0].file.name)
        raise errors.CheckpointError(what, file=where, tensor=parts[0].entry.name, found=int(total.sum()))
    code = choose_code(total)
    return Unit(name, tuple(parts), code, code.size(total))


def _weights(store: Store, parts: Iterable[Tensor], threads: int) -> Iterator[Weights]:
    for block in _blocks(store, parts, threads):
        weights = block.view(np.uint16)
        for start in range(0, len(weights), CHUNK):
            yield weights[start : start + CHUNK]


def _blocks(store: Store, tensors: Iterable[Tensor], threads: int) -> Iterator[Bytes]:
    # Decoded, one after the other; those that follow each other in a container are read together.
    groups: list[tuple[Entry, list[framing.Entry]]] = []
    for tensor in tensors:
        if not groups or groups[-1][0] != tensor.file:
            groups.append((tensor.file, []))
        groups[-1][1].append(dataclasses.replace(tensor.entry, name=tensor.stored_name))
    for file, entries in groups:
        with Container(store.locate(file.name)) as container:
            yield from decoded_blocks(container, entries, threads)


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A file to write: plain tensors, then units."""

    plain: tuple[Tensor, ...]
    units: tuple[Unit, ...]
    metadata: Mapping[str, str]
    threads: int

    @classmethod
    def of(cls, plain: Sequence[Tensor], units: Sequence[Unit], threads: int) -> MadeFile:
        """With tensors of large elements first, so that all are aligned."""
        ordered = sorted(plain, key=lambda one: -framing.DTYPE_BITS[one.entry.dtype])
        return cls(tuple(ordered), tuple(units), {"format": "pt"}, threads)

    @property
    def sources(self) -> tuple[Entry, ...]:
        """The containers that it is made from."""
        tensors = [*self.plain, *(part for unit in self.units for part in unit.parts)]
        found = {one.file.name: one.file for one in tensors}
        return tuple(found[name] for name in sorted(found))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        header, entries = self._header()
        return 8 + len(header) + (entries[-1].end if entries else 0)

    def _header(self) -> tuple[bytes, list[framing.Entry]]:
        entries: list[framing.Entry] = []

        def add(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
            start = entries[-1].end if entries else 0
            entries.append(framing.Entry(name, dtype, shape, start, start + size))

        for unit in self.units:
            count = len(unit.parts) - 1
            add(joined(unit.name, "split_positions"), "I64", (count,), 8 * count)
        for tensor in self.plain:
            add(tensor.entry.name, tensor.entry.dtype, tensor.entry.shape, tensor.size)
        for unit in self.units:
            for part, shape in unit.entries():
                add(joined(unit.name, part), "U8", shape, int(np.prod(shape)))
        header = framing.encode_header(entries, self.metadata)
        return header + b" " * (-len(header) % 8), entries

    def open(self, store: Store, label: str) -> File:
        """The file, to be read from its start to its end."""
        return ExportedFile(self, store, label)

    def blocks(self, store: Store) -> Iterator[Bytes]:
        """Its bytes."""
        header, _ = self._header()
        yield np.frombuffer(len(header).to_bytes(8, "little") + header, np.uint8)
        for unit in self.units:
            yield unit.splits
        yield from _blocks(store, self.plain, self.threads)
        for unit in self.units:
            yield from _unit_blocks(store, unit, self.threads)


def _unit_blocks(store: Store, unit: Unit, threads: int) -> Iterator[Bytes]:
    stream = kernels.Stream(unit.code.lengths, unit.code.codes, THREADS)
    gaps, positions = _Gaps(), [np.zeros(1, np.uint32)]
    size = 0
    for weights in _weights(store, unit.parts, threads):
        codes, more_gaps, more_positions = stream.encode(weights)
        gaps.add(more_gaps)
        positions.append(more_positions)
        size += len(codes)
        yield codes
    rest = stream.rest()
    yield rest
    if size + len(rest) != unit.code_bytes:
        where = store.locate(unit.parts[0].file.name)
        raise errors.ConflictError("the model changed while it was read", file=where, tensor=unit.parts[0].entry.name)
    blocks = -(-unit.code_bytes // (THREAD_BYTES * THREADS))
    yield gaps.packed(blocks * THREADS)
    starts = np.concatenate(positions)[:blocks]
    yield np.append(starts, np.uint32(unit.weights)).view(np.uint8)
    yield unit.code.luts.reshape(-1)
    for weights in _weights(store, unit.parts, threads):
        out = np.empty(len(weights), np.uint8)
        kernels.split(weights, out)
        yield out


class _Gaps:
    # Numbers of five bits, the highest first, packed as they come: eight take five bytes.

    def __init__(self) -> None:
        self._packed: list[Bytes] = []
        self._rest = np.zeros(1, np.uint8)  # The first thread's.
        self._count = 0

    def add(self, gaps: Bytes) -> None:
        rest = np.concatenate([self._rest, gaps])
        whole = len(rest) // 8 * 8
        bits = np.unpackbits(rest[:whole].reshape(-1, 1), axis=1)[:, 3:]
        self._packed.append(np.packbits(bits))
        self._rest, self._count = rest[whole:], self._count + whole

    def packed(self, count: int) -> Bytes:
        # Those of ``count`` threads, a multiple of 8; behind the last code 0.
        self.add(np.zeros(max(count - self._count - len(self._rest), 0) + 8, np.uint8))
        return np.concatenate(self._packed)[: 5 * count // 8]


class ExportedFile(File):
    """A file that is made while it is read, from its start to its end."""

    def __init__(self, made: MadeFile, store: Store, label: str) -> None:
        self.label = label
        self.size = made.size
        self.sources = made.sources
        self._made, self._store = made, store

    def close(self) -> None:
        """Nothing stays open."""

    def chunks(self, start: int = 0) -> Iterator[Bytes]:
        """The bytes from ``start`` on, in order; each chunk is valid until the next one."""
        for block in self._made.blocks(self._store):
            yield block[start:]
            start = max(start - len(block), 0)

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on. All before them is made for it."""
        for chunk in self.chunks(position):
            part = chunk[: len(out)]
            out[: len(part)] = part
            out = out[len(part) :]
            if not len(out):
                return
        raise self.changed()


def held_tensors(store: Store, file: Entry) -> list[Tensor]:
    """The tensors of a container, as it holds them: what was F32 of BF16 values is BF16."""
    with Container(store.locate(file.name)) as container:
        infos = [container.info(name) for name in container.keys()]
    return [_tensor(file, info.name, info.dtype, info.shape) for info in infos]


def restored_tensors(store: Store, file: Entry) -> list[Tensor]:
    """The tensors of a container in the dtypes that ``df11 restore --bf16`` gives them, those of the source."""
    with Container(store.locate(file.name)) as container:
        entries = {entry.name: entry for entry in restored_layout(container, bf16=True).entries}
        return [_tensor(file, name, entries[name].dtype, entries[name].shape) for name in container.keys()]


def _tensor(file: Entry, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(file, framing.Entry(name, dtype, shape, 0, 0), name)
