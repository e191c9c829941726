"""Forged Parquet files: what a few bytes claim is refused before Arrow sees it, and what is allowed takes little."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest

from df11.converter import parquet, parquet_bounds
from df11.formats import errors
from tests.fuzz import manifests, oracle
from tests.fuzz.manifests import Page, chunks, footer_of, pages_of, rebuilt, run_of, with_footer
from tests.fuzz.thrift import BINARY, LIST, STRUCT, Field, List, get, put

NAMES = [field.name for field in parquet.COLUMNS]
SMALL = manifests.seeds()[0]
DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY, BYTE_STREAM_SPLIT = 5, 6, 7, 9


def forged(
    column: str, edit: Callable[[list[Field], list[Page]], None], data: bytes = SMALL, padding: int = 0
) -> bytes:
    """A manifest with changed pages of a column; ``edit`` gets what the footer says of it, and its pages."""
    footer = footer_of(data)
    pages = [pages_of(data, chunk) for chunk in chunks(footer)]
    which = NAMES.index(column)
    edit(chunks(footer)[which], pages[which])
    file = rebuilt(footer, pages)
    if not padding:
        return file
    footer = footer_of(file)
    body = file[: len(file) - 8 - int.from_bytes(file[-8:-4], "little")]
    return with_footer(body + bytes(padding), footer)


def unfolding(column: str, count: int, values: bytes) -> Callable[[list[Field], list[Page]], None]:
    """One list of so many items: both kinds of levels in a few bytes, and these values."""

    def edit(chunk: list[Field], pages: list[Page]) -> None:
        page = pages[-1]
        starts = b"\2\0" + run_of(count - 4, 1, 1)[4:] + b"\6\0"  # Of four lists, the first has nearly all.
        page.set_values(
            len(starts).to_bytes(4, "little")
            + starts
            + run_of(count, 2 if column == "exponent_counts" else 1, 1)
            + values
        )
        put(get(page.header, 5), 1, count)
        put(chunk, 5, count)

    return edit


def refused(data: bytes, what: str) -> None:
    with pytest.raises(errors.ManifestError, match=what) as caught:
        oracle.judge(lambda _: parquet.from_bytes(data, "a"), data)
        parquet.from_bytes(data, "a")
    assert str(caught.value).isprintable()


def test_what_is_not_forged_is_read() -> None:
    assert parquet.from_bytes(forged("shape", lambda _chunk, _pages: None), "a") == parquet.from_bytes(SMALL, "a")
    assert parquet.from_bytes(forged("shape", lambda _chunk, _pages: None, padding=100), "a").tensors


@pytest.mark.parametrize("column", ["shape", "exponent_counts", "stored_xxh3"])
@pytest.mark.parametrize("count", [1 << 23, 1 << 27, (1 << 31) - 1])
def test_lists_that_unfold(column: str, count: int) -> None:
    data = forged(column, unfolding(column, count, b""))
    assert len(data) < 5000
    refused(data, "its columns are too large")


@pytest.mark.slow
@pytest.mark.parametrize("column", ["shape", "exponent_counts", "stored_xxh3"])
def test_what_is_allowed_takes_little_memory(column: str) -> None:
    padding = 990_000
    count = parquet_bounds.FEW_VALUES + parquet_bounds.VALUES_PER_BYTE * padding - 1000
    data = forged(column, unfolding(column, count, bytes(8 * count)), padding=padding)
    assert len(data) < oracle.SMALL
    assert parquet_bounds.check(data, 10).rows == 4
    verdict = oracle.judge(lambda _: parquet.from_bytes(data, "a") and None, data)
    assert not verdict.accepted
    assert verdict.memory > 8 * count  # Arrow has unfolded it.


def dictionary_of(count: int) -> Callable[[list[Field], list[Page]], None]:
    def edit(_: list[Field], pages: list[Page]) -> None:
        assert get(pages[0].header, 1) == 2
        put(get(pages[0].header, 7), 1, count)

    return edit


@pytest.mark.parametrize("count", [1 << 24, (1 << 31) - 1])
def test_a_dictionary_that_claims_much(count: int) -> None:
    refused(forged("dtype", dictionary_of(count)), "its columns are too large")


def test_a_dictionary_of_more_texts_than_rows() -> None:
    def edit(_: list[Field], pages: list[Page]) -> None:
        dictionary_of(100_000)(_, pages)
        pages[0].set_values(b"".join(b"\5\0\0\0%05d" % number for number in range(100_000)))

    refused(forged("dtype", edit), "more texts than rows")


@pytest.mark.parametrize(
    "encoding", [DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY, BYTE_STREAM_SPLIT, 100]
)
def test_encodings_with_counts_of_their_own(encoding: int) -> None:
    refused(forged("stored_bytes", lambda _, pages: put(get(pages[0].header, 5), 2, encoding)), "in an encoding")


def test_pages_that_do_not_fill_their_column() -> None:
    for change in (-1, 1, 1000):
        refused(forged("elements", lambda chunk, _, change=change: put(chunk, 5, 4 + change)), "do not fit its sizes")


def with_edit(edit: Callable[[list[Field]], None]) -> bytes:
    footer = copy.deepcopy(footer_of(SMALL))
    edit(footer)
    return with_footer(SMALL[: len(SMALL) - 8 - int.from_bytes(SMALL[-8:-4], "little")], footer)


def claim(number: int, count: int) -> Callable[[list[Field]], None]:
    def edit(footer: list[Field]) -> None:
        get(footer, number).claimed = count

    return edit


@pytest.mark.parametrize("number", [2, 4, 5])
@pytest.mark.parametrize("count", [100, 1 << 20, (1 << 32) - 1])
def test_lists_of_the_footer_that_claim_more_than_there_is(number: int, count: int) -> None:
    refused(with_edit(claim(number, count)), "damaged|ends too early|unknown type|number")


def test_lists_of_the_footer_with_many_small_items() -> None:
    # A byte or two each, of which Arrow makes structures of hundreds of bytes.
    many = 900_000
    refused(with_edit(lambda footer: put(get(footer, 4).items[0], 1, List(STRUCT, [[]] * many))), "too many columns")
    refused(with_edit(lambda footer: put(footer, 2, List(STRUCT, [[]] * many))), "too many columns")
    # What nobody needs is left out of the footer that Arrow gets.
    file = with_edit(lambda footer: footer.append(Field(7, LIST, List(STRUCT, [[]] * many))))
    checked = parquet_bounds.check(file, 10)
    assert len(checked.file) < 5000
    assert parquet.from_bytes(file, "a") == parquet.from_bytes(SMALL, "a")


def test_a_list_that_arrow_would_read_in_another_way() -> None:
    # Arrow ignores the type of a list's items: the list of encodings, read as texts, would hide what follows.
    def edit(footer: list[Field]) -> None:
        encodings = get(get(footer, 4).items[0], 1).items[0]
        put(get(encodings, 3), 2, List(BINARY, [b"", b"\x15\0"]))

    refused(with_edit(edit), "a list that is damaged")


def test_numbers_that_arrow_would_cut() -> None:
    def edit(_: list[Field], pages: list[Page]) -> None:
        put(get(pages[0].header, 5), 1, 4 + (1 << 32))

    refused(forged("elements", edit), "a number that is too large")


def test_the_footer_is_written_as_it_was_read() -> None:
    for data in manifests.seeds():
        ours, theirs = (pq.ParquetFile(io.BytesIO(file)) for file in (parquet_bounds.check(data, 10).file, data))
        assert ours.schema_arrow == theirs.schema_arrow.remove_metadata()
        assert ours.read() == theirs.read()
        assert ours.metadata.num_rows == theirs.metadata.num_rows
        assert json.loads(parquet_bounds.check(data, 10).metadata[b"df11"])


def test_nesting_is_bounded() -> None:
    nested: list[Field] = []
    for _ in range(100):
        nested = [Field(1, STRUCT, nested)]
    refused(with_edit(lambda footer: footer.append(Field(100, STRUCT, nested))), "nested too deeply")
