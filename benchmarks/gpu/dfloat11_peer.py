"""DFloat11 as a peer: a matrix in its kernel's arrays, made by a fast encoder of our own and decoded by its kernel.

The library (dfloat11 0.5.0) cannot be imported on a current stack, and its encoder handles a few megabytes per second.
Its kernel is in the wheel as PTX, which is loaded from there without the library. The layout of the arrays was read off
its sources and its PTX, which agree; and the PTX, run instruction by instruction by an interpreter on a CPU, decoded
what ``encode`` had encoded:

* ``decode(luts, encoded_exponent, sign_mantissa, output_positions, gaps, outputs, n_luts, n_bytes, n_elements)``: six
  64-bit pointers, then three 32-bit signed numbers; n_luts is the number of rows of luts. 512 threads per block,
  ceil(n_bytes / 4096) blocks.
* A thread owns the codes that begin in its 8 bytes (bits from the highest of a byte on). It reads 4 bytes further, and
  zeros after n_bytes. Its first code begins at bit gaps[thread], 5 bits each, packed likewise: a code has at most 32
  bits. It decodes twice: to count and, after a scan of the counts over the block, to write.
* Dynamic shared memory: a u32 per thread, one more, and a u16 for each weight of the block that has the most.
* luts[t, byte] below 240 is an exponent; from 240 on, the next byte is looked up in table 256 - value; at most four
  look-ups. The last row has the code lengths. So exponents from 240 on (2^113 and more, infinities, NaN) cannot be
  coded, nor can codes with more than 16 tables besides the first.
* output_positions[b] is the first weight of block b; one more at the end is the number of weights.

Two reads go past the end of what its encoder makes: of one byte of gaps, always; and of one position, if a block holds
nothing but the end of the last code and that ends with a byte. Both do not affect the result; ``Decoder.load`` pads.
"""

from __future__ import annotations

import heapq
import importlib
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.timing import MissingPeerError, cupy_stream

Bytes = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.uint16]

PACKAGE: Final = "dfloat11"
PTX: Final = "decode.ptx"
KERNEL: Final = "decode"

BYTES_PER_THREAD: Final = 8
THREADS: Final = 512
"""Threads per block."""
MOST_BITS: Final = 32
"""Longest code."""
FIRST_POINTER: Final = 240
"""Table values from here on refer to another table."""
MOST_LOOKUPS: Final = 4
MOST_WEIGHTS: Final = 2**31 - 1

_GAP_BITS: Final = 5
_WORD_BITS: Final = 8 * BYTES_PER_THREAD
_BLOCK: Final = 1 << 17  # weights that are encoded at once: their positions fit into the cache
_DEFAULT_SHARED_BYTES: Final = 48 << 10  # more must be requested explicitly

_END = -1  # The end symbol, below all exponents.
Code = dict[int, tuple[int, int]]
"""Symbol -> (length, bits)."""


class UnsupportedWeightsError(ValueError):
    """DFloat11's kernel cannot decode these weights."""


@dataclass(frozen=True, slots=True)
class EncodedDf11:
    """What DFloat11 stores for a matrix of n weights.

    ``luts``: u8 [tables + 1, 256]; ``encoded_exponent``: u8 [code bytes]; ``sign_mantissa``: u8 [n];
    ``output_positions``: u32 [blocks + 1]; ``gaps``: u8 [320 * blocks].
    """

    luts: Bytes
    encoded_exponent: Bytes
    sign_mantissa: Bytes
    output_positions: npt.NDArray[np.uint32]
    gaps: Bytes

    @property
    def blocks(self) -> int:
        """Blocks of the launch."""
        return -(-len(self.encoded_exponent) // (THREADS * BYTES_PER_THREAD))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 4 * THREADS + 4 + 2 * int(np.diff(self.output_positions).max())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(
            part.nbytes
            for part in (self.luts, self.encoded_exponent, self.sign_mantissa, self.output_positions, self.gaps)
        )


def encode(weights: Weights) -> EncodedDf11:
    """The arrays that DFloat11's encoder makes of BF16 weights (u16, any shape), bit for bit.

    Its encoder fails if there is only one exponent; this one does not. Raises UnsupportedWeightsError where its kernel
    would decode wrongly, read out of bounds or never end.
    """
    if weights.dtype != np.uint16 or not 0 < weights.size <= MOST_WEIGHTS:
        raise ValueError(f"1 to 2^31 - 1 weights as uint16 are needed, not {weights.size} of {weights.dtype}")
    flat = weights.reshape(-1)
    exponents = (flat >> np.uint16(7)).astype(np.uint8)
    sign_mantissa = ((flat >> np.uint16(8)) & np.uint16(0x80) | flat & np.uint16(0x7F)).astype(np.uint8)
    counts = np.zeros(256, np.int64)
    for start in range(0, flat.size, _BLOCK):
        counts += np.bincount(exponents[start : start + _BLOCK], minlength=256)
    used = {int(exponent): int(counts[exponent]) for exponent in np.flatnonzero(counts)}
    if max(used) >= FIRST_POINTER:
        raise UnsupportedWeightsError(f"exponent {max(used)}: DFloat11 only decodes those below {FIRST_POINTER}")
    code = choose_code(used)
    luts = lookup_tables(code)
    total = sum(count * code[exponent][0] for exponent, count in used.items())
    encoded, every_gap, positions = _encode_exponents(exponents, code, total)
    check_end(luts, encoded, every_gap)
    gaps = np.packbits(np.unpackbits(every_gap[:, None], axis=1)[:, 8 - _GAP_BITS :])
    return EncodedDf11(luts, encoded, sign_mantissa, positions, gaps)


def padded(encoded: EncodedDf11) -> tuple[npt.NDArray[np.uint32], Bytes]:
    """output_positions and gaps, with everything that the kernel reads."""
    missing = encoded.blocks + 1 - len(encoded.output_positions)
    positions = np.append(encoded.output_positions, np.full(missing, len(encoded.sign_mantissa), np.uint32))
    return positions, np.append(encoded.gaps, np.zeros(16, np.uint8))


def choose_code(counts: dict[int, int]) -> Code:
    """A Huffman code for the exponents in ``counts`` (exponent -> occurrences, ascending) and an end symbol.

    The end symbol occurs once. While a code is longer than 32 bits, more and more of the rarest exponents are
    counted as one each.
    """
    code = _huffman(counts)
    exponents, occurrences = np.array(list(counts)), np.array(list(counts.values()))
    rarest = 2
    while max(length for length, _ in code.values()) > MOST_BITS:
        chosen = exponents[np.argpartition(occurrences, rarest)[:rarest]]
        code = _huffman(counts | dict.fromkeys(chosen.tolist(), 1))
        rarest += 1
    return code


def _huffman(counts: dict[int, int]) -> Code:
    # Among equal counts, the tree whose leftmost symbol is smaller goes first. Codes follow the order of the leaves.
    heap: list[tuple[int, int, Code]] = [
        (count, symbol, {symbol: (0, 0)}) for symbol, count in {_END: 1, **counts}.items()
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        count0, leftmost, code0 = heapq.heappop(heap)
        count1, _, code1 = heapq.heappop(heap)
        joined = {symbol: (length + 1, bits) for symbol, (length, bits) in code0.items()}
        joined |= {symbol: (length + 1, bits | 1 << length) for symbol, (length, bits) in code1.items()}
        heapq.heappush(heap, (count0 + count1, leftmost, joined))
    return heap[0][2]


def lookup_tables(code: Code) -> Bytes:
    """u8 [tables + 1, 256]: tables that each decode a byte of a code, and the code lengths."""
    leaves = {symbol: leaf for symbol, leaf in code.items() if symbol != _END}
    deep = dict.fromkeys(_cut(leaf, (leaf[0] - 1) // 8 * 8) for leaf in leaves.values())
    prefixes = sorted({(0, 0): None, **deep}, key=lambda prefix: prefix[0])
    if len(prefixes) > 256 - FIRST_POINTER + 1:
        raise UnsupportedWeightsError(f"the code needs {len(prefixes)} tables, and DFloat11 can number 17")
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    value = -1
    for row, prefix in enumerate(prefixes):
        entries = {}
        for symbol, leaf in leaves.items():
            rest = leaf[0] - prefix[0]
            if rest > 0 and _cut(leaf, prefix[0]) == prefix:
                key = (leaf[1] << 8 >> rest if rest < 8 else leaf[1] >> (rest - 8)) & 255
                entries[key] = symbol if rest <= 8 else 256 - prefixes.index(_cut(leaf, prefix[0] + 8))
        if value < 0:
            value = entries[min(entries)]
        for key in range(
            256
            # Missing entries, for longer codes and the end symbol, repeat the entry before, even that of the previous
            # table.
        ):
            value = entries.get(key, value)
            luts[row, key] = value
    for symbol, (length, _) in leaves.items():
        luts[-1, symbol] = length
    return luts


def _cut(leaf: tuple[int, int], length: int) -> tuple[int, int]:
    # The first bits of a code, or all of a shorter one.
    return min(length, leaf[0]), leaf[1] >> max(0, leaf[0] - length)


def check_end(luts: Bytes, encoded: Bytes, every_gap: Bytes) -> None:
    """Raise UnsupportedWeightsError if the kernel would loop forever. ``every_gap``: u8, a gap per thread.

    A thread decodes whatever follows the last code, up to the end of its bytes. The table entries that stand for the
    end symbol can point anywhere, even in a circle, and a look-up that ends without an exponent has length 0.
    """
    last = (len(encoded) - 1) // BYTES_PER_THREAD
    for thread in range(max(0, last - 1), last + 2):  # the one after it stands for all that have only zeros
        bits = int.from_bytes(encoded[BYTES_PER_THREAD * thread :][:12].tobytes().ljust(12, b"\0"))
        at = int(every_gap[thread]) if thread <= last else 0
        while at < _WORD_BITS:
            value, row = FIRST_POINTER, 0
            for lookup in range(MOST_LOOKUPS):
                value = int(luts[row, bits >> (88 - at - 8 * lookup) & 255])
                if value < FIRST_POINTER:
                    break
                row = 256 - value
            if not luts[-1, value]:
                raise UnsupportedWeightsError(
                    "what follows the last code would send DFloat11's kernel into an endless loop"
                )
            at += int(luts[-1, value])


def _encode_exponents(exponents: Bytes, code: Code, total: int) -> tuple[Bytes, Bytes, npt.NDArray[np.uint32]]:
    """The codes of all exponents, ``total`` bits: (encoded_exponent, a gap per thread, output_positions).

    A thread's 8 bytes are one 64-bit word here, in which at least one code begins.
    """
    lengths = np.zeros(256, np.int64)
    aligned = np.zeros(256, np.uint64)
    for symbol, (length, bits) in code.items():
        if symbol != _END:
            lengths[symbol] = length
            aligned[symbol] = bits << (_WORD_BITS - length)
    words = np.zeros(total // _WORD_BITS + 2, np.uint64)
    gaps: list[npt.NDArray[np.int64]] = []
    firsts: list[npt.NDArray[np.int64]] = []
    position, previous = 0, -1
    for start in range(0, len(exponents), _BLOCK):
        block = exponents[start : start + _BLOCK]
        sizes = lengths[block]
        begins = np.cumsum(sizes)
        begins += position - sizes
        at = begins >> 6
        offsets = begins & 63
        codes = aligned[block]
        runs = np.flatnonzero(np.diff(at, prepend=-1))
        words[at[runs]] |= np.bitwise_or.reduceat(codes >> offsets.astype(np.uint64), runs)
        lasts = np.append(runs[1:], len(block)) - 1  # The last code of a word can continue in the next one.
        words[at[lasts] + 1] |= codes[lasts] << np.uint64(1) << (np.uint64(63) - offsets[lasts].astype(np.uint64))
        if at[0] == previous:
            runs = runs[1:]
        gaps.append(offsets[runs])
        firsts.append(start + runs)
        position, previous = int(begins[-1] + sizes[-1]), int(at[-1])
    # The rest of the last byte holds the first bits of the end symbol, which counts as a code that begins.
    if total % 8:
        length, bits = code[_END]
        rest = 8 - total % 8
        byte = bits >> (length - rest) if length >= rest else bits << (rest - length)
        words[total // _WORD_BITS] |= np.uint64(byte << (_WORD_BITS - rest - total % _WORD_BITS))
        if total // _WORD_BITS > previous:
            gaps.append(np.array([total % _WORD_BITS]))
            firsts.append(np.array([len(exponents)]))
    encoded = words.astype(">u8").view(np.uint8)[: -(-total // 8)]
    every_gap = np.zeros(-(-len(encoded) // (BYTES_PER_THREAD * THREADS)) * THREADS, np.uint8)
    known = np.concatenate(gaps)
    every_gap[: len(known)] = known
    positions = np.append(np.concatenate(firsts)[::THREADS], len(exponents)).astype(np.uint32)
    return encoded.copy(), every_gap, positions


@dataclass(frozen=True, slots=True)
class LoadedDf11:
    """An encoded matrix on the GPU: its arrays as torch tensors, and the launch parameters."""

    tensors: tuple[Any, ...]
    elements: int
    blocks: int
    shared_bytes: int
    pointers: tuple[int, ...]
    numbers: tuple[np.int32, ...]


class Decoder:
    """DFloat11's kernel on a device (a torch device, its index or name).

    ``ptx``: the PTX, or the wheel; None stands for the installed package. Raises MissingPeerError, which says in one
    line what is missing.
    """

    def __init__(self, device: Any = "cuda", ptx: Path | None = None) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._cupy: Any = importlib.import_module("cupy")
        device = self._torch.device(device)
        self.device: Any = self._torch.device(
            "cuda", self._torch.cuda.current_device() if device.index is None else device.index
        )
        with tempfile.TemporaryDirectory() as folder, self._cupy.cuda.Device(self.device.index):
            path = find_ptx(Path(folder), ptx)
            try:
                self._kernel = self._cupy.RawModule(path=str(path)).get_function(KERNEL)
                _ = self._kernel.num_regs  # loads it
            except Exception as error:
                raise MissingPeerError(
                    f"DFloat11: its PTX does not load on this driver: {str(error).strip().splitlines()[0]}"
                ) from error

    def load(self, encoded: EncodedDf11) -> LoadedDf11:
        """Copy the arrays to the GPU, padded where the kernel reads past their ends."""
        positions, gaps = padded(encoded)
        arrays = (encoded.luts, encoded.encoded_exponent, encoded.sign_mantissa, positions.view(np.int32), gaps)
        tensors = tuple(self._torch.from_numpy(array).to(self.device) for array in arrays)
        if encoded.shared_bytes > _DEFAULT_SHARED_BYTES:  # Its own code does not do this, and the launch fails.
            with self._cupy.cuda.Device(self.device.index):
                self._kernel.max_dynamic_shared_size_bytes = max(
                    encoded.shared_bytes, self._kernel.max_dynamic_shared_size_bytes
                )
        return LoadedDf11(
            tensors=tensors,
            elements=len(encoded.sign_mantissa),
            blocks=encoded.blocks,
            shared_bytes=encoded.shared_bytes,
            pointers=tuple(tensor.data_ptr() for tensor in tensors),
            numbers=tuple(
                map(np.int32, (len(encoded.luts), len(encoded.encoded_exponent), len(encoded.sign_mantissa)))
            ),
        )

    def decode(self, loaded: LoadedDf11, out: Any = None) -> Any:
        """The weights, torch.bfloat16 [n], written to ``out`` if given, on torch's current stream. Does not wait."""
        if out is None:
            out = self._torch.empty(loaded.elements, dtype=self._torch.bfloat16, device=self.device)
        elif out.numel() != loaded.elements or out.dtype != self._torch.bfloat16 or not out.is_contiguous():
            raise ValueError(f"the output must have {loaded.elements} weights of bfloat16, contiguous")
        arguments = (*loaded.pointers, out.data_ptr(), *loaded.numbers)
        with self._cupy.cuda.Device(self.device.index), cupy_stream(self.device):
            self._kernel((loaded.blocks,), (THREADS,), arguments, shared_mem=loaded.shared_bytes)
        return out


def find_ptx(folder: Path, source: Path | None = None) -> Path:
    """The PTX: ``source`` itself, from the wheel ``source`` unpacked into ``folder``, or from the installed package."""
    if source is not None and source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            inside = next((name for name in wheel.namelist() if Path(name).name == PTX), None)
            if inside is None:
                raise MissingPeerError(f"DFloat11: {source} has no {PTX}")
            return Path(wheel.extract(inside, folder))
    if source is not None:
        found = [source]
    else:
        try:
            files = metadata.files(PACKAGE) or []
        except metadata.PackageNotFoundError:
            raise MissingPeerError(f"DFloat11: not installed (pip install --no-deps {PACKAGE})") from None
        found = [Path(str(file.locate())) for file in files if file.name == PTX]
    if not found or not found[0].is_file():
        raise MissingPeerError(f"DFloat11: no {PTX}" + (f" at {found[0]}" if found else " in the installed package"))
    return found[0]
