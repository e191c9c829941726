from typing import Any, NewType

from numpy.typing import NDArray

_Encoder = NewType("_Encoder", object)

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
INSTRUCTIONS: str

def build_decode_table(section: NDArray[Any], alphabet_size: int, table: NDArray[Any], /) -> int: ...
def decode_tiles(segment: NDArray[Any], table: NDArray[Any], /, *numbers_and_weights: Any) -> tuple[int, int]: ...
def compare_tiles(segment: NDArray[Any], table: NDArray[Any], /, *numbers_and_weights: Any) -> tuple[int, int]: ...
def new_encoder() -> _Encoder: ...
def build_code(encoder: _Encoder, weights: NDArray[Any], /) -> tuple[int, bytes, int, int]: ...
def exponents(encoder: _Encoder, /) -> bytes: ...
def encode_tiles(
    encoder: _Encoder, weights: NDArray[Any], filler: int, lane_bytes: int, /, *offsets_end_and_out: Any
) -> tuple[int, int]: ...
def count_exponents(weights: NDArray[Any], counts: NDArray[Any], /) -> None: ...
def cast_f32(source: NDArray[Any], out: NDArray[Any], /) -> bool: ...
