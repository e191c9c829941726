"""The safetensors files that a DFloat11 checkpoint decodes to, made while they are read, within fixed memory.

Nothing of the checkpoint is used before it has been checked. There is no checksum in that layout; but each block says
how many weights it holds, and each thread where its first code starts, and all of that must agree with the codes.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from df11.converter.dfloat11 import kernels
from df11.converter.dfloat11.layout import CODES, Place, Unit
from df11.formats import framing
from df11.formats.record import Bytes, Weights
from df11.storage.entry import Entry
from df11.storage.file import File
from df11.storage.store import Store

WEIGHTS: Final = 1 << 19
"""Weights that are decoded together, about; their codes take at most four bytes each."""
WINDOW: Final = 1 << 20
"""Bytes of small things that are read together: a request for each would be slow."""
MEMORY: Final = 12 << 20
"""Bytes that decoding takes, besides what reading takes and the positions of a unit's blocks."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a file that is made, and where it comes from."""

    start: int
    """Its first byte in the made file."""
    entry: framing.Entry
    """``start`` and ``end`` in bytes of the decoded unit, or of the data of the checkpoint's file."""
    origin: Unit | Place

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.start + self.entry.size


Hashes = dict[tuple[str, object], Entry]
"""Files whose SHA-256 is known, by name and state: several shards may be made from one file."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that is made: its header, and the tensors behind it."""

    head: bytes
    pieces: tuple[Piece, ...]
    hashes: Hashes

    @classmethod
    def of(cls, units: Sequence[Unit], plain: Sequence[Place], hashes: Hashes) -> Shard:
        """The file with all tensors of these units, then others, those of large elements first."""
        found: list[tuple[framing.Entry, Unit | Place]] = [(part, unit) for unit in units for part in unit.parts]
        found += [
            (place.entry, place)
            for place in sorted(plain, key=lambda one: (-framing.DTYPE_BITS[one.entry.dtype], one.file.name, one.start))
        ]
        entries, position = [], 0
        for entry, _ in found:
            entries.append(framing.Entry(entry.name, entry.dtype, entry.shape, position, position + entry.size))
            position += entry.size
        header = framing.encode_header(entries, {"format": "pt"})
        header += b" " * (-len(header) % 8)
        head = len(header).to_bytes(8, "little") + header
        pieces = [
            Piece(len(head) + placed.start, entry, origin)
            for placed, (entry, origin) in zip(entries, found, strict=True)
        ]
        return cls(head, tuple(pieces), hashes)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.pieces[-1].end if self.pieces else len(self.head)

    @property
    def sources(self) -> tuple[Entry, ...]:
        """The files of the checkpoint that hold its tensors."""
        found = {place.file.name: place.file for piece in self.pieces for place in _places(piece)}
        return tuple(found[name] for name in sorted(found))

    def open(self, store: Store, label: str) -> File:
        """The file."""
        return ImportedFile(self, store, label)


def _places(piece: Piece) -> Sequence[Place]:
    return [piece.origin] if isinstance(piece.origin, Place) else list(piece.origin.places.values())


class ImportedFile(File):
    """A file that is made while it is read: in sequence each byte of the checkpoint is read once."""

    def __init__(self, shard: Shard, store: Store, label: str) -> None:
        self.label = label
        self.size = shard.size
        self.sources = shard.sources
        self._shard = shard
        self._files = _Files(store, shard.hashes)
        self._starts = [piece.start for piece in shard.pieces]
        self._unit: _UnitReader | None = None
        self._plain: _Stream | None = None
        self._lock = threading.Lock()
        units = {piece.origin.name: piece.origin for piece in shard.pieces if isinstance(piece.origin, Unit)}
        positions = max((unit.places["output_positions"].entry.size for unit in units.values()), default=0)
        self.memory = MEMORY + 2 * positions + self._files.memory(shard)

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def expect(self, position: int, end: int | None = None) -> None:
        """Fetch ahead from now on."""
        self._unit = self._plain = None
        self._files.close_streams()
        self._files.is_ahead = True

    def stop(self) -> None:
        """Wake all threads that wait for bytes."""
        self._files.stop()

    def check_unchanged(self) -> None:
        """Raise a ConflictError if a file of the checkpoint has changed since it was opened."""
        self._files.check_unchanged()

    def hashed_sources(self) -> tuple[Entry, ...]:
        """The files of the checkpoint, with their SHA-256."""
        return self._files.hashed(self.sources)

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on."""
        with self._lock:
            head = self._shard.head[position : position + len(out)]
            out[: len(head)] = np.frombuffer(head, np.uint8)
            position, out = position + len(head), out[len(head) :]
            at = bisect.bisect_right(self._starts, position) - 1
            while len(out):
                piece = self._shard.pieces[at]
                chunk = out[: max(piece.end - position, 0)]
                if len(chunk):
                    self._read(piece, position - piece.start, chunk)
                position, out, at = position + len(chunk), out[len(chunk) :], at + 1

    def _read(self, piece: Piece, start: int, out: Bytes) -> None:
        if isinstance(piece.origin, Unit):
            self._read_unit(piece.origin, piece.entry.start + start, out)
        elif piece.entry.size < WINDOW:
            self._files.window(piece.origin.file).read(piece.origin.start + start, out)
        else:
            if self._plain is None or self._plain.place is not piece.origin:
                self._plain = _Stream(piece.origin, self._files)
            self._plain.read(start, out)

    def _read_unit(self, unit: Unit, start: int, out: Bytes) -> None:
        if self._unit is None or self._unit.unit is not unit:
            self._files.close_streams()
            self._plain = None
            self._unit = _UnitReader(unit, self._files)
        first, odd = divmod(start, 2)
        weights = out.view(np.uint16) if not odd and not len(out) % 2 else None
        if weights is not None and weights.flags.aligned:
            self._unit.read(first, weights)
        else:  # Nobody does so but who reads the first bytes of a file.
            decoded = np.empty((start + len(out) + 1) // 2 - first, np.uint16)
            self._unit.read(first, decoded)
            out[:] = decoded.view(np.uint8)[odd : odd + len(out)]


class _Files:
    # The open files of a checkpoint.

    def __init__(self, store: Store, hashes: Hashes) -> None:
        self._store, self._hashes = store, hashes
        self._streams: list[File] = []
        self._windows: dict[str, _Window] = {}
        self._is_stopped = False
        self.is_ahead = False

    def memory(self, shard: Shard) -> int:
        # Of two streams, codes and signs, at the most; what the Hub's client takes is in both, but there once.
        if self._store.address is None:
            return 0
        from df11.storage.ranges import CLIENT_MEMORY

        most = 0
        for entry in shard.sources:
            with self._store.open(entry) as file:
                most = max(most, 2 * file.memory)
        return most - CLIENT_MEMORY

    def window(self, entry: Entry) -> _Window:
        # Stays open, as it knows whether the file has changed since.
        if entry.name not in self._windows:
            self._windows[entry.name] = _Window(self._store.open(entry), entry)
        return self._windows[entry.name]

    def stream(self, place: Place) -> File:
        # Each stream of bytes has an open file of its own: from the Hub, it is fetched ahead of its reader.
        self.window(place.file)
        file = self._store.open(place.file)
        self._streams.append(file)
        if self.is_ahead:
            file.expect(place.start, place.start + place.entry.size)
        if self._is_stopped:
            file.stop()
        return file

    def hashed(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return tuple(entry if entry.sha256 is not None else self._hashed(entry) for entry in entries)

    def _hashed(self, entry: Entry) -> Entry:
        window = self.window(entry)
        key = entry.name, window.file.state
        if key not in self._hashes:
            self._hashes[key] = window.hashed()
        return self._hashes[key]

    def check_unchanged(self) -> None:
        for window in self._windows.values():
            window.file.check_unchanged()

    def stop(self) -> None:
        self._is_stopped = True
        for file in (*self._streams, *(window.file for window in self._windows.values())):
            file.stop()

    def close_streams(self) -> None:
        for file in self._streams:
            file.close()
        self._streams.clear()
        for window in self._windows.values():
            window.forget()

    def close(self) -> None:
        self.close_streams()
        for window in self._windows.values():
            window.file.close()
        self._windows.clear()


class _Window:
    # Small reads from a file, some of which lie side by side.

    def __init__(self, file: File, entry: Entry) -> None:
        if file.size != entry.size:
            file.close()
            raise file.changed()
        self.file = file
        self._entry = entry
        self._start, self._data = 0, np.empty(0, np.uint8)

    def read(self, start: int, out: Bytes) -> None:
        if not self._start <= start or self._start + len(self._data) < start + len(out):
            if len(out) >= WINDOW:
                self.file.read(start, out)
                return
            self._start, self._data = start, np.empty(min(WINDOW, self.file.size - start), np.uint8)
            self.file.read(start, self._data)
        out[:] = self._data[start - self._start :][: len(out)]

    def forget(self) -> None:
        self._data = self._data[:0].copy()

    def hashed(self) -> Entry:
        return Entry.of_chunks(self._entry.name, self.file.size, self.file.chunks())


class _Stream:
    # The bytes of one tensor, read in sequence; a read may begin a few bytes before the end of the last one.

    def __init__(self, place: Place, files: _Files) -> None:
        self.place = place
        self._file = files.stream(place)
        self._next, self._tail = 0, np.empty(0, np.uint8)

    def read(self, start: int, out: Bytes) -> None:
        again = self._next - start
        if 0 < again <= min(len(self._tail), len(out)):
            out[:again] = self._tail[len(self._tail) - again :]
        else:
            again = 0
        self._file.read(self.place.start + start + again, out[again:])
        self._next, self._tail = start + len(out), out[-kernels.SLACK :].copy()


class _UnitReader:
    # The weights of a unit, in any range; in sequence, each of its blocks is decoded once.

    def __init__(self, unit: Unit, files: _Files) -> None:
        self.unit = unit
        self._files = files
        luts = self._small("luts").reshape(unit.places["luts"].entry.shape)
        table = kernels.build_table(luts)
        if isinstance(table, int):
            raise unit.problem(kernels.PROBLEMS[table])
        self._table = table
        self._positions = self._read_positions()
        self._codes = _Stream(unit.places[CODES], files)
        self._signs = _Stream(unit.places["sign_mantissa"], files)
        self._held: tuple[int, Weights] | None = None

    def _small(self, part: str, start: int = 0, size: int | None = None) -> Bytes:
        # Bytes of one of the small parts; behind its end, 0.
        place = self.unit.places[part]
        out = np.zeros(place.entry.size if size is None else size, np.uint8)
        self._files.window(place.file).read(place.start + start, out[: place.entry.size - start])
        return out

    def _read_positions(self) -> npt.NDArray[np.uint32]:
        # Where each block starts, and where the last one ends; the encoder of the wheel leaves the start of the last
        # block out if no code starts there. Such a block is left out here, too.
        unit = self.unit
        found = self._small("output_positions").view(np.uint32)
        if found[0] or found[-1] != unit.weights or (found[1:] < found[:-1]).any():
            what = f"output_positions must rise from 0 to {unit.weights}, the number of weights"
            raise unit.problem(what, found=f"{found[0]} to {found[-1]}")
        steps = np.diff(found)
        blocks = len(steps) - int(not steps[-1])
        bits = 8 * unit.block_bytes
        if blocks < unit.blocks - 1 or (steps[: blocks - 1] < bits // 32).any() or (steps > bits).any():
            what = "output_positions: a block has another number of weights than its bits can hold"
            raise unit.problem(what, expected=f"{bits // 32} to {bits}", found=f"{steps.min()} to {steps.max()}")
        return found[: blocks + 1]

    def read(self, first: int, out: Weights) -> None:
        """Fill ``out`` with the weights from ``first`` on."""
        end = first + len(out)
        while first < end:
            block = int(np.searchsorted(self._positions, first, "right")) - 1
            start = int(self._positions[block])
            room = int(np.searchsorted(self._positions, min(first + WEIGHTS, end), "right")) - 1
            if first == start and room > block:  # Whole blocks.
                taken = int(self._positions[room]) - start
                self._decode(block, room, out[:taken])
            else:
                weights = self._block(block)[first - start : end - start]
                taken = len(weights)
                out[:taken] = weights
            out, first = out[taken:], first + taken

    def _block(self, block: int) -> Weights:
        if self._held is None or self._held[0] != block:
            weights = np.empty(int(self._positions[block + 1] - self._positions[block]), np.uint16)
            self._decode(block, block + 1, weights)
            self._held = block, weights
        return self._held[1]

    def _decode(self, first: int, end: int, out: Weights) -> None:
        unit, size = self.unit, self.unit.block_bytes
        start = first * size
        codes = np.zeros((end - first) * size + kernels.SLACK, np.uint8)
        self._codes.read(start, codes[: unit.code_bytes - start])
        signs = np.empty(len(out), np.uint8)
        self._signs.read(int(self._positions[first]), signs)
        each = 5 * unit.threads // 8  # 8 threads have 5 bytes; one more byte has the gap of the thread behind.
        gaps = self._small("gaps", first * each, (end - first) * each + 1)
        if not first and gaps[0] >> 3:
            raise unit.problem("gaps: the first code of all must start with the first bit")
        status, where = kernels.decode_blocks(
            self._table,
            codes,
            8 * (unit.code_bytes - start),
            gaps,
            self._positions[first : end + 1],
            unit.threads,
            signs,
            out,
            last=end == len(self._positions) - 1,
        )
        if status:
            raise unit.problem(f"{kernels.PROBLEMS[status]}, in block {first + where}")
