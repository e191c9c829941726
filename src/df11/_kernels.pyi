from collections.abc import Buffer
from typing import Any, NewType

from numpy.typing import NDArray

Table = NewType("Table", object)
Encoder = NewType("Encoder", object)
Sha256 = NewType("Sha256", object)
DFloat11Table = NewType("DFloat11Table", object)

OK: int
BAD_TILE: int
BAD_LANE: int
BAD_EXCEPTION: int
DIFFERENT: int
BAD_ALPHABET: int
BAD_LENGTH: int
INCOMPLETE_CODE: int
LANE_OVERFLOW: int
NOT_SMALLER: int
ENCODE_SLACK: int
DFLOAT11_BAD_TABLE: int
DFLOAT11_BAD_LENGTH: int
DFLOAT11_BAD_CODE: int
DFLOAT11_BAD_GAP: int
DFLOAT11_BAD_POSITION: int
DFLOAT11_BAD_END: int
DFLOAT11_SLACK: int
INSTRUCTIONS: str

def build_decode_table(section: NDArray[Any], alphabet_size: int, kind: int, /) -> Table | int: ...
def decode_tiles(
    segment: NDArray[Any],
    table: Table,
    kind: int,
    left_out: int,
    elements: int,
    lane_bytes: int,
    tiles_offset: int,
    lanes_offset: int,
    sign_mantissa_offset: int,
    stream_offset: int,
    first: int,
    last: int,
    out: NDArray[Any],
    /,
) -> tuple[int, int]: ...
def compare_tiles(
    segment: NDArray[Any],
    table: Table,
    kind: int,
    left_out: int,
    elements: int,
    lane_bytes: int,
    tiles_offset: int,
    lanes_offset: int,
    sign_mantissa_offset: int,
    stream_offset: int,
    first: int,
    last: int,
    source: NDArray[Any],
    /,
) -> tuple[int, int]: ...
def new_encoder() -> Encoder: ...
def build_code(encoder: Encoder, weights: NDArray[Any], kind: int, /) -> tuple[int, bytes, int, int]: ...
def exponents(encoder: Encoder, /) -> bytes: ...
def encode_tiles(
    encoder: Encoder,
    weights: NDArray[Any],
    kind: int,
    left_out: int,
    filler: int,
    lane_bytes: int,
    tiles_offset: int,
    lanes_offset: int,
    sign_mantissa_offset: int,
    stream_offset: int,
    end: int,
    out: NDArray[Any],
    /,
) -> tuple[int, int]: ...
def count_exponents(weights: NDArray[Any], counts: NDArray[Any], kind: int, /) -> None: ...
def cast_f32(source: NDArray[Any], out: NDArray[Any], rounded: bool, /) -> bool: ...
def any_bits(weights: NDArray[Any], kind: int, /) -> int: ...
def dfloat11_table(luts: NDArray[Any], rows: int, /) -> DFloat11Table | int: ...
def dfloat11_decode(
    table: DFloat11Table,
    codes: NDArray[Any],
    bits: int,
    gaps: NDArray[Any],
    positions: NDArray[Any],
    threads: int,
    last: bool,
    sign_mantissa: NDArray[Any],
    out: NDArray[Any],
    /,
) -> tuple[int, int]: ...
def dfloat11_encode(
    weights: NDArray[Any],
    lengths: NDArray[Any],
    codes: NDArray[Any],
    state: NDArray[Any],
    threads: int,
    out: NDArray[Any],
    gaps: NDArray[Any],
    positions: NDArray[Any],
    /,
) -> int: ...
def dfloat11_split(weights: NDArray[Any], out: NDArray[Any], /) -> None: ...
def new_sha256() -> Sha256 | None: ...
def update_sha256(state: Sha256, data: Buffer, encoder: Encoder | None, /) -> None: ...
def digest_sha256(state: Sha256, /) -> bytes: ...
