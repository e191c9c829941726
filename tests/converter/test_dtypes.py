"""Records of every dtype through the converter: there and back, what stays verbatim, and who can read the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import df11
from df11.converter.source import Source
from df11.formats import errors, layout
from df11.formats.container import NUMPY_DTYPES
from tests.support import commands, sources, strategies
from tests.support.sources import SEGMENT, Tensor, bf16, random_tensor

OTHERS = [kind for kind in layout.KINDS.values() if kind is not layout.BF16]
EACH = pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.dtype)


def weights(name: str, kind: layout.Kind, count: int, seed: int = 0) -> Tensor:
    """A tensor that compresses like a model's."""
    bits = strategies.as_kind(sources.gaussian(count, seed, 0.02 if kind.exponent_bits == 8 else 1.0), kind, seed)
    return Tensor(name, kind.dtype, (count,), bits.tobytes())


def there_and_back(folder: Path, tensors: list[Tensor], **options) -> dict[str, str]:
    """Name -> encoding, in the order of the container."""
    source = sources.write(folder / "x.safetensors", tensors, **options)
    df11.convert(source, folder / "x.df11", threads=2, force=True)
    assert df11.verify(folder / "x.df11", source).compared
    df11.verify(folder / "x.df11")
    df11.restore(folder / "x.df11", folder / "y.safetensors", force=True)
    assert (folder / "y.safetensors").read_bytes() == source.read_bytes()
    with df11.open(folder / "x.df11") as container:
        for tensor in tensors:
            if container.info(tensor.name).exact is not None:
                continue
            found = container.tensor(tensor.name)
            assert found.dtype == np.dtype(NUMPY_DTYPES[tensor.dtype])
            assert found.tobytes() == tensor.data
            if len(tensor.shape) == 1 and tensor.shape[0] > 100:
                assert container.rows(tensor.name, 7, 95).tobytes() == found[7:95].tobytes()
        return {name: container.info(name).encoding for name in container.keys()}


@EACH
def test_there_and_back(kind: layout.Kind, tmp_path: Path) -> None:
    """Several segments, odd sizes, small ones, an empty one, and starts that are not aligned."""
    counts = [SEGMENT + 77, 8193, 5000, 17, 1, 0]
    tensors = [random_tensor("shift", "U8", (3,))]
    tensors += [weights(f"w{count}", kind, count, count) for count in counts]
    found = there_and_back(tmp_path, tensors, padding=1)
    assert {name for name, encoding in found.items() if encoding == "df11"} == {f"w{count}" for count in counts[:3]}


def test_a_file_of_all_dtypes(tmp_path: Path) -> None:
    tensors = [weights(kind.dtype, kind, 9000) for kind in layout.KINDS.values()]
    assert set(there_and_back(tmp_path, tensors).values()) == {"df11"}


@EACH
def test_what_does_not_pay_stays_in_its_place(kind: layout.Kind, tmp_path: Path) -> None:
    """Random bits of several segments, whose record is dropped; then a record, which must be aligned."""
    tensors = [
        weights("first", kind, 5000),
        random_tensor("noise", kind.dtype, (SEGMENT + 16,), 1),
        random_tensor("small", kind.dtype, (32,), 2),
        weights("second", kind, 5000, 3),
        random_tensor("odd", kind.dtype, (SEGMENT + 5,), 4),
        weights("third", kind, 5000, 5),
    ]
    found = there_and_back(tmp_path, tensors)
    assert list(found) == ["first", "noise", "small", "second", "third", "odd"]
    assert [name for name, encoding in found.items() if encoding == "df11"] == ["first", "second", "third"]
    size = (tmp_path / "x.df11").stat().st_size
    assert size < (tmp_path / "x.safetensors").stat().st_size


def test_a_tensor_that_saves_less_than_3_percent_stays_verbatim(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = []
    for name, kept in (("little", 31), ("more", 24)):  # Of 32 exponents: a bit at most, and a half.
        bits = rng.integers(1 << 16, size=60_000, dtype=np.uint16)
        bits = bits & 0x83FF | ((bits >> 10 & 31) % kept << 10).astype(np.uint16)
        tensors.append(Tensor(name, "F16", bits.shape, bits.tobytes()))
    assert there_and_back(tmp_path, tensors) == {"little": "verbatim", "more": "verbatim"}
    bits = bits & 0x83FF | ((bits >> 10 & 31) % 16 << 10).astype(np.uint16)
    assert there_and_back(tmp_path, [Tensor("half", "F16", bits.shape, bits.tobytes())]) == {"half": "df11"}


@EACH
def test_an_earlier_reader_refuses_by_name(kind: layout.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there_and_back(tmp_path, [weights("w", kind, 5000), bf16("b", (5000,))])
    monkeypatch.setattr(layout, "KNOWN_FEATURES", frozenset())
    with pytest.raises(errors.FeatureError, match=kind.feature):
        df11.open(tmp_path / "x.df11")


def test_only_what_is_needed_is_required(tmp_path: Path) -> None:
    for tensors, features in (
        ([bf16("w", (5000,))], []),
        ([sources.f32("w", (5000,), exact=True)], []),
        ([random_tensor("w", "F16", (5000,)), random_tensor("v", "F32", (9,))], []),
        ([weights("w", layout.F8_E5M2, 5000), weights("v", layout.F16, 5000)], ["F16-records", "F8_E5M2-records"]),
    ):
        there_and_back(tmp_path, tensors)
        data = (tmp_path / "x.df11").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert sorted(json.loads(header["__metadata__"]["df11.requires"])) == features


@EACH
def test_a_source_is_read_once(kind: layout.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [weights("w", kind, SEGMENT + 5000), random_tensor("small", kind.dtype, (64,)), weights("v", kind, 4096)]
    source = sources.write(tmp_path / "x.safetensors", tensors)
    taken: list[int] = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self, start, out: (taken.append(len(out)), read(self, start, out))[1])
    df11.convert(source, tmp_path / "x.df11")
    assert sum(taken) == sum(len(tensor.data) for tensor in tensors)


def test_every_thread_count_gives_the_same_bytes(tmp_path: Path) -> None:
    late = np.frombuffer(sources.f32("", (2 * SEGMENT,), exact=True).data, "<u4").copy()
    late[-1] |= 1
    tensors = [weights(f"{kind.dtype}.{n}", kind, SEGMENT // 2 + n, n) for kind in OTHERS for n in range(3)]
    tensors.append(Tensor("late", "F32", late.shape, late.tobytes()))
    source = sources.write(tmp_path / "x.safetensors", tensors)
    found = set()
    for threads, memory in ((1, "256MiB"), (4, "1GiB"), (2, "200MiB")):
        df11.convert(source, tmp_path / "x.df11", threads=threads, max_memory=memory, resume=False, force=True)
        found.add(sources.sha256(tmp_path / "x.df11"))
    assert len(found) == 1


def test_inspect_names_dtypes_and_bits(tmp_path: Path) -> None:
    there_and_back(tmp_path, [weights(kind.dtype, kind, 90_000) for kind in OTHERS])
    text = commands.run("inspect", tmp_path / "x.df11").fine().out
    (found,) = commands.run("inspect", "--json", tmp_path / "x.df11").fine().events
    for tensor in found["tensors"]:
        kind = layout.KINDS[tensor["name"]]
        assert (tensor["dtype"], tensor["encoding"]) == (kind.dtype, "df11")
        assert tensor["bits_per_weight"] < 8 * kind.bytes * 0.97
        assert f"{tensor['bits_per_weight']:.2f}" in text
