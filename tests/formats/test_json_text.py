"""JSON of strangers: limits hold before memory is taken, and what readers would take in different ways is refused."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from df11.formats import errors, json_text, layout


def parse(data: bytes | str, **limits: Any) -> Any:
    return json_text.parse(data, what="the text", where={"file": "f", "tensor": "t"}, **limits)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_comes_back(value: object) -> None:
    text = json.dumps(value)
    assert parse(text) == parse(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":1,"a":1}', "names a member of an object twice"),
        ('[{"x":{"b":[{"a":1,"a":1}]}}]', "names a member of an object twice"),
        ("[NaN]", "is not JSON"),
        ("[-Infinity]", "is not JSON"),
        ('["\\ud800"]', "not valid Unicode"),
        ('{"\\uDC00":1}', "not valid Unicode"),
        ('{"x":{"\\ud800\\ud800":1}}', "not valid Unicode"),
        ("[1] 2", "is not JSON"),
        ("[01]", "is not JSON"),
        ('["\t"]', "is not JSON"),
        ("", "is not JSON"),
        (b'"\xff"', "is not JSON"),
        (b"\xef\xbb\xbf[]", "is not JSON"),
        ("9" * 10_000, "is not JSON"),
    ],
)
@pytest.mark.parametrize("error", [errors.MetadataError, errors.ManifestError])
def test_refused(text: str | bytes, words: str, error: type[errors.Df11Error]) -> None:
    with pytest.raises(error, match=words) as caught:
        parse(text, error=error)
    assert type(caught.value) is error
    assert (caught.value.file, caught.value.tensor) == ("f", "t")


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parse('["\\ud83d\\ude00"]') == ["\N{GRINNING FACE}"]
    assert parse('["\\\\ud800"]') == ["\\ud800"]


def test_minus_zero_is_no_integer() -> None:
    for text in ("[-0]", "[1,-0]", '{"a":-0}', "[ -0]"):
        (value,) = [v for v in (parse(text).values() if text[0] == "{" else parse(text)) if v == 0]
        assert type(value) is float
    assert [type(v) for v in parse('["-0", -0.5, 7, -1]')] == [str, float, int, int]


@pytest.mark.parametrize("text", ["[" * 127 + "]" * 127, '{"a":' * 127 + "1" + "}" * 127, '[{"a":[[]]},[],1]'])
def test_depth(text: str) -> None:
    deepest = 127 if len(text) > 100 else 4
    assert parse(text, depth=deepest) == json.loads(text)
    with pytest.raises(errors.LimitError, match="nested too deeply"):
        parse(text, depth=deepest - 1)


def test_depth_beyond_any_stack() -> None:
    text = "[" * 200_000 + "]" * 200_000
    for depth in (127, None):
        with pytest.raises(errors.LimitError, match="nested too deeply"):
            parse(text, values=10**6, depth=depth)


def test_the_number_of_values() -> None:
    assert parse('[1,2,{"a":3}]', values=1 + 3 + 4 * 2) == [1, 2, {"a": 3}]
    with pytest.raises(errors.LimitError, match="too many values"):
        parse('[1,2,{"a":3}]', values=9)
    assert parse(json.dumps("[,]" * 1000 + '"\\'), values=1)  # What is in strings are no values.
    assert parse(json.dumps("[,]" * 1000 + '"\\').encode(), values=1)
    with pytest.raises(errors.LimitError, match="too many values"):
        parse(json.dumps(["[,]\\" * 50_000, *[0] * 30_000]), values=30_004)
    assert parse(json.dumps(["[,]\\" * 50_000, *[0] * 30_000]), values=30_005)
    with pytest.raises(errors.LimitError, match="too large"):
        parse("[]" + " " * layout.MAX_JSON_HEADER)


@pytest.mark.parametrize("unit", [b"[],", b'{"":0},', b"[[[[[[[[]]]]]]]],", b"7,"])
def test_values_are_counted_before_they_are_made(unit: bytes) -> None:
    text = b'{"x":"' + b"a" * 100 + b'","y":[' + unit * (3_000_000 // len(unit)) + b"0]}"
    tracemalloc.start()
    try:
        with pytest.raises(errors.LimitError, match="too many values"):
            parse(text, values=100_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # The text, and that as a str.
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", ['"' + '[\\"' * 300_000, '["' + '[\\"' * 300_000 + "\\", "[" + '"[",' * 200_000 + '"', '"[' * 300_000]
)
def test_strings_that_do_not_end_take_no_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises((errors.MetadataError, errors.LimitError)):
        parse(text, error=errors.MetadataError, values=len(text) // 3)
    assert time.process_time() - started < 5
