"""Write and read checkpoints in DFloat11's layout, slowly, from the description in docs/dfloat11.md alone.

``encode`` makes a unit as the encoder of that project does, with an end mark among the codes, or as another one might;
``decode`` reads one as its kernel does, each thread for itself.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import sources
from tests.support.sources import Tensor

END = -1
Parts = dict[str, Any]
"""Arrays by the names of a unit's tensors; luts has two dimensions."""


def with_exponents(exponents: Sequence[int], seed: int = 0) -> np.ndarray:
    """BF16 bits (u16) with these exponents, and random signs and mantissas."""
    rest = np.random.default_rng(seed).integers(0, 256, len(exponents))
    return ((rest & 0x80) << 8 | np.asarray(exponents, np.int64) << 7 | rest & 0x7F).astype(np.uint16)


def huffman(counts: Mapping[int, int]) -> dict[int, str]:
    """A prefix code: symbol -> its bits as text. One symbol alone gets one bit."""
    if len(counts) == 1:
        return dict.fromkeys(counts, "0")
    heap = [(count, symbol, {symbol: ""}) for symbol, count in sorted(counts.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        one, two = heapq.heappop(heap), heapq.heappop(heap)
        codes = {symbol: bit + rest for part, bit in ((one, "0"), (two, "1")) for symbol, rest in part[2].items()}
        heapq.heappush(heap, (one[0] + two[0], min(one[1], two[1]), codes))
    return heap[0][2]


def tables(codes: Mapping[int, str]) -> np.ndarray:
    """``luts`` for these codes. Entries that only the end mark leads to keep what the loop held before, as there."""
    prefixes = sorted(
        {code[:cut] for code in codes.values() for cut in range(0, len(code), 8)}, key=lambda p: (len(p), p)
    )
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    held = 0
    for row, prefix in enumerate(prefixes):
        for byte in range(256):
            path = prefix + f"{byte:08b}"
            if path in prefixes:
                held = 256 - prefixes.index(path)
            else:
                found = [symbol for symbol, code in codes.items() if path.startswith(code)]
                held = found[0] if found and found[0] != END else held
            luts[row, byte] = held
    for symbol, code in codes.items():
        if symbol != END:
            luts[-1, symbol] = len(code)
    return luts


def encode(
    weights: Sequence[np.ndarray], threads: int = 512, *, codes: Mapping[int, str] | None = None, end: bool = True
) -> Parts:
    """A unit of these weights, u16. ``end``: with an end mark, whose first bits fill the last byte.

    With one, the start of a block or thread is left out if the last code runs into it and ends with a byte.
    """
    words = np.concatenate(weights)
    exponents = (words >> 7 & 0xFF).tolist()
    if codes is None:
        counts = Counter(exponents)
        codes = huffman({**counts, END: 1} if end else counts)
    text = "".join(codes[one] for one in exponents)
    starts = np.cumsum([0] + [len(codes[one]) for one in exponents])
    fill = -len(text) % 8
    is_quirky = end and not fill
    text += (codes[END] * 8 if END in codes else "0" * 8)[:fill]
    size = len(text) // 8
    blocks = -(-size // (8 * threads))
    gaps, positions = [], []
    for thread in range(blocks * threads):
        first = int(np.searchsorted(starts, 64 * thread))  # The number of all weights, where the last code ends.
        begins = first < len(words) or (first == len(words) and not is_quirky)
        gaps.append(max(int(starts[first]) - 64 * thread, 0) if begins and first < len(starts) else 0)
        if thread % threads == 0 and begins:
            positions.append(min(first, len(words)))
    positions.append(len(words))
    bits = np.array([gap >> bit & 1 for gap in gaps for bit in range(4, -1, -1)], np.uint8)
    return {
        "luts": tables(codes),
        "encoded_exponent": np.packbits(np.array(list(text), np.uint8)),
        "sign_mantissa": (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8),
        "output_positions": np.array(positions, np.uint32).view(np.uint8),
        "gaps": np.packbits(bits),
        "split_positions": np.cumsum([len(one) for one in weights])[:-1].astype(np.int64),
    }


def tensors(name: str, parts: Parts) -> list[Tensor]:
    """The tensors of a unit, for a file."""
    return [
        Tensor(
            f"{name}.{part}" if name else part,
            "I64" if part == "split_positions" else "U8",
            value.shape,
            value.tobytes(),
        )
        for part, value in parts.items()
    ]


def config(patterns: Mapping[str, Sequence[str]], threads: int = 512, **more: Any) -> dict[str, Any]:
    """What config.json says."""
    ours = {
        "version": "0.5.0",
        "threads_per_block": [threads],
        "bytes_per_thread": 8,
        "pattern_dict": {pattern: list(parts) for pattern, parts in patterns.items()},
    }
    return {"dfloat11_config": ours, **more}


def write(folder: Path, files: Mapping[str, Sequence[Tensor]], document: Mapping[str, Any]) -> Path:
    """A checkpoint: files by name, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        sources.write(folder / name, list(content))
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def read_file(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of each tensor of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: (
            one["dtype"],
            tuple(one["shape"]),
            data[8 + size + one["data_offsets"][0] : 8 + size + one["data_offsets"][1]],
        )
        for name, one in header.items()
    }


def read_units(folder: Path) -> tuple[dict[str, Parts], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """The units and the plain tensors of all files in a folder."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        more = read_file(path)
        assert not found.keys() & more.keys()
        found |= more
    units: dict[str, Parts] = {}
    for name in [name.removesuffix(".encoded_exponent") for name in found if name.endswith(".encoded_exponent")]:
        units[name] = {}
        for part in ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions"):
            dtype, shape, data = found.pop(f"{name}.{part}")
            assert dtype == ("I64" if part == "split_positions" else "U8")
            units[name][part] = np.frombuffer(data, np.int64 if part == "split_positions" else np.uint8).reshape(shape)
    return units, found


def decode(parts: Parts, threads: int = 512) -> list[np.ndarray]:
    """The weights of a unit, as the kernel finds them: each thread decodes what starts in its 64 bits."""
    luts, data = parts["luts"], parts["encoded_exponent"]
    signs = parts["sign_mantissa"]
    size, blocks = len(data), -(-len(data) // (8 * threads))
    positions = parts["output_positions"].view(np.uint32)
    assert len(positions) == blocks + 1
    bits = np.unpackbits(parts["gaps"])
    assert len(bits) // 5 >= blocks * threads
    assert luts.shape[0] <= 18 and luts[-1].max() <= 32 and not luts[-1, 240:].any()
    data = np.concatenate([data, np.zeros(8 * threads * blocks - size + 16, np.uint8)])
    out = np.zeros(len(signs), np.uint16)
    for block in range(blocks):
        at = int(positions[block])
        most = int(np.diff(positions.astype(np.int64)).max())
        assert 4 * threads + 4 + 2 * most <= 48 << 10
        for thread in range(block * threads, (block + 1) * threads):
            position = 64 * thread + int("".join(map(str, bits[5 * thread : 5 * thread + 5])), 2)
            while position < 64 * (thread + 1):
                window = int.from_bytes(data[position // 8 : position // 8 + 8].tobytes(), "big")
                window = window << (position % 8) & (1 << 64) - 1
                entry = luts[0, window >> 56]
                for depth in range(1, 4):
                    if entry >= 240:
                        entry = luts[256 - int(entry), window >> (56 - 8 * depth) & 255]
                length = int(luts[-1, entry])
                assert length, "the kernel would never end"
                if at < positions[block + 1]:
                    sign = int(signs[at])
                    out[at] = (sign & 0x80) << 8 | int(entry) << 7 | sign & 0x7F
                at += 1
                position += length
        assert at >= positions[block + 1]
    return np.split(out, parts["split_positions"])
