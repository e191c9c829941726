"""The CPU kernels: no access out of bounds on any input, the same bytes with and without special instructions."""

from __future__ import annotations

import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from df11 import _kernels
from tests.support import commands, cpu_kernels, sources, strategies

HOSTILE = 1500
"""Damaged segments given to each build."""


@pytest.fixture(scope="module")
def asked() -> list[tuple[bytes, bytes]]:
    """Questions, and the answers of this process's extension."""
    damaged = (cpu_kernels.damaged_segment(10_000 + number) for number in range(HOSTILE))
    return cpu_kernels.questions(1) + [cpu_kernels.ask_to_decode(segment) for segment in damaged if segment is not None]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The kernels under ASan and UBSan."""
    return cpu_kernels.build(compiler(), tmp_path_factory.mktemp("sanitized"), "-O1", *cpu_kernels.SANITIZERS)


def compiler() -> list[str]:
    """The C compiler; CI must have one."""
    command = shlex.split(os.environ.get("CC", "cc"))
    cpu_kernels.tool(command[0], "gcc")
    return command


@pytest.mark.parametrize("instructions", ["portable", "avx2"])
def test_no_byte_out_of_bounds(instructions, sanitized, asked):
    answers = cpu_kernels.run([sanitized, instructions], [question for question, _ in asked])
    assert answers == b"".join(answer for _, answer in asked)


@pytest.mark.skipif("sha" not in _kernels.INSTRUCTIONS, reason="a CPU without SHA instructions has no code for them")
def test_hashing_and_counting_in_one_pass(sanitized):
    rng = np.random.default_rng(3)
    asked = []
    for number in range(300):
        before, after = (rng.integers(256, size=rng.integers(200), dtype=np.uint8) for _ in range(2))
        asked.append(
            cpu_kernels.ask_to_hash(before, strategies.make("gaussian", 2 + int(rng.integers(3000)), number), after)
        )
    assert cpu_kernels.run([sanitized], [question for question, _ in asked]) == b"".join(answer for _, answer in asked)


def test_the_questions_meet_every_status(asked):
    statuses = {int.from_bytes(answer[:8], "little") for question, answer in asked if question[:1] == b"D"}
    assert {_kernels.OK, _kernels.BAD_ALPHABET, _kernels.BAD_LENGTH, _kernels.INCOMPLETE_CODE} <= statuses
    decoded = [
        answer
        for question, answer in asked
        if question[:1] == b"D" and int.from_bytes(answer[:8], "little") == _kernels.OK
    ]
    statuses = {int.from_bytes(answer[8:16], "little") for answer in decoded}
    assert {_kernels.OK, _kernels.BAD_TILE, _kernels.BAD_LANE, _kernels.BAD_EXCEPTION} <= statuses
    # Compared with what was decoded, then with one weight changed.
    sound = [answer for answer in decoded if int.from_bytes(answer[8:16], "little") == _kernels.OK]
    assert {int.from_bytes(answer[-32:-24], "little") for answer in sound} == {_kernels.OK}
    assert _kernels.DIFFERENT in {int.from_bytes(answer[-16:-8], "little") for answer in sound}


def test_a_byte_too_far_is_noticed(tmp_path):
    """What these tests rest on: the same program, with one load out of bounds, ends."""
    folder = tmp_path / "formats"
    shutil.copytree(cpu_kernels.ROOT / "formats", folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "decode.c").read_text()
    broken = source.replace(
        "decode_chunks_portable(segment, tile, furthest <= segment->size ? 0 :",
        "decode_chunks_portable(segment, tile, 1 ? 0 :",
    )
    assert broken != source
    (folder / "decode.c").write_text(broken)
    sources = [folder / "decode.c" if path.name == "decode.c" else path for path in cpu_kernels.SOURCES]
    program = tmp_path / "broken"
    commands.run_process(*sources, "-std=c11", "-O1", "-o", program, command=compiler()).fine()
    damaged = [cpu_kernels.damaged_segment(10_000 + number) for number in range(HOSTILE)]
    asked = [cpu_kernels.ask_to_decode(segment)[0] for segment in damaged if segment is not None]
    with pytest.raises(AssertionError):
        cpu_kernels.run([program, "portable"], asked)


def test_the_portable_extension_says_so():
    code = "from df11 import _kernels; print(_kernels.INSTRUCTIONS)"
    done = commands.run_process("-c", code, command=[commands.COMMAND[0]], env=commands.environment(DF11_PORTABLE="1"))
    assert done.fine().out == "portable\n"


# Arguments.


def words(count: int, dtype: type = np.uint8) -> np.ndarray:
    """Zeros."""
    return np.zeros(count, dtype)


SEGMENT, OUT = words(4096), words(100, np.uint16)
TABLE = _kernels.build_decode_table(np.frombuffer(bytes([127, 1]), np.uint8), 1, 1)
SOUND = (SEGMENT, TABLE, 1, 0, 100, 1, 48, 64, 96, 208, 0, 1, OUT)
"""A segment of 100 weights whose sections fit, with damaged content."""


def test_a_damaged_segment_of_sound_sizes_is_taken():
    assert _kernels.decode_tiles(*SOUND) == (_kernels.BAD_TILE, 0)
    assert _kernels.compare_tiles(*SOUND) == (_kernels.BAD_TILE, 0)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (0, [SEGMENT[:200], words(4096, np.uint16), SEGMENT[::2]]),
        (1, [words(4096, np.uint32), None, _kernels.new_encoder()]),
        (2, [0, 3, 4, 5, 6]),
        (3, [1, 2]),
        (4, [0, 101, 4096, (1 << 24) + 1, 1 << 32, -1]),
        (5, [0, 3, 256]),
        (6, [4089, 1 << 32, 1 << 63, -1]),
        (7, [4065, 1 << 63]),
        (8, [3985, 1 << 63]),
        (9, [4081, 1 << 63]),
        (10, [2, 1 << 63]),
        (11, [2, 1 << 63]),
        (12, [OUT[:99], OUT[::-1], words(201)[1:].view(np.uint16), words(100, np.uint32)]),
    ],
)
def test_what_does_not_fit_is_refused(place, values):
    for function in (_kernels.decode_tiles, _kernels.compare_tiles):
        for value in values:
            with pytest.raises((ValueError, OverflowError, BufferError)):
                function(*SOUND[:place], value, *SOUND[place + 1 :])


def test_read_only_memory_is_read_and_not_written():
    fixed = OUT.copy()
    fixed.flags.writeable = False
    assert _kernels.compare_tiles(*SOUND[:-1], fixed)[0] == _kernels.BAD_TILE
    with pytest.raises((ValueError, BufferError)):
        _kernels.decode_tiles(*SOUND[:-1], fixed)


@pytest.mark.parametrize("size", [0, -1, 257, 1 << 32])
def test_an_alphabet_of_no_possible_size_is_refused(size):
    with pytest.raises((ValueError, OverflowError)):
        _kernels.build_decode_table(words(40_000), size, 1)


def test_a_section_must_be_whole():
    with pytest.raises(ValueError, match="section"):
        _kernels.build_decode_table(words(2), 2, 1)


def test_an_encoder_serves_one_thread_at_a_time():
    """Other threads get an error: the interpreter lock, which is released, does not keep them out."""
    encoder, failed = _kernels.new_encoder(), []
    weights = [strategies.make("gaussian", 1 << 21, seed) for seed in range(4)]
    expected = [_kernels.build_code(_kernels.new_encoder(), part, 1) for part in weights]

    def build(number: int) -> None:
        for _ in range(20):
            try:
                assert _kernels.build_code(encoder, weights[number], 1) == expected[number]
            except ValueError as error:
                failed.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build, range(4)))
    assert set(failed) == {"kernels: an encoder serves one thread at a time"}


def test_encoding_refuses_what_does_not_fit():
    encoder = _kernels.new_encoder()
    weights = np.full(100, 0x3F80, np.uint16)
    size, section, _, filler = _kernels.build_code(encoder, weights, 1)
    assert (size, filler, len(section)) == (1, 0x7F7F, 2)
    sound = (encoder, weights, 1, 0, filler, 1, 48, 64, 96, 208, 232, words(232 + 8192))
    assert _kernels.encode_tiles(*sound) == (_kernels.NOT_SMALLER, 0)
    wrong = {1: weights[:0], 2: 3, 3: 1, 4: 1 << 16, 5: 0, 6: 232, 7: 233, 8: 200, 9: 217, 10: 220}
    wrong[11] = words(232 + 8191)
    for place, value in wrong.items():
        with pytest.raises((ValueError, OverflowError)):
            _kernels.encode_tiles(*sound[:place], value, *sound[place + 1 :])
    with pytest.raises(ValueError, match="weights"):
        _kernels.build_code(encoder, weights[:1], 1)
    with pytest.raises(ValueError, match="too many"):
        _kernels.build_code(encoder, words((1 << 24) + 2, np.uint16), 1)
    with pytest.raises(ValueError, match="PyCapsule"):
        _kernels.build_code(object(), weights, 1)
    with pytest.raises(ValueError, match="out"):
        _kernels.cast_f32(words(3, np.uint32), words(2, np.uint16), True)
    with pytest.raises(ValueError, match="counts"):
        _kernels.count_exponents(weights, words(255, np.int64), 1)


def test_a_container_is_the_same_with_portable_code(tmp_path):
    """A whole conversion, hashing included, on a CPU without any of the instructions."""
    rng = np.random.default_rng(5)
    tensors = [
        sources.Tensor(flavour, "BF16", (70_001,), strategies.make(flavour, 70_001, 7).tobytes())
        for flavour in strategies.FLAVOURS
    ]
    tensors.append(sources.Tensor("wide", "F32", (5000,), rng.integers(1 << 32, size=5000, dtype=np.uint32).tobytes()))
    source = sources.write(tmp_path / "x.safetensors", tensors)
    for name, portable in (("own", {}), ("portable", {"DF11_PORTABLE": "1"})):
        target = tmp_path / f"{name}.df11"
        commands.run_process("convert", source, target, "--cast", "bf16", env=commands.environment(**portable)).fine()
    assert (tmp_path / "own.df11").read_bytes() == (tmp_path / "portable.df11").read_bytes()
