"""Conversion of one file: every kind of source comes back byte for byte, and always gives the same container."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import df11
from tests.support import commands, sources
from tests.support.sources import SEGMENT, Tensor, bf16, f32, random_tensor


def parse(data: bytes) -> tuple[dict, dict[str, bytes]]:
    """The JSON header of a safetensors file, and the bytes of its tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            tensors[name] = data[8 + size + start : 8 + size + end]
    return header, tensors


def round_trip(data: bytes, folder: Path, **options) -> df11.ConversionReport:
    """Convert, verify, restore: every step must see the same file."""
    source, container, restored = folder / "x.safetensors", folder / "x.df11", folder / "y.safetensors"
    source.write_bytes(data)
    report = df11.convert(source, container, **options)
    (file,) = report.files
    assert file.status == "converted"
    assert file.source_sha256 == hashlib.sha256(data).hexdigest()
    assert (file.source_bytes, file.output_bytes) == (len(data), container.stat().st_size)
    assert df11.verify(container).files == 1
    assert df11.verify(container, source).compared
    (back,) = df11.restore(container, restored).files
    assert restored.read_bytes() == data
    assert back.sha256 == file.source_sha256
    return report


@pytest.mark.parametrize("kind", sources.KINDS)
def test_every_kind_of_source_comes_back_byte_for_byte(kind, tmp_path):
    data = sources.KINDS[kind]()
    header, tensors = parse(data)
    report = round_trip(data, tmp_path)
    assert report.files[0].tensors == len(tensors)
    with df11.open(tmp_path / "x.df11") as container:
        assert set(container.keys()) == set(tensors)
        assert container.source.sha256 == hashlib.sha256(data).hexdigest()
        for name, expected in tensors.items():
            info = container.info(name)
            assert (info.dtype, list(info.shape)) == (header[name]["dtype"], header[name]["shape"])
            assert container.tensor(name).tobytes() == expected


@pytest.mark.parametrize("kind", sources.KINDS)
def test_a_container_is_a_safetensors_file_with_the_same_names(kind, tmp_path):
    source, container = tmp_path / "x.safetensors", tmp_path / "x.df11"
    source.write_bytes(sources.KINDS[kind]())
    df11.convert(source, container)
    expected, tensors = parse(source.read_bytes())
    with safetensors.safe_open(container, framework="np") as stock:
        assert set(stock.keys()) == set(tensors)
    # The layout that SPEC.md promises to GPU readers, by hand.
    data = container.read_bytes()
    header, stored = parse(data)
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    for name, value in json.loads(header["__metadata__"]["df11.tensors"]).items():
        if value["encoding"] == "df11":
            assert header[name]["data_offsets"][0] % 16 == 0
            assert header[name]["dtype"] == "U8"
            assert expected[name]["dtype"] in ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2")
            assert stored[name][:4] == b"DF11"
        else:
            assert stored[name] == tensors[name]


def test_only_bf16_that_gets_smaller_is_coded(tmp_path):
    tensors = [
        bf16("weights", (300, 100)),
        random_tensor("noise", "BF16", (300, 100)),
        f32("f32", (50,)),
        bf16("one", (1,)),
        random_tensor("u8", "U8", (99,)),
    ]
    df11.convert(sources.write(tmp_path / "x.safetensors", tensors), tmp_path / "x.df11")
    with df11.open(tmp_path / "x.df11") as container:
        encodings = {name: container.info(name).encoding for name in container.keys()}
    assert encodings == {"weights": "df11", "noise": "verbatim", "f32": "verbatim", "one": "verbatim", "u8": "verbatim"}


def test_weights_become_a_third_smaller(tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [bf16("w", (2 * SEGMENT,))])
    assert df11.convert(source, tmp_path / "x.df11").ratio < 0.67


def test_random_bits_do_not_grow(tmp_path):
    source = sources.write(
        tmp_path / "x.safetensors",
        [random_tensor("w", "BF16", (SEGMENT + 100_000,)), random_tensor("v", "BF16", (70_000,), 1)],
    )
    assert df11.convert(source, tmp_path / "x.df11").ratio < 1.001


@st.composite
def tensor_lists(draw) -> list[Tensor]:
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, max_size=6))
    tensors = []
    for seed, name in enumerate(names):
        if name == "__metadata__":
            continue
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        dtype = draw(st.sampled_from(["BF16", "BF16", "F32", "U8", "F16", "I64"]))
        if dtype == "BF16":
            # From a single exponent to all of them, with runs in between.
            exponents = draw(st.lists(st.integers(0, 255), min_size=1, max_size=5))
            generator = np.random.default_rng(seed)
            count = math.prod(shape)
            weights = generator.choice(np.array(exponents, np.uint16), count) << 7 | generator.integers(
                0, 128, count, dtype=np.uint16
            )
            tensors.append(
                Tensor(name, dtype, shape, (weights | generator.choice([0, 0x8000], count)).astype("<u2").tobytes())
            )
        else:
            tensors.append(random_tensor(name, dtype, shape, seed))
    return tensors


@settings(max_examples=40, deadline=None)
@given(
    tensor_lists(),
    st.integers(0, 70),
    st.none()
    | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    st.sampled_from([None, "bf16"]),
)
def test_any_small_file_comes_back(tensors, padding, metadata, cast):
    data = sources.file_bytes(tensors, padding=padding, metadata=metadata)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if cast is None or all(tensor.dtype != "F32" or is_exact(tensor.data) for tensor in tensors):
            round_trip(data, folder, cast=cast, threads=2)
            return
        source = folder / "x.safetensors"
        source.write_bytes(data)
        df11.convert(source, folder / "x.df11", cast=cast, threads=2)
        df11.verify(folder / "x.df11", source)
        with df11.open(folder / "x.df11") as container:
            for tensor in tensors:
                assert container.tensor(tensor.name).tobytes() == (
                    sources.round_to_bf16(tensor.data) if tensor.dtype == "F32" else tensor.data
                )


def is_exact(data: bytes) -> bool:
    """Whether F32 bytes hold only BF16 values."""
    return (np.frombuffer(sources.round_to_bf16(data), "<u2").astype("<u4") << 16).tobytes() == data


# The cast.


def test_an_exact_cast_comes_back_as_the_f32_file(tmp_path):
    tensors = [
        f32("a", (300, 200), 1, exact=True),
        random_tensor("odd", "U8", (3,)),
        f32("unaligned", (SEGMENT + 77,), 2, exact=True),
        f32("scalar", (), 3, exact=True),
        Tensor("empty", "F32", (0, 5), b""),
        Tensor("nan", "F32", (2,), np.array([0xFFFF0000, 0x7F800000], "<u4").tobytes()),
        bf16("b", (5000,), 4),
        random_tensor("i", "I64", (9,), 5),
    ]
    data = sources.file_bytes(tensors, metadata={"format": "pt"})
    (file,) = round_trip(data, tmp_path, cast="bf16").files
    assert (file.cast_tensors, file.exact_tensors) == (5, 5)
    assert file.output_bytes < 0.36 * file.source_bytes
    with df11.open(tmp_path / "x.df11") as container:
        exact = {name: container.info(name).exact for name in container.keys()}
        assert exact == {
            "a": True,
            "unaligned": True,
            "scalar": True,
            "empty": True,
            "nan": True,
            "odd": None,
            "b": None,
            "i": None,
        }


def test_an_inexact_cast_rounds_to_nearest_even(tmp_path):
    upper = np.arange(65536, dtype=np.uint32)[:, None] << 16
    lower = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    every = Tensor("every boundary", "F32", (65536, 6), (upper | lower).astype("<u4").tobytes())
    noise = random_tensor("noise", "F32", (10_001,), 1)
    exact = f32("exact", (4000,), 2, exact=True)
    source = sources.write(tmp_path / "x.safetensors", [noise, every, exact], padding=1)
    (file,) = df11.convert(source, tmp_path / "x.df11", cast="bf16").files
    assert (file.cast_tensors, file.exact_tensors) == (3, 1)
    assert df11.verify(tmp_path / "x.df11", source).compared
    with df11.open(tmp_path / "x.df11") as container:
        for tensor in (every, noise, exact):
            assert container.info(tensor.name).dtype == "BF16"
            assert container.info(tensor.name).exact is (tensor is exact)
            assert container.tensor(tensor.name).tobytes() == sources.round_to_bf16(tensor.data)


@pytest.mark.parametrize(
    "bits", [0x3F800001, 0x7FC00001, 0x7F800001, 0x7FC00000, 0xFFFF0001, 0x00000001, 0x80000001, 0x7F7FFFFF]
)
def test_one_value_that_changes_makes_a_tensor_inexact(bits, tmp_path):
    values = np.frombuffer(f32("", (SEGMENT + 10,), exact=True).data, "<u4").copy()
    values[SEGMENT + 3] = bits
    source = sources.write(tmp_path / "x.safetensors", [Tensor("a", "F32", values.shape, values.tobytes())])
    (file,) = df11.convert(source, tmp_path / "x.df11", cast="bf16").files
    assert (file.cast_tensors, file.exact_tensors) == (1, 0)


# The same bytes under all circumstances.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A file that keeps several threads busy: many segments, coded and raw, small tensors, deferred ones, F32."""
    tensors = [random_tensor("odd", "U8", (11,))]
    for seed in range(4):
        tensors += [
            bf16(f"long.{seed}", (SEGMENT + 1000 * seed + 1,), seed),
            random_tensor(f"noise.{seed}", "BF16", (50_000,), seed),
            f32(f"f32.{seed}", (SEGMENT // 4 + seed,), seed, exact=seed % 2 == 0),
            *(bf16(f"small.{seed}.{index}", (31 * index,), index) for index in range(30)),
        ]
    return sources.write(tmp_path_factory.mktemp("mixed") / "x.safetensors", tensors, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=[None, "bf16"], ids=["lossless", "cast"])
def reference(request, mixed, tmp_path_factory) -> tuple[str | None, str]:
    """A cast, and the SHA-256 of the container with default options."""
    container = tmp_path_factory.mktemp("reference") / "x.df11"
    df11.convert(mixed, container, cast=request.param)
    return request.param, sources.sha256(container)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 2},
        {"threads": 4},
        {"max_memory": "230MiB"},
        {"max_memory": "2GiB", "threads": 4},
        {"verify": False},
        {"threads": 4, "verify": False},
    ],
    ids=str,
)
def test_options_do_not_change_the_bytes(options, mixed, reference, tmp_path):
    cast, expected = reference
    df11.convert(mixed, tmp_path / "x.df11", cast=cast, **options)
    assert sources.sha256(tmp_path / "x.df11") == expected


def test_every_process_gives_the_same_bytes(mixed, reference, tmp_path):
    cast, expected = reference
    for seed in ("1", "2"):
        container = tmp_path / f"{seed}.df11"
        options = [] if cast is None else ["--cast", cast]
        commands.run_process(
            "convert", mixed, container, *options, env=commands.environment(PYTHONHASHSEED=seed, TZ=f"UTC+{seed}")
        ).fine()
        assert sources.sha256(container) == expected


def test_the_name_of_the_file_does_not_matter(tmp_path):
    data = sources.KINDS["every dtype"]()
    digests = set()
    for name in ("a", "another name"):
        (tmp_path / name).write_bytes(data)
        df11.convert(tmp_path / name, tmp_path / f"{name}.df11")
        digests.add(sources.sha256(tmp_path / f"{name}.df11"))
    assert len(digests) == 1


# Progress.


def test_progress_ends_at_its_total(tmp_path):
    tensors = [
        bf16("a", (SEGMENT + 100,)),
        f32("b", (900,), 1),
        random_tensor("c", "BF16", (7000,), 2),
        Tensor("d", "U8", (0,), b""),
    ]
    for name in ("a", "b"):
        sources.write(tmp_path / "model" / f"{name}.safetensors", tensors, padding=1000)

    def ends_at_its_total(function, *arguments, **options):
        totals, steps = [], []
        function(*arguments, on_total=totals.append, on_progress=steps.append, **options)
        assert len(totals) == 1
        assert min(steps) >= 0
        assert sum(steps) == totals[0], function

    ends_at_its_total(df11.convert, tmp_path / "model", tmp_path / "out", cast="bf16")
    ends_at_its_total(df11.convert, tmp_path / "model", tmp_path / "out", cast="bf16")  # Skipped.
    ends_at_its_total(df11.verify, tmp_path / "out")
    ends_at_its_total(df11.verify, tmp_path / "out", tmp_path / "model")
    ends_at_its_total(df11.restore, tmp_path / "out", tmp_path / "back", bf16=True)
