"""Entries: hashes as others compute them, and what two entries say about each other's content."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.formats import errors
from df11.storage import entry as entry_module
from df11.storage.entry import GIT_BYTES, Entry

CONTENT = st.binary(max_size=30)
KNOWN = st.sampled_from([(True, True), (True, False), (False, True), (False, False)])
"""Whether the SHA-256 and git's hash are known."""


def known(name: str, data: bytes, hashes: tuple[bool, bool]) -> Entry:
    """The entry of some bytes, with the hashes that are known."""
    entry = Entry.of(name, data)
    return Entry(name, entry.size, entry.sha256 if hashes[0] else None, entry.blob_id if hashes[1] else None)


@pytest.mark.parametrize(
    ("data", "blob_id"),  # As `git hash-object` gives them.
    [
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"x", "c1b0730e0133447badcfd47fd144e254807b06e1"),
        (b"version\n" * 1000, "ffb9677d7444a7d12f79a4427c4e223fa1b4c94b"),
        (bytes(range(256)), "c86626638e0bc8cf47ca49bb1525b40e9737ee64"),
    ],
)
def test_the_hashes_are_those_of_others(data, blob_id):
    assert Entry.of("a/b", data) == Entry("a/b", len(data), hashlib.sha256(data).hexdigest(), blob_id)


@given(chunks=st.lists(CONTENT, max_size=6))
def test_chunks_make_no_difference(chunks):
    data = b"".join(chunks)
    assert Entry.of_chunks("x", len(data), iter(chunks)) == Entry.of("x", data)
    assert Entry.of_chunks("x", len(data), map(memoryview, chunks)) == Entry.of("x", data)


@pytest.mark.parametrize("size", [GIT_BYTES, GIT_BYTES + 1])
def test_what_is_too_large_for_git_has_no_hash_of_git(size):
    entry = Entry.of("x", bytes(size))
    assert entry.sha256 == hashlib.sha256(bytes(size)).hexdigest()
    assert (entry.blob_id is None) == (size > GIT_BYTES)


@given(one=CONTENT, other=CONTENT, same=st.booleans(), of_one=KNOWN, of_other=KNOWN)
def test_what_is_known_decides(one, other, same, of_one, of_other):
    other = one if same else other
    here, there = known("here", one, of_one), known("there", other, of_other)
    found = here.same_content(there)
    assert there.same_content(here) is found
    if len(one) != len(other):
        assert found is False  # With or without hashes.
    elif (of_one[0] and of_other[0]) or (of_one[1] and of_other[1]):
        assert found is (one == other)
    else:
        assert found is None


@given(data=CONTENT, of_one=KNOWN, of_other=KNOWN)
def test_the_sha256_is_believed_before_gits_hash(data, of_one, of_other):
    here, there = known("x", data, of_one), known("x", data, of_other)
    if here.sha256 and there.sha256:
        assert here.same_content(dataclasses.replace(there, blob_id="0" * 40)) is True
        assert here.same_content(dataclasses.replace(there, sha256="0" * 64)) is False
    elif here.blob_id and there.blob_id:
        assert here.same_content(dataclasses.replace(there, blob_id="0" * 40)) is False


@given(one=CONTENT, other=CONTENT, same=st.booleans(), of_one=KNOWN, of_other=KNOWN)
def test_a_check_passes_only_what_is_proved_to_be_the_same(one, other, same, of_one, of_other):
    listed, found = known("x", one, of_one), known("x", one if same else other, of_other)
    assert listed.is_hashed == any(of_one)
    if listed.same_content(found):
        listed.check(found, "where/x")
        return
    with pytest.raises(errors.DifferenceError) as caught:
        listed.check(found, "where/x")
    assert caught.value.file == "where/x"
    assert caught.value.expected == (listed.sha256 or listed.blob_id)


@pytest.mark.parametrize(
    ("hashes", "kind"), [((True, True), "SHA-256"), ((True, False), "SHA-256"), ((False, True), "git blob")]
)
def test_what_is_said_of_a_difference(hashes, kind):
    listed, found = known("x", b"one", hashes), Entry.of("x", b"two")
    with pytest.raises(errors.DifferenceError) as caught:
        listed.check(found, "hf://me/m/x")
    line = str(caught.value)
    wanted, came = (listed.sha256, found.sha256) if hashes[0] else (listed.blob_id, found.blob_id)
    for word in ("hf://me/m/x", kind, wanted, came):
        assert word in line
    assert str(listed.differs(came, "hf://me/m/x")) == line


@given(data=CONTENT, hashes=KNOWN)
def test_entries_can_be_pickled(data, hashes):
    entry = known("a/b", data, hashes)
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_large_and_small_is_by_size_not_by_content(monkeypatch):
    monkeypatch.setattr(entry_module, "GIT_BYTES", 3)
    assert Entry.of("x", b"abc").blob_id is not None
    assert Entry.of("x", b"abcd").blob_id is None
