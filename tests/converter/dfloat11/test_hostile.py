"""Checkpoints that lie: each lie is found before it does harm, and named in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import df11
from df11.converter.dfloat11.patterns import Budget, Pattern
from df11.formats import errors
from tests.support import dfloat11, sources
from tests.support.sources import Tensor, gaussian

THREADS = 32
WEIGHTS = gaussian(4087, 3)


def good() -> dict[str, Any]:
    return dict(dfloat11.encode([WEIGHTS], THREADS))


def changed(part: str, change: Any) -> dict[str, Any]:
    parts = good()
    value = parts[part].copy()
    result = change(value)
    parts[part] = value if result is None else result
    return parts


def written(folder: Path, parts: dict[str, Any], **config: Any) -> Path:
    document = dfloat11.config({"a": []}, THREADS)
    document["dfloat11_config"] |= config
    sources.write(folder / "original.safetensors", [Tensor("a.weight", "BF16", (61, 67), WEIGHTS.tobytes())])
    return dfloat11.write(folder / "in", {"a.safetensors": dfloat11.tensors("a", parts)}, document)


def convert(path: Path, folder: Path) -> None:
    df11.convert(path, folder / "out", shapes=folder / "original.safetensors")


def numbers(change: Any) -> Any:
    return lambda value: change(value.view(np.uint32))


def put(place: Any, value: int) -> Any:
    return lambda array: array.__setitem__(place, value)


def first_symbol(luts: np.ndarray) -> int:
    return int(luts[0, 0])


LIES = {
    "no_length": (changed("luts", lambda luts: put((-1, first_symbol(luts)), 0)(luts)), "luts gives no code for"),
    "length_33": (changed("luts", lambda luts: put((-1, first_symbol(luts)), 33)(luts)), "more than 32 bits"),
    "length_of_a_pointer": (changed("luts", put((-1, 240), 3)), "from 240 on"),
    "another_length": (
        changed("luts", lambda luts: put((-1, first_symbol(luts)), luts[-1, luts[0, 0]] + 1)(luts)),
        "gaps: a thread",
    ),
    "pointer_outside": (changed("luts", put((0, 255), 240)), "a table that does not exist"),
    "pointer_to_itself": (changed("luts", lambda luts: (put((0, 0), 255)(luts), put(1, 255)(luts))[0]), "no code for"),
    "one_row": (changed("luts", lambda luts: luts[:1]), "2 to 18 rows"),
    "narrow": (changed("luts", lambda luts: luts.reshape(-1, 128)), "256 columns"),
    "many_rows": (changed("luts", lambda luts: np.tile(luts[:1], (19, 1))), "2 to 18 rows"),
    "position_too_large": (changed("output_positions", numbers(put(1, 1 << 30))), "must rise from 0 to 4087"),
    "position_not_from_0": (changed("output_positions", numbers(put(0, 5))), "must rise from 0"),
    "position_ends_early": (changed("output_positions", numbers(put(-1, 4078))), "must rise from 0"),
    "positions_fall": (changed("output_positions", numbers(put(2, 1))), "must rise"),
    "positions_wrong": (
        changed("output_positions", numbers(lambda value: put(1, value[1] + 1)(value))),
        "another number of weights",
    ),
    "block_too_full": (changed("output_positions", numbers(put(slice(1, -1), 3900))), "than its bits can hold"),
    "positions_of_five_bytes": (changed("output_positions", lambda value: value[:5]), "bytes of output_positions"),
    "positions_missing": (changed("output_positions", lambda value: value[:-8]), "bytes of output_positions"),
    "gap_wrong": (changed("gaps", lambda gaps: put(3, gaps[3] ^ 0x55)(gaps)), "gaps: a thread"),
    "first_gap_wrong": (changed("gaps", lambda gaps: put(0, gaps[0] ^ 0x80)(gaps)), "gaps: the first code"),
    "gaps_short": (changed("gaps", lambda gaps: gaps[:-8]), "bytes of gaps"),
    "codes_short": (changed("encoded_exponent", lambda codes: codes[:-3]), "end before or behind|gaps|luts gives"),
    "codes_long": (
        changed("encoded_exponent", lambda codes: np.append(codes, np.zeros(2, np.uint8))),
        "end before or behind",
    ),
    "code_changed": (
        changed("encoded_exponent", lambda codes: put(slice(96, 112), ~codes[96:112])(codes)),
        "another number|gaps: a",
    ),
    "signs_short": (changed("sign_mantissa", lambda signs: signs[:-3]), "does not fit"),
    "signs_long": (changed("sign_mantissa", lambda signs: np.append(signs, signs)), "does not fit"),
    "no_weights": (changed("sign_mantissa", lambda signs: signs[:0]), "must be from 1 to"),
    "no_codes": (changed("encoded_exponent", lambda codes: codes[:0]), "must be from 1 to"),
    "few_codes": (changed("encoded_exponent", lambda codes: codes[:300]), "another number of bytes"),
    "splits": (changed("split_positions", lambda _: np.array([50, 10])), "does not fit pattern_dict"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_in_a_unit(name, tmp_path):
    parts, message = LIES[name]
    with pytest.raises(errors.CheckpointError, match=message) as caught:
        convert(written(tmp_path, parts), tmp_path)
    assert "tensor 'a'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.df11"))


def test_the_unit_is_good_otherwise(tmp_path):
    convert(written(tmp_path, good()), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads_per_block": [0]}, "threads_per_block"),
        ({"threads_per_block": [96]}, "threads_per_block"),
        ({"threads_per_block": [1 << 40]}, "threads_per_block"),
        ({"threads_per_block": [32, 32]}, "threads_per_block"),
        ({"threads_per_block": [True]}, "threads_per_block"),
        ({"threads_per_block": 32}, "threads_per_block"),
        ({"bytes_per_thread": 4}, "bytes_per_thread"),
        ({"bytes_per_thread": 8.0}, "bytes_per_thread"),
        ({"pattern_dict": []}, "pattern_dict"),
        ({"pattern_dict": {"a": "x"}}, "list of names"),
        ({"pattern_dict": {"a": [1]}}, "list of names"),
        ({"pattern_dict": {"a": ["x", "x"]}}, "twice"),
        ({"pattern_dict": {"a(": []}}, "a group does not end"),
        ({"pattern_dict": {"(?=a)a": []}}, "not supported"),
        ({"pattern_dict": {"a": ["__class__.__init__"]}}, "not the name of a layer"),
        ({"pattern_dict": {"a": ["x..y"]}}, "not the name of a layer"),
        ({"pattern_dict": {"a": ["x/y"]}}, "not the name of a layer"),
        ({"pattern_dict": {"b": []}}, "no pattern of pattern_dict matches"),
        ({"pattern_dict": {"a": [], "a+": ["x"]}}, "several patterns"),
        ({"pattern_dict": {"a": ["x", "y"]}}, "does not fit pattern_dict"),
    ],
    ids=str,
)
def test_a_lie_in_the_config(change, message, tmp_path):
    with pytest.raises(errors.CheckpointError, match=message) as caught:
        convert(written(tmp_path, good(), **change), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_slow_pattern_is_matched_at_once(tmp_path):
    convert(written(tmp_path, good(), pattern_dict={"(a+)+b": [], "(a|a)*c": [], "a": []}), tmp_path)


def test_a_config_that_is_none(tmp_path):
    path = written(tmp_path, good())
    (path / "config.json").write_text('{"dfloat11_config": {"x": 1, "x": 2}}')
    with pytest.raises(errors.CheckpointError, match="twice"):
        convert(path, tmp_path)
    (path / "config.json").write_text('{"dfloat11_config": 1}')
    with pytest.raises(errors.CheckpointError, match="not an object"):
        convert(path, tmp_path)
    (path / "config.json").write_text("no JSON at all")  # Then these are tensors like any others.
    df11.convert(path, tmp_path / "out")


def tensors_with(**changes: Any) -> list[Tensor]:
    found = {one.name: one for one in dfloat11.tensors("a", good())}
    return [one for one in {**found, **changes}.values() if one is not None]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": tensors_with(), "b": [dfloat11.tensors("a", good())[0]]}, "is in .*, too"),
        ({"a": tensors_with(**{"a.gaps": None})}, "has no gaps"),
        ({"a": tensors_with(**{"a.encoded_exponent": None})}, "has no encoded_exponent"),
        ({"a": tensors_with(**{"a.weight": sources.bf16("a.weight", (61, 67))})}, "in the checkpoint twice"),
        ({"a": tensors_with(**{"a.gaps": sources.random_tensor("a.gaps", "I8", (120,))})}, "dtype or shape of gaps"),
        (
            {"a": tensors_with(**{"a.split_positions": sources.random_tensor("a.split_positions", "I32", (0,))})},
            "must be I64",
        ),
        (
            {"a": tensors_with(**{"a.split_positions": sources.random_tensor("a.split_positions", "I64", (5000,))})},
            "fewer than",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lie_in_the_files(files, message, tmp_path):
    path = written(tmp_path, good())
    for name, tensors in files.items():
        sources.write(path / f"{name}.safetensors", tensors)
    with pytest.raises(errors.CheckpointError, match=message):
        convert(path, tmp_path)


@pytest.mark.parametrize("cuts", [[-1], [0], [10, 10], [50, 10], [4087], [1 << 62], [-(1 << 63)]], ids=str)
def test_a_lie_about_parts(cuts, tmp_path):
    parts = good() | {"split_positions": np.array(cuts, np.int64)}
    names = [f"x{number}" for number in range(len(cuts) + 1)]
    with pytest.raises(errors.CheckpointError, match="split_positions must rise"):
        convert(written(tmp_path, parts, pattern_dict={"a": names}), tmp_path)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_other_bytes_are_refused_or_decode(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    parts = good()
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(sorted(parts)))
        raw = bytearray(parts[part].tobytes())
        for _ in range(data.draw(st.integers(1, 4))):
            if raw:
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        parts[part] = np.frombuffer(bytes(raw), parts[part].dtype).reshape(parts[part].shape)
    path = written(folder, parts)
    try:
        convert(path, folder)
    except errors.CheckpointError as error:
        assert len(str(error).splitlines()) == 1
    else:
        with df11.open(folder / "out" / "model.df11") as container:
            (weights,) = dfloat11.decode(parts, THREADS)  # The kernel, too, finds what was imported.
            assert np.array_equal(container.tensor("a.weight").reshape(-1), weights)


# Patterns.

ATOMS = st.sampled_from(["a", "b", ".", r"\d", r"\.", r"\w", "[ab]", "[^a]", "[a-c1]", r"[\d.]", "x", r"\S"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, min_size=1, max_size=4)),
        st.builds("({}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(EXPRESSIONS, st.lists(st.text("ab1.x", max_size=7), min_size=3, max_size=8))
@example(r"model\.layers\.\d+", ["model.layers.12", "model.layers.", "model_layers.1"])
@example("a|", ["a", "", "b"])
@example("", ["", "a"])
@example("^a$", ["a", "^a$"])
def test_patterns_match_as_python_matches_them(text, names):
    pattern = Pattern(text, file="x")
    for name in names:
        assert pattern.matches(name) == (re.fullmatch(text, name) is not None), name


@pytest.mark.parametrize(
    "text",
    [
        *(
            "(",
            ")",
            "a)",
            "*",
            "a**",
            "[a",
            "a\\",
            "\\1",
            "\\b",
            "(?P<x>a)",
            "(?i)a",
            "a^b",
            "a{x}",
            "a{3,1}",
            "a{100}",
        ),
        *("(" * 30 + "a" + ")" * 30, "((a{99}){99}){99}", "a" * 1001),
    ],
    ids=lambda text: text[:10],
)
def test_other_patterns_are_refused(text):
    with pytest.raises(errors.CheckpointError, match="pattern_dict: a pattern cannot be read"):
        Pattern(text, file="x")


def test_a_pattern_never_goes_back():
    assert not Pattern("(a+)+(a|a)*(a*)*b", file="x").matches("a" * 20_000)


def test_patterns_that_are_large_together_are_refused(tmp_path):
    patterns = {f"{number}(a{{99}}){{39}}": [] for number in range(1000)}
    with pytest.raises(errors.CheckpointError, match="too large"):
        convert(written(tmp_path, good(), pattern_dict=patterns), tmp_path)


def test_a_pattern_that_visits_many_states_is_refused():
    pattern = Pattern("(.?){99}" * 3, file="x", budget=Budget())
    with pytest.raises(errors.CheckpointError, match="take too long to match"):
        for number in range(1000):
            pattern.matches("".join(chr(500 + number + place) for place in range(100)))


def test_headers_of_many_files_count_together(tmp_path):
    path = written(tmp_path, good())
    names = [f"{'x' * 5000}{number}" for number in range(500)]
    for file in range(3):
        sources.write(path / f"{file}.safetensors", [sources.bf16(f"{name}.{file}", (1,)) for name in names])
    with pytest.raises(errors.BudgetError, match="--max-memory is too small"):
        df11.convert(path, tmp_path / "out", max_memory="150MiB")


def test_a_config_with_many_values_is_refused(tmp_path):
    path = written(tmp_path, good())
    document = json.loads((path / "config.json").read_text()) | {"x": [0] * 200_000}
    (path / "config.json").write_text(json.dumps(document))
    with pytest.raises(errors.LimitError, match="too many values"):
        convert(path, tmp_path)


def test_there_may_be_only_so_many_patterns(tmp_path):
    with pytest.raises(errors.CheckpointError, match="too large"):
        convert(written(tmp_path, good(), pattern_dict={f"a{number}": [] for number in range(2000)}), tmp_path)
