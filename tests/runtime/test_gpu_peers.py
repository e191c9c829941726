"""The peers in the GPU benchmarks, as far as possible without a GPU: DFloat11's arrays, copy floor, missing peers."""

from __future__ import annotations

import ctypes
import hashlib
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.gpu import copy_floor, dfloat11_peer, nvcomp_peer
from benchmarks.gpu.copy_floor import Shape
from benchmarks.gpu.dfloat11_peer import EncodedDf11, UnsupportedWeightsError, encode
from benchmarks.gpu.timing import MissingPeerError, Timing
from df11.formats.record import Weights
from tests.support import strategies

ARRAYS = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
UNWRITTEN = 0x7FA5
BLOCK_BITS = 8 * 4096


# DFloat11


def decode_slowly(encoded: EncodedDf11) -> Weights:
    """Block by block, like DFloat11's kernel: count, scan the counts, write to shared memory, copy that out."""
    positions, gaps = (array.tolist() for array in dfloat11_peer.padded(encoded))
    luts = encoded.luts.tolist()
    stream = encoded.encoded_exponent.tobytes() + bytes(12)
    others = encoded.sign_mantissa.tolist()
    n = len(others)
    room = (encoded.shared_bytes - 4 * 512 - 4) // 2
    out = np.full(n, UNWRITTEN, np.uint16)
    for block in range(-(-len(encoded.encoded_exponent) // 4096)):
        exponents = []
        for thread in range(512 * block, 512 * (block + 1)):
            word = int.from_bytes(stream[8 * thread : 8 * thread + 12].ljust(12, b"\0"))
            two = gaps[thread * 5 // 8] << 8 | gaps[thread * 5 // 8 + 1]
            at = two >> (11 - thread * 5 % 8) & 31
            found = []
            while at < 64:
                exponent = look_up(luts, word >> (64 - at) & 0xFFFFFFFF)
                found.append(exponent)
                at += luts[-1][exponent]
            exponents.append(found)
        first, last = positions[block], positions[block + 1]
        shared = [UNWRITTEN] * room
        index = first
        for found in exponents:
            for i, exponent in enumerate(found[: max(0, n - index)], index):
                shared[i - first] = (others[i] & 0x80) << 8 | exponent << 7 | others[i] & 0x7F
            index += len(found)
        size = min(last, n) - first
        out[first : first + size] = shared[:size]
    return out


def look_up(luts: list[list[int]], bits: int) -> int:
    """The exponent whose code begins at the highest of 32 bits."""
    row = 0
    for shift in (24, 16, 8, 0):
        value = luts[row][bits >> shift & 255]
        if value < 240:
            assert luts[-1][value] > 0
            return value
        row = 256 - value
    raise AssertionError("no exponent after four tables")


def decodable(weights: Weights) -> Weights:
    """The weights with exponents below 240."""
    return (weights & 0x807F | np.minimum(weights >> 7 & 0xFF, 239) << 7).astype(np.uint16)


def formula(n: int) -> Weights:
    """Weights that depend on no random number generator: 24 exponents, each twice as frequent as the one below."""
    h = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    h ^= h >> np.uint64(29)
    exponents = np.full(n, 103, np.uint64)
    for bit in range(24):
        exponents += (h >> np.uint64(40)) >= 2**bit
    return (exponents << np.uint64(7) | h & np.uint64(0x807F)).astype(np.uint16)


@pytest.mark.parametrize(
    ("n", "sha256"),
    [
        (1000, "6b3c4d01e49e65c8be01a006cb042daa28797d37dc33113b72f1305df4c79845"),
        (12500, "61f6de39987f8c03863cdd77787d65ec0d8a667fc991d59c73a6773de601fae3"),
        (250_000, "2c0ce2d99aa478977bdd14e42a8cf65472e4982e9cec4517099efda0c188676a"),
    ],
)
def test_the_arrays_are_those_of_dfloat11s_encoder(n: int, sha256: str) -> None:
    # The checksums are of what the encoder of dfloat11 0.5.0 (with dahuffman 0.4.2) makes.
    encoded = encode(formula(n))
    assert hashlib.sha256(b"".join(getattr(encoded, name).tobytes() for name in ARRAYS)).hexdigest() == sha256


@settings(max_examples=60)
@given(strategies.weights(40_000))
def test_what_is_encoded_can_be_decoded(weights: Weights) -> None:
    weights = decodable(weights)
    try:
        encoded = encode(weights)
    except UnsupportedWeightsError as error:
        assert "tables" in str(error)
        assume(False)
    assert np.array_equal(decode_slowly(encoded), weights)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 511, 512, 513, 4095, 4096, 4097, 12_345, 100_003])
def test_gaussian_weights_of_odd_sizes(n: int) -> None:
    weights = strategies.make("gaussian", n, n)
    encoded = encode(weights)
    assert np.array_equal(decode_slowly(encoded), weights)
    assert (
        encoded.luts.dtype
        == encoded.encoded_exponent.dtype
        == encoded.sign_mantissa.dtype
        == encoded.gaps.dtype
        == np.uint8
    )
    assert encoded.output_positions.dtype == np.uint32
    assert encoded.luts.shape[1] == 256
    assert len(encoded.gaps) == 320 * encoded.blocks
    assert encoded.stored_bytes == sum(getattr(encoded, name).nbytes for name in ARRAYS)


def test_a_matrix_is_taken_row_by_row() -> None:
    weights = strategies.make("gaussian", 6000, 1).reshape(60, 100)
    for matrix in (weights, weights.T):
        assert np.array_equal(decode_slowly(encode(matrix)), matrix.reshape(-1))


def test_all_exponents_that_dfloat11_can_code() -> None:
    values = np.arange(65536, dtype=np.uint16)
    weights = values[values >> 7 & 0xFF < 240]
    assert np.array_equal(decode_slowly(encode(weights)), weights)


@pytest.mark.parametrize("exponent", range(240, 256))
def test_larger_exponents_are_refused(exponent: int) -> None:
    weights = formula(1000)
    weights[500] = exponent << 7 | 1
    with pytest.raises(UnsupportedWeightsError, match=f"exponent {exponent}"):
        encode(weights)


def with_bits(total: int, last_bits: int) -> Weights:
    """Weights whose codes have ``total`` bits together, and that of the last weight ``last_bits``."""
    rare = np.repeat(np.arange(1, 13), 2 ** np.arange(12)) + 100  # codes of about 13 to 2 bits
    common = 4 * len(rare)
    code = dfloat11_peer.choose_code({100: common, **{100 + i: 2 ** (i - 1) for i in range(1, 13)}})
    last = next(exponent for exponent, (length, _) in code.items() if exponent > 100 and length == last_bits)
    rest = np.delete(rare, np.flatnonzero(rare == last)[0])
    bits = sum(code[int(exponent)][0] for exponent in rare)
    assert code[100][0] == 1
    exponents = np.concatenate([rest, np.full(total - bits, 100), [last]])
    assert (
        dfloat11_peer.choose_code(
            dict(zip(*map(np.ndarray.tolist, np.unique(exponents, return_counts=True)), strict=True))
        )[last][0]
        == last_bits
    )
    return (exponents << 7 | np.arange(len(exponents)) % 128).astype(np.uint16)


@pytest.mark.parametrize("extra", [*range(-10, 20), 64, 65, BLOCK_BITS - 1, BLOCK_BITS, BLOCK_BITS + 1])
@pytest.mark.parametrize("last_bits", [2, 9, 12])
def test_ends_around_a_block(extra: int, last_bits: int) -> None:
    weights = with_bits(BLOCK_BITS + extra, last_bits)
    encoded = encode(weights)
    assert len(encoded.encoded_exponent) == -(-(BLOCK_BITS + extra) // 8)
    assert np.array_equal(decode_slowly(encoded), weights)


def test_a_block_without_a_position() -> None:
    # The last code reaches into a new block and ends with a byte: DFloat11's encoder forgets the block, and its kernel
    # reads past the positions.
    encoded = encode(with_bits(BLOCK_BITS + 8, 9))
    assert encoded.blocks == len(encoded.output_positions) == 2
    positions, _ = dfloat11_peer.padded(encoded)
    assert positions.tolist() == [0, len(encoded.sign_mantissa), len(encoded.sign_mantissa)]


def test_codes_are_limited_to_32_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    counts = dict(enumerate(fibonacci, 60))
    code = dfloat11_peer.choose_code(counts)
    lengths = [length for length, _ in code.values()]
    assert max(lengths) <= 32
    assert sum(2**-length for length in lengths) == 1
    assert len(dfloat11_peer.lookup_tables(code)) <= 18


def test_more_tables_than_can_be_numbered_are_refused() -> None:
    # 239 exponents that occur once: their codes have 9 bits and begin with many different bytes.
    weights = (np.concatenate([np.arange(240), np.repeat(0, 20_000)]) << 7).astype(np.uint16)
    with pytest.raises(UnsupportedWeightsError, match="tables"):
        encode(weights)


def test_an_endless_loop_is_refused() -> None:
    luts = np.full((3, 256), 5, np.uint8)  # two tables, both of one exponent
    luts[-1] = 0
    luts[-1, 5] = 3
    zeros, gaps = np.zeros(8, np.uint8), np.zeros(512, np.uint8)
    dfloat11_peer.check_end(luts, zeros, gaps)
    luts[0, 0] = 255
    dfloat11_peer.check_end(luts, zeros, gaps)
    luts[1, 0] = 255  # zeros lead from the second table back to it
    with pytest.raises(UnsupportedWeightsError, match="endless"):
        dfloat11_peer.check_end(luts, zeros, gaps)


@pytest.mark.parametrize("weights", [np.zeros(0, np.uint16), np.zeros(4, np.float32), np.zeros(4, np.int16)])
def test_only_weights_are_encoded(weights: Weights) -> None:
    with pytest.raises(ValueError, match="uint16"):
        encode(weights)


def test_the_ptx_is_found(tmp_path: Path) -> None:
    ptx = tmp_path / "decode.ptx"
    with pytest.raises(MissingPeerError, match=r"decode\.ptx"):
        dfloat11_peer.find_ptx(tmp_path, ptx)
    ptx.write_text("a")
    assert dfloat11_peer.find_ptx(tmp_path, ptx) == ptx
    wheel = tmp_path / "dfloat11-0.5.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("dfloat11/other.py", "")
    with pytest.raises(MissingPeerError, match=r"decode\.ptx"):
        dfloat11_peer.find_ptx(tmp_path, wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("dfloat11/decode.ptx", "b")
    assert dfloat11_peer.find_ptx(tmp_path, wheel).read_text() == "b"


def not_installed(_name: str) -> None:
    raise metadata.PackageNotFoundError


def test_what_is_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metadata, "files", not_installed)
    with pytest.raises(MissingPeerError, match="DFloat11: not installed") as dfloat11:
        dfloat11_peer.find_ptx(tmp_path)
    with pytest.raises(MissingPeerError, match="nvCOMP: not installed") as nvcomp:
        nvcomp_peer.load_library()
    assert "\n" not in f"{dfloat11.value}{nvcomp.value}"


# nvCOMP


def test_structures_have_the_size_that_nvcomp_declares() -> None:
    assert ctypes.sizeof(nvcomp_peer._CompressOptions) == ctypes.sizeof(nvcomp_peer._DecompressOptions) == 64


def test_a_library_that_is_not_nvcomp(tmp_path: Path) -> None:
    library = tmp_path / "libnvcomp.so.6"
    library.write_text("no library")
    with pytest.raises(MissingPeerError, match="nvCOMP"):
        nvcomp_peer.load_library(library)


# The copy floor

SHAPES = st.builds(Shape, st.sampled_from([1, 2, 4, 8]), st.sampled_from([32, 128, 256]))


@given(SHAPES, st.integers(1, 3000), st.integers(1, 3000))
def test_the_plan_reads_everything(shape: Shape, vectors: int, out_vectors: int) -> None:
    launch = copy_floor.launch_for(16 * vectors, 8 * out_vectors, shape)
    assert (
        launch.tiles * shape.threads * shape.unroll >= out_vectors > (launch.tiles - 1) * shape.threads * shape.unroll
    )
    assert launch.tiles * launch.tile_vectors >= vectors
    assert launch.tile_vectors <= launch.loads * shape.threads < launch.tile_vectors + shape.threads
    assert launch.tile_vectors % 8 == 0


@given(SHAPES, st.integers(1, 300), st.integers(1, 300), st.data())
def test_every_stored_byte_counts(shape: Shape, vectors: int, out_vectors: int, data: st.DataObject) -> None:
    stored = np.random.default_rng(vectors).integers(256, size=16 * vectors, dtype=np.uint8)
    # If little is written, a partial last tile has no threads for some folds.
    weights = -(-8 * out_vectors // (8 * shape.threads * shape.unroll)) * 8 * shape.threads * shape.unroll
    out = copy_floor.model(stored, weights, shape)
    assert out.shape == (weights,)
    at = data.draw(st.integers(0, stored.size - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    assert np.count_nonzero(copy_floor.model(stored, weights, shape) != out) == shape.unroll


@pytest.mark.parametrize(("stored", "weights"), [(8, 8), (16, 4), (0, 8), (16, 0), (17, 8)])
def test_sizes_that_are_no_whole_vectors(stored: int, weights: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        copy_floor.launch_for(stored, weights, Shape())


# Timing


def test_timings_are_summarised() -> None:
    assert Timing.of([3.0, 1.0, 2.0, 10.0]) == Timing(2.5, 1.0, 10.0, 4)
    assert Timing.of(iter([0.5])).bandwidth(10) == 20
