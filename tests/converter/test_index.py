"""Index files: which shards they name, and that rewriting changes nothing but these names."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.converter.files import container_name, original_name
from df11.converter.index import read_shards, rewrite_index, split_index_name
from df11.formats import errors

TEXT = st.text(st.sampled_from('ab.{}[]:,"\\/ é🤗\n\t') | st.characters(exclude_categories=["Cs"]), max_size=8)
SHARD = st.builds("{}{}".format, TEXT, st.sampled_from([".safetensors", ".bin", "", ".safetensors "]))
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT | st.sampled_from(["weight_map", "a.safetensors"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.just("weight_map"), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def indexes(draw) -> str:
    """The text of an index, in any style that Python can write."""
    document = draw(st.dictionaries(TEXT, NESTED, max_size=3))
    document["weight_map"] = draw(st.dictionaries(TEXT | SHARD, SHARD, max_size=5))
    document = {key: document[key] for key in draw(st.permutations(list(document)))}
    return json.dumps(
        document,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 2, "\t"])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : ")])),
    )


def to_container(name: str) -> str:
    return container_name(name)


def to_shard(name: str) -> str:
    return original_name(name, {})


@given(text=indexes())
@example(text='{"weight_map": {"a.safetensors": "./a.safetensors", "weight_map": "weight_map"}}')
@example(text='{"weight_map":{"a":"\\u0061.safetensors"}}\r\n')
@example(text='{"a": {"weight_map": {"a": "a.safetensors"}}, "weight_map": {"b": "b.safetensors"}}')
@example(text='{"a": ["weight_map", {"x": "a.safetensors"}], "weight_map": {}}')
def test_only_names_change_and_come_back(text):
    data = text.encode()
    there = rewrite_index(data, to_container, "x")
    before, after = json.loads(text), json.loads(there)
    assert list(after) == list(before)
    assert after == {
        **before,
        "weight_map": {tensor: to_container(shard) for tensor, shard in before["weight_map"].items()},
    }
    assert read_shards(there, "x") == after["weight_map"]
    if not any(shard.endswith(".df11") for shard in before["weight_map"].values()):
        assert rewrite_index(there, to_shard, "x") == data


def test_a_name_stays_as_it_is_spelt():
    data = b'{"weight_map": {"a": "sub\\/\\u0061\\u002esafetensors"}}'
    there = rewrite_index(data, to_container, "x")
    assert there == b'{"weight_map": {"a": "sub\\/\\u0061\\u002edf11"}}'
    assert rewrite_index(there, to_shard, "x") == data


@pytest.mark.parametrize("suffix", ["s\\u0061fetensors", "safetensor\\u0073", "\\u0073afetensors"])
def test_a_suffix_that_is_spelt_otherwise_is_refused(suffix):
    data = f'{{"weight_map": {{"a": "a.{suffix}"}}}}'.encode()
    assert read_shards(data, "x") == {"a": "a.safetensors"}
    with pytest.raises(errors.SafetensorsError, match="spells") as caught:
        rewrite_index(data, to_container, "where/x")
    assert caught.value.file == "where/x"


@pytest.mark.parametrize("text", ['{"weight_map":{},"weight_map":{}}', '{"weight_map":{"a":"x","a":"y"}}'])
def test_an_index_that_names_something_twice_is_refused(text):  # Readers would take it in different ways.
    for action in (read_shards, lambda data, where: rewrite_index(data, to_container, where)):
        with pytest.raises(errors.SafetensorsError, match="twice"):
            action(text.encode(), "where/x")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_an_index_that_is_not_utf8_is_refused(encoding):
    data = '{"weight_map": {"a": "a.safetensors"}}'.encode(encoding)
    for action in (read_shards, lambda data, where: rewrite_index(data, to_container, where)):
        with pytest.raises(errors.SafetensorsError, match="not JSON") as caught:
            action(data, "where/x")
        assert caught.value.file == "where/x"


@given(data=st.binary(max_size=60) | NESTED.map(lambda value: json.dumps(value).encode()))
def test_anything_is_an_index_or_an_error(data):
    try:
        shards = read_shards(data, "x")
    except errors.SafetensorsError as error:
        assert len(str(error).splitlines()) == 1
        with pytest.raises(errors.SafetensorsError):
            rewrite_index(data, to_container, "x")
    else:
        assert all(isinstance(shard, str) for shard in shards.values())
        rewrite_index(data, to_container, "x")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.safetensors.index.json", ("model.safetensors", ".index.json")),
        ("a/b/model.safetensors.index.fp16.json", ("a/b/model.safetensors", ".index.fp16.json")),
        ("model.df11.index.json", ("model.df11", ".index.json")),
        ("model.sft.index.json", ("model.sft", ".index.json")),
        ("pytorch_model.bin.index.json", ("pytorch_model.bin", ".index.json")),
        ("model.safetensors", None),
        ("index.json", None),
        ("model.index.json.txt", None),
        ("model.safetensors.index.a.b.json", None),
        ("model.index/x.json", None),
    ],
)
def test_what_is_an_index_by_its_name(name, parts):
    assert split_index_name(name) == parts
