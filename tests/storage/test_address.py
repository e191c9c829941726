"""Addresses on the Hub: what is one, what it means, and that it is written as it was read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.formats import errors
from df11.storage.address import Address, is_address, is_safe_path

NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
OWNER = NAME.filter(lambda name: name not in ("datasets", "spaces", "buckets", "kernels", "models"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
REVISION = st.one_of(
    st.sampled_from(
        [
            "main",
            "refs",
            "refs/pr/1",
            "refs/convert/parquet",
            "refs/heads/main",
            "pr",
            "feature/x",
            "v1.0",
            "50%",
            "a@b",
            "%72efs",
        ]
    ),
    TEXT.filter(
        lambda text: ".." not in text and not any(character <= " " or character == "\x7f" for character in text)
    ),
)
PART = st.one_of(TEXT, st.sampled_from(["pr", "1", "convert", "refs", "a@b", "100%", "%2F", " "]))
PATH = st.lists(PART, max_size=4).map("/".join).filter(lambda path: not path or is_safe_path(path))


@given(OWNER, NAME, st.none() | REVISION, PATH)
def test_what_is_written_is_read_again(owner, name, revision, path):
    address = Address(f"{owner}/{name}", revision, path)
    assert is_address(str(address))
    assert Address.parse(str(address)) == address


@given(st.text(max_size=60).map("hf://{}".format) | st.text(max_size=60))
def test_any_text_is_an_address_or_an_error(text):
    try:
        address = Address.parse(text)
    except errors.UsageError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()  # It can be printed.
    else:
        assert not address.path or is_safe_path(address.path)
        assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "repository", "revision", "path"),
    [
        ("hf://o/n", "o/n", None, ""),
        ("hf://o/n/", "o/n", None, ""),
        ("hf://o/n@main", "o/n", "main", ""),
        ("hf://o/n@main/", "o/n", "main", ""),
        ("hf://o/n/a/b.safetensors", "o/n", None, "a/b.safetensors"),
        ("hf://o/n@v1/a/", "o/n", "v1", "a"),
        ("hf://o/n@refs/pr/12", "o/n", "refs/pr/12", ""),
        ("hf://o/n@refs/pr/12/a", "o/n", "refs/pr/12", "a"),
        ("hf://o/n@refs%2Fpr%2F12/a", "o/n", "refs/pr/12", "a"),
        ("hf://o/n@feature%2Fx/a", "o/n", "feature/x", "a"),
        ("hf://o/n@feature/x/a", "o/n", "feature", "x/a"),
        ("hf://o/n/a@b/c", "o/n", None, "a@b/c"),
        ("hf://Qwen/Qwen2.5-VL-3B_x", "Qwen/Qwen2.5-VL-3B_x", None, ""),
    ],
)
def test_what_an_address_means(text, repository, revision, path):
    assert Address.parse(text) == Address(repository, revision, path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "o/n",
        "hf:/o/n",
        "HF://o/n",
        "hf://",
        "hf://o",
        "hf://o/",
        "hf:///n",
        "hf://o//n",
        "hf://o/n@",
        "hf://o/n@/x",
        "hf://o/n@a..b",
        "hf://o/n@a%20b",
        "hf://o/n@%ff%00",
        "hf://o/n//x",
        "hf://o/n/x//y",
        "hf://o/n/../x",
        "hf://o/n/x/..",
        "hf://o/n/./x",
        "hf://o/n/a\\b",
        "hf://o/n/a\nb",
        "hf://o/n/\udcff",
        "hf://../n",
        "hf://o/..",
        "hf://o p/n",
        "hf://datasets/o/n",
        "hf://spaces/o/n",
        "hf://models/o/n",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(errors.UsageError) as caught:
        Address.parse(text)
    str(caught.value).encode()


def test_datasets_and_spaces_are_refused_by_name():
    with pytest.raises(errors.UsageError, match=r"datasets/ .* hf://owner/name"):
        Address.parse("hf://datasets/owner/name")


@pytest.mark.parametrize("path", ["", "/", "/a", "a/", "..", "a/../b", "a//b", ".", "a\\b", "a\0b", "\ud800"])
def test_paths_that_could_lead_elsewhere(path):
    assert not is_safe_path(path)


def test_only_text_can_be_an_address(tmp_path):
    assert is_address("hf://o/n")
    assert not is_address("hf:/o/n")
    assert not is_address(tmp_path)
    assert not is_address(None)
