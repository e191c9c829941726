"""F32 tensors: those of BF16 values become BF16 by themselves; a cast leaves out what patterns name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import df11
from df11.converter import cast
from df11.converter.source import Source
from tests.support import commands, sources
from tests.support.sources import SEGMENT, Tensor, bf16, f32, random_tensor


def with_value(tensor: Tensor, index: int, bits: int) -> Tensor:
    values = np.frombuffer(tensor.data, "<u4").copy()
    values[index] = bits
    return Tensor(tensor.name, tensor.dtype, tensor.shape, values.tobytes())


def convert(folder: Path, tensors: list[Tensor], **options) -> dict[str, tuple[str, str, bool | None]]:
    """Convert there and back; name -> (encoding, dtype, exact)."""
    source = sources.write(folder / "x.safetensors", tensors)
    df11.convert(source, folder / "x.df11", **options)
    df11.verify(folder / "x.df11", source)
    df11.verify(folder / "x.df11")
    df11.restore(folder / "x.df11", folder / "y.safetensors")
    assert (folder / "y.safetensors").read_bytes() == source.read_bytes()
    with df11.open(folder / "x.df11") as container:
        infos = [container.info(name) for name in container.keys()]
    return {info.name: (info.encoding, info.dtype, info.exact) for info in infos}


def test_f32_that_is_bf16_becomes_bf16(tmp_path: Path) -> None:
    tensors = [
        f32("large", (SEGMENT + 77,), 1, exact=True),
        f32("small", (3,), 2, exact=True),
        with_value(f32("nan", (5000,), 3, exact=True), 17, 0x7FC00000),
        Tensor("zeros", "F32", (4096,), bytes(16384)),
        Tensor("empty", "F32", (0,), b""),
        f32("other", (5000,), 4),
        bf16("b", (5000,), 5),
    ]
    found = convert(tmp_path, tensors)
    assert found.pop("other")[1:] == ("F32", None)
    assert found == {
        "large": ("df11", "BF16", True),
        "small": ("verbatim", "BF16", True),
        "nan": ("df11", "BF16", True),
        "zeros": ("df11", "BF16", True),
        "empty": ("verbatim", "F32", None),
        "b": ("df11", "BF16", None),
    }
    with df11.open(tmp_path / "x.df11") as container:
        assert container.tensor("nan")[17] == 0x7FC0
    df11.convert(tmp_path / "x.safetensors", tmp_path / "z.df11", cast="bf16")
    assert df11.convert(tmp_path / "x.safetensors", tmp_path / "x.df11").files[0].status == "skipped"


@pytest.mark.parametrize("count", [3 * SEGMENT, 2 * SEGMENT + 5], ids=["aligned", "odd"])
@pytest.mark.parametrize("where", [0, SEGMENT, 2 * SEGMENT - 1, -1])
def test_one_value_makes_a_tensor_f32_again(count: int, where: int, tmp_path: Path) -> None:
    late = with_value(f32("late", (count,), 1, exact=True), where, 0x3F800001)
    tensors = [bf16("a", (5000,), 2), late, f32("after", (5000,), 3, exact=True), random_tensor("odd", "U8", (3,))]
    found = convert(tmp_path, tensors)
    assert found["late"][1:] == ("F32", None)
    assert found["after"] == ("df11", "BF16", True)


def test_a_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = with_value(f32("late", (2 * SEGMENT,), 1, exact=True), SEGMENT, 0x3F800001)
    early = with_value(f32("early", (2 * SEGMENT,), 1, exact=True), 5, 0x3F800001)
    tensors = [f32("exact", (2 * SEGMENT,), 1, exact=True), early, late]
    source = sources.write(tmp_path / "x.safetensors", tensors)
    spans: list[tuple[int, int]] = []
    read = Source.read
    monkeypatch.setattr(
        Source, "read", lambda self, start, out: (spans.append((start, len(out))), read(self, start, out))[1]
    )
    df11.convert(source, tmp_path / "x.df11", threads=1)
    size = 4 * SEGMENT
    assert sorted(spans) == sorted([(start, size) for start in range(0, 6 * size, size)] + [(4 * size, size)])


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 2**16 - 1).map(lambda upper: upper << 16), max_size=300),
    repeat=st.integers(1, 40),
)
def test_any_values_come_back(values: list[int], repeat: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = np.array(values * repeat, "<u4").tobytes()
    found = convert(tmp_path_factory.mktemp("x"), [Tensor("w", "F32", (len(values) * repeat,), data)])
    is_bf16 = bool(values) and all(value % 65536 == 0 for value in values)
    assert found["w"][1:] == (("BF16", True) if is_bf16 else ("F32", None))


def test_a_hint_where_f32_stays(tmp_path: Path) -> None:
    tensors = [f32("a", (6000,)), f32("b", (6000,), 1), f32("c", (6000,), 2, exact=True), bf16("d", (6000,))]
    source, out = sources.write(tmp_path / "x.safetensors", tensors), tmp_path / "x.df11"
    hint = "1 of them without loss; 2 F32 tensors are not BF16: --cast bf16 would round them"
    assert hint in commands.run("convert", source, out).fine().err
    assert hint in commands.run("convert", source, out).fine().err  # It is there already.
    result = commands.run("convert", source, out, "--force", "--cast", "bf16", "--keep-f32", "a").fine()
    assert "--cast bf16" not in result.err


# Tensors that a cast leaves out.


def test_a_cast_leaves_out_what_patterns_name(tmp_path: Path) -> None:
    names = ["blocks.0.norm1.weight", "blocks.0.attn.weight", "rope.freqs", "head.weight", "x.normal.weight"]
    tensors = [f32(name, (600,), seed) for seed, name in enumerate(names)]
    tensors.append(f32("blocks.0.norm2.weight", (600,), 9, exact=True))
    source, out = sources.write(tmp_path / "x.safetensors", tensors), tmp_path / "x.df11"
    run = ["convert", source, out, "--cast", "bf16", "--keep-f32"]
    result = commands.run(*run, "@wan", "--keep-f32", "head.*").fine()
    assert "3 F32 tensors stored as BF16, 1 of them without loss" in result.err
    with df11.open(out) as container:
        found = {name: container.info(name).exact for name in names}
        assert container.info("blocks.0.norm2.weight").exact is True
    assert found == dict.fromkeys(names) | {"blocks.0.attn.weight": False, "x.normal.weight": False}
    same = {"cast": "bf16", "keep_f32": ["*norm1*", "rope*", "head.weight"]}
    assert df11.convert(source, out, **same).files[0].status == "skipped"
    commands.run("convert", source, out, "--cast", "bf16").error(2, out, "--force")
    commands.run("convert", source, out).error(2, out, "--force")
    commands.run(*run, "@van").error(2, "@van", "@wan")
    commands.run("convert", source, out, "--keep-f32", "a").error(2, "--cast bf16")


@pytest.mark.parametrize("preset", cast.PRESETS)
def test_a_preset_is_what_the_library_keeps(preset: str) -> None:
    """By the rule of diffusers and transformers: one of the names is a part of the tensor's name between dots."""
    for part in cast.PRESETS[preset]:
        keep = cast.expand([preset])
        for name in (part, f"{part}.w", f"a.{part}", f"a.{part}.w"):
            assert not cast.is_rounded(name, "bf16", keep)
        for name in (f"x{part}.w", f"a.{part}x.w", f"a.{part}_.w"):
            assert cast.is_rounded(name, "bf16", keep)
