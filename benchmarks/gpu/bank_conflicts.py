"""How often lanes of a warp meet in a bank of shared memory, counted on real streams. Needs no GPU.

``python -m benchmarks.gpu.bank_conflicts``: for each load of the decoding loop, the passes that a warp's 32 addresses take: the most different
words in any of the 32 banks. From them, the cycles that the loads and stores of a chunk keep a multiprocessor's memory pipe busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from benchmarks import safetensors_file, synthetic, table
from benchmarks.gpu import weights
from df11.formats import layout
from df11.formats.record import Bytes, Place, Segment, open_record

if TYPE_CHECKING:
    import torch

BANKS: Final = 32
LOAD_PASSES: Final = layout.CHUNK_WEIGHTS // 128
"""Of a chunk's sign/mantissa bytes, 128 a pass."""
STORE_PASSES: Final = 2 * layout.CHUNK_WEIGHTS // 128
_TILES: Final = 40

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Passes:
    """Mean passes of a table look-up, and of a load of a word of the stream."""

    look_up: float
    word: float

    @property
    def chunk(self) -> float:
        """Of a chunk, 256 weights: four look-ups, three words, the sign/mantissa bytes, the store."""
        return 4 * self.look_up + 3 * self.word + LOAD_PASSES + STORE_PASSES


def passes(addresses: Numbers) -> int:
    """Passes of one load: ``addresses`` [32] in words of 4 bytes. The same word for several lanes is one access."""
    return int(np.bincount(np.unique(addresses) % BANKS).max())


def count(segment: Segment, tiles: int = _TILES) -> Passes:
    """Follow the first tiles of a coded segment, all lanes in step."""
    header = segment.header
    look_ups: list[int] = []
    words: list[int] = []
    for tile in range(min(tiles, segment.entry.elements // layout.TILE_WEIGHTS)):
        at = header["tiles_offset"] + layout.TILE_DESCRIPTOR.size * tile
        descriptor = layout.TILE_DESCRIPTOR.unpack(segment.data[at : at + layout.TILE_DESCRIPTOR.size].tobytes())
        at = header["lanes_offset"] + layout.LANES * header["lane_bytes"] * tile
        lanes = segment.data[at : at + layout.LANES * header["lane_bytes"]].view(f"<u{header['lane_bytes']}").astype(np.int64)
        bits = lanes + descriptor["shortest_lane"]
        positions = np.cumsum(bits) - bits
        begin = header["stream_offset"] + layout.STREAM_UNIT * descriptor["stream_position"]
        stream = np.append(segment.data[begin:], np.zeros(16, np.uint8))
        for _ in range(layout.LANE_WEIGHTS // layout.CHUNK_LANE_WEIGHTS):
            words += [passes((positions >> 5) + i) for i in range(3)]
            for _ in range(layout.CHUNK_LANE_WEIGHTS // 2):
                byte = positions >> 3
                window = (stream[byte].astype(np.int64) | stream[byte + 1].astype(np.int64) << 8 | stream[byte + 2].astype(np.int64) << 16) >> (
                    positions & 7
                )
                slots = window & ((1 << layout.CODE_LIMIT) - 1)
                look_ups.append(passes(slots))
                positions = positions + (segment.table[slots] & 0x7F)
    return Passes(float(np.mean(look_ups)), float(np.mean(words)))


def segment_of(values: torch.Tensor) -> Segment:
    """The first segment of the record of BF16 weights."""
    data = weights.encode(values)

    def read(offset: int, out: Bytes) -> None:
        out[:] = data[offset : offset + len(out)]

    return open_record(read, len(data), Place()).read_segment(0)


def _minilm() -> torch.Tensor:
    import torch

    path = synthetic.minilm_path()
    largest = max((tensor for tensor in safetensors_file.read_header(path) if tensor.dtype == "F32"), key=lambda tensor: tensor.elements)
    with path.open("rb") as file:
        data = next(iter(safetensors_file.read_pieces(file, largest, 4 << 20)))
    return torch.from_numpy(synthetic.round_to_bf16(data.view(np.float32).copy()).view(np.int16)).view(torch.bfloat16)


def main() -> None:
    """Print a row for Gaussian weights, outliers, and real weights."""
    samples = {
        "Gaussian": weights.gaussian(1 << 20, 1, "cpu"),
        "outliers, 3.6 bits an exponent": weights.spread(1 << 20, 1, "cpu"),
        "MiniLM's embedding": _minilm(),
    }
    rows = []
    for name, values in samples.items():
        found = count(segment_of(values))
        rows.append([name, f"{found.look_up:.2f}", f"{found.word:.2f}", f"{found.chunk:.1f}"])
    print(table.plain(["weights", "passes a look-up", "passes a word", "cycles a chunk"], rows))


if __name__ == "__main__":
    main()
