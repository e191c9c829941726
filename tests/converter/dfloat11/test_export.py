"""Models in DFloat11's layout, and as plain safetensors: read back by a reader that follows DFloat11's kernel."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import df11
from df11.converter.dfloat11.codes import choose_code, limited_lengths
from df11.converter.export import export
from df11.formats import errors, layout
from df11.storage.local import LocalStore
from tests.support import commands, dfloat11, sources, strategies
from tests.support.dfloat11 import with_exponents
from tests.support.sources import Tensor, bf16, gaussian

RNG = np.random.default_rng(6)
PARTS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *(f"feed_forward.linear_{n}" for n in (1, 2, 3))]


def matrix(name: str, exponents: Any, columns: int = 1) -> Tensor:
    weights = with_exponents(list(exponents))
    return Tensor(name, "BF16", (len(weights) // columns, columns), weights.tobytes())


def omnigen2(blocks: int = 2) -> list[Tensor]:
    """Tensors with the names of OmniGen2's transformer: blocks without modulation, and one with."""
    found = []
    for number in range(blocks):
        found += [bf16(f"context_refiner.{number}.{part}.weight", (24, 16), number) for part in PARTS]
        found.append(bf16(f"context_refiner.{number}.norm2.weight", (16,), number))
    found += [bf16(f"layers.7.{part}.weight", (40, 300), 7) for part in [*PARTS, "norm1.linear"]]
    found += [bf16("layers.7.norm1.linear.bias", (40,)), sources.f32("x_embedder.weight", (9, 5)), bf16("rope", (3,))]
    return found


def model(folder: Path, tensors: list[Tensor], config: Any = None, name: str = "model") -> Path:
    """A converted model folder."""
    sources.write(folder / "plain" / f"{name}.safetensors", tensors)
    if config is not None:
        (folder / "plain" / "config.json").write_text(json.dumps(config))
    df11.convert(folder / "plain", folder / "df11")
    return folder / "df11"


def plain_of(tensors: list[Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {one.name: (one.dtype, one.shape, one.data) for one in tensors}


def check(folder: Path, tensors: list[Tensor], *, copies: dict[str, str] | None = None) -> dict[str, dfloat11.Parts]:
    """The checkpoint in a folder holds just these tensors; returns its units."""
    units, plain = dfloat11.read_units(folder)
    patterns = json.loads((folder / "config.json").read_text())["dfloat11_config"]["pattern_dict"]
    wanted = plain_of(tensors)
    found = dict(plain)
    import re

    for name, parts in units.items():
        (attributes,) = (value for pattern, value in patterns.items() if re.fullmatch(pattern, name))
        names = [f"{name}.{one}.weight" for one in attributes] or [f"{name}.weight"]
        for one, weights in zip(names, dfloat11.decode(parts), strict=True):
            original = (copies or {}).get(one, one)
            assert one not in found
            found[one] = ("BF16", wanted[original][1], weights.tobytes())
    wanted |= {copy: wanted[original] for copy, original in (copies or {}).items()}
    assert found == wanted
    return units


@pytest.mark.parametrize("file_per_unit", [False, True])
def test_a_known_model(file_per_unit, tmp_path):
    tensors = omnigen2()
    path = model(tmp_path, tensors, {"_class_name": "X", "hidden_size": 16}, "diffusion_pytorch_model")
    report = export(path, tmp_path / "out", "dfloat11", file_per_unit=file_per_unit)
    assert report.units == 3
    units = check(tmp_path / "out", tensors)
    assert units.keys() == {"context_refiner.0", "context_refiner.1", "layers.7"}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    rest = {"config.json", "diffusion_pytorch_model.safetensors"}
    of_units = {"context_refiner_0.safetensors", "context_refiner_1.safetensors", "layers_7.safetensors"}
    assert names == rest | (of_units if file_per_unit else set())
    if file_per_unit:  # With what is below the module.
        assert "layers.7.norm1.linear.bias" in dfloat11.read_file(tmp_path / "out" / "layers_7.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["_class_name"], config["model_type"]) == ("X", "llama")
    assert list(config["dfloat11_config"]) == ["version", "threads_per_block", "bytes_per_thread", "pattern_dict"]
    # Back: the same records.
    df11.convert(tmp_path / "out", tmp_path / "again", shapes=tmp_path / "plain")
    assert records(path) == records(tmp_path / "again")


def records(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.df11"):
        with df11.open(file) as container:
            for name in container.keys():
                start, end = container.span(name)
                found[name] = np.empty(end - start, np.uint8)
                container.read(start, found[name])
    return {name: data.tobytes() for name, data in found.items()}


@pytest.mark.parametrize(
    "exponents",
    [
        [127],
        [127] * 20_000,  # With one bit for each, a block would hold too many.
        [120, 121] * 5,
        [10] * 32768,
        RNG.integers(0, 240, 9000),
        np.repeat(np.arange(50, 80), 2 ** np.minimum(np.arange(30), 12)),
        np.concatenate([np.arange(50, 170), [190] * 500, [191] * 1100, [192] * 2300]),  # Many pointers, for some.
    ],
    ids=lambda value: str(len(value)),
)
def test_units_of_all_kinds(exponents, tmp_path):
    tensors = [matrix("a.weight", exponents), bf16("b.x.weight", (4, 5)), bf16("b.y.weight", (3, 2)), bf16("n", (2,))]
    patterns = tmp_path / "patterns.json"
    patterns.write_text(json.dumps({"a": [], "b": ["x", "y"]}))
    path = model(tmp_path, tensors, {})
    commands.run("export", "--to", "dfloat11", path, tmp_path / "out", "--patterns", patterns).fine()
    check(tmp_path / "out", tensors)


def test_what_runs_into_the_last_block(tmp_path):
    for size in (16383, 16384, 16385, 32767):  # Of two bits: one block has 16,384.
        tensors = [matrix("a.weight", [10, 11, 12] * (size // 3) + [11] * (size % 3))]
        (tmp_path / f"{size}.json").write_text('{"a": []}')
        path = model(tmp_path / str(size), tensors, {})
        export(path, tmp_path / str(size) / "out", "dfloat11", patterns=tmp_path / f"{size}.json")
        check(tmp_path / str(size) / "out", tensors)


DECODER = [*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down"))]


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_written_under_both_names(is_tied, tmp_path):
    tensors = [bf16(f"model.layers.{n}.{part}.weight", (16, 16), n) for n in range(2) for part in DECODER]
    tensors += [bf16("model.embed_tokens.weight", (30, 16), 5), bf16("model.norm.weight", (16,))]
    path = model(tmp_path, tensors, {"tie_word_embeddings": is_tied, "model_type": "qwen2"})
    export(path, tmp_path / "out", "dfloat11")
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if is_tied else {}
    units = check(tmp_path / "out", tensors, copies=copies)
    assert ("lm_head" in units) == is_tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2"
    df11.convert(tmp_path / "out", tmp_path / "again", shapes=tmp_path / "plain")
    assert records(path) == records(tmp_path / "again")


def test_a_single_file(tmp_path):
    tensors = omnigen2(1)
    container = tmp_path / "x.df11"
    df11.convert(sources.write(tmp_path / "x.safetensors", tensors), container)
    result = commands.run("export", "--to", "dfloat11", container, tmp_path / "o" / "y.safetensors", "--json").fine()
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [event["event"] for event in events] == ["file", "done"]
    assert events[1]["units"] == 2
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["y.safetensors"]
    df11.convert(tmp_path / "o" / "y.safetensors", tmp_path / "z.df11", shapes=tmp_path / "x.safetensors")
    with df11.open(tmp_path / "z.df11") as back:
        assert {name: back.tensor(name).tobytes() for name in back.keys()} == {one.name: one.data for one in tensors}
    command = ("export", "--to", "dfloat11", container, tmp_path / "p.safetensors", "--file-per-unit")
    commands.run(*command).error(2, "--file-per-unit is for model folders")


def test_exponents_that_do_not_fit_are_refused_by_name(tmp_path):
    tensors = omnigen2(1)
    tensors[2] = matrix(tensors[2].name, [127] * 100 + [240])
    path = model(tmp_path, tensors, {})
    result = commands.run("export", "--to", "dfloat11", path, tmp_path / "out")
    result.error(2, "'context_refiner.0.attn.to_v.weight'", "no exponents from 240 on", "--to safetensors")
    assert not (tmp_path / "out").exists()


def test_what_is_no_unit(tmp_path):
    path = model(tmp_path, [bf16("x.weight", (8, 8)), sources.f32("y.weight", (8, 8))], {})
    commands.run("export", "--to", "dfloat11", path, tmp_path / "o").error(2, "no model is known", "--patterns")
    for content, message in (
        ({"z": []}, "no tensors of the model fit"),
        ({"y": []}, "no matrix in BF16"),
        ({"x": [], "x|q": []}, "two patterns match"),
        ({"(": []}, "a group does not end"),
        ({}, "no pattern_dict"),
        ([1], "no pattern_dict"),
    ):
        (tmp_path / "p.json").write_text(json.dumps(content))
        command = ("export", "--to", "dfloat11", path, tmp_path / "o", "--patterns", tmp_path / "p.json")
        commands.run(*command).error(2, message)
    commands.run("export", path, tmp_path / "o").error(2, "--to", "dfloat11 or safetensors")
    commands.run("export", "--to", "gguf", path, tmp_path / "o").error(2, "--to", "gguf")
    command = ("export", "--to", "safetensors", path, tmp_path / "o", "--file-per-unit")
    commands.run(*command).error(2, "--file-per-unit are for --to dfloat11")
    commands.run("export", "--to", "safetensors", tmp_path / "plain", tmp_path / "o").error(
        2, "no .df11 file", "df11-convert"
    )


@pytest.mark.parametrize("name", ["../../a", "/a", "a/c", ".a"])
def test_a_unit_whose_name_leads_elsewhere_gets_no_file(name, tmp_path):
    path = model(tmp_path, [bf16(f"{name}.weight", (8, 8)), bf16("b.weight", (4, 4))], {})
    (tmp_path / "p.json").write_text(json.dumps({r"[^b]*": [], "b": []}))
    options = ("--to", "dfloat11", "--patterns", tmp_path / "p.json", path, tmp_path / "out")
    commands.run("export", "--file-per-unit", *options).error(2, repr(name), "no file can have the name of this unit")
    assert not (tmp_path / "out").exists()
    commands.run("export", *options).fine()


def test_plain_files(tmp_path):
    tensors = omnigen2()
    folder = tmp_path / "plain"
    sources.write(folder / "m-1.safetensors", tensors[:9])
    sources.write(folder / "sub" / "m-2.sft", tensors[9:])
    weights = {one.name: "m-1.safetensors" for one in tensors[:9]}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "tokenizer.json").write_text("{}")
    df11.convert(folder, tmp_path / "df11", cast="bf16")
    report = export(tmp_path / "df11", tmp_path / "out", "safetensors")
    assert [Path(file.output).name for file in report.files] == ["m-1.safetensors", "m-2.safetensors"]
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")) == [
        "m-1.safetensors",
        "m.safetensors.index.json",
        "sub",
        "sub/m-2.safetensors",
        "tokenizer.json",
    ]
    found = dfloat11.read_file(tmp_path / "out" / "m-1.safetensors")
    found |= dfloat11.read_file(tmp_path / "out" / "sub" / "m-2.safetensors")
    wanted = plain_of(tensors)
    cast = sources.round_to_bf16(wanted["x_embedder.weight"][2])
    assert found == wanted | {"x_embedder.weight": ("BF16", (9, 5), cast)}
    index = json.loads((tmp_path / "out" / "m.safetensors.index.json").read_text())
    assert index["weight_map"] == weights


def all_dtypes() -> list[Tensor]:
    """A large tensor of each dtype that has records, under names of OmniGen2's layers; one F32 tensor holds BF16."""
    found = []
    for number, kind in enumerate(layout.KINDS.values()):
        bits = strategies.as_kind(gaussian(96 * 64, number), kind, number)
        found.append(Tensor(f"layers.{number}.attn.to_q.weight", kind.dtype, (96, 64), bits.tobytes()))
    return [*found, sources.f32("layers.9.attn.to_q.weight", (96, 64), 9, exact=True), sources.f32("n", (3,))]


def test_plain_files_have_the_dtypes_of_the_source(tmp_path):
    tensors = all_dtypes()
    path = model(tmp_path, tensors)
    with df11.open(path / "model.df11") as container:
        assert {container.info(one.name).encoding for one in tensors[:-1]} == {"df11"}
        assert container.info("layers.9.attn.to_q.weight").dtype == "BF16"
    export(path, tmp_path / "out", "safetensors")
    assert dfloat11.read_file(tmp_path / "out" / "model.safetensors") == plain_of(tensors)


def test_only_bf16_becomes_units(tmp_path):
    """Also what was F32 of BF16 values; other dtypes stay as they are, and come back as they are."""
    (tmp_path / "patterns.json").write_text(json.dumps({r"layers\.\d\.attn\.to_q": []}))
    tensors = all_dtypes()
    taken = [one for one in tensors if one.name.startswith(("layers.0.", "layers.9."))]
    rest = [one for one in tensors if one not in taken]
    path = model(tmp_path, tensors)
    what = "no matrix in BF16 has the name 'layers.1.attn.to_q.weight'"
    with pytest.raises(errors.CheckpointError, match=what):
        export(path, tmp_path / "out", "dfloat11", patterns=tmp_path / "patterns.json")
    (tmp_path / "patterns.json").write_text(json.dumps({r"layers\.[09]\.attn\.to_q": []}))
    assert export(path, tmp_path / "out", "dfloat11", patterns=tmp_path / "patterns.json").units == 2
    narrowed = [Tensor(one.name, "BF16", one.shape, sources.round_to_bf16(one.data)) for one in taken[1:]]
    check(tmp_path / "out", [taken[0], *narrowed, *rest])
    df11.convert(tmp_path / "out", tmp_path / "again", shapes=tmp_path / "plain")
    assert records(tmp_path / "again") == records(path)
    original = sources.write(tmp_path / "original" / "model.safetensors", [taken[0], *narrowed, *rest])
    assert df11.verify(tmp_path / "again", original.parent).compared


def test_plain_f32_of_a_checkpoint_may_become_bf16(tmp_path):
    plain = [sources.f32("a", (96, 64), exact=True), sources.f32("b", (96, 64))]
    weights = gaussian(96 * 64)
    unit = dfloat11.tensors("w", dfloat11.encode([weights]))
    dfloat11.write(tmp_path / "in", {"model.safetensors": [*unit, *plain]}, dfloat11.config({"w": []}))
    wanted = [Tensor("w.weight", "BF16", (96, 64), weights.tobytes()), *plain]
    original = sources.write(tmp_path / "original" / "model.safetensors", wanted)
    df11.convert(tmp_path / "in", tmp_path / "out", shapes=original)
    with df11.open(next((tmp_path / "out").glob("*.df11"))) as container:
        assert [container.info(name).dtype for name in ("a", "b")] == ["BF16", "F32"]
    assert df11.verify(tmp_path / "out", original.parent).compared
    export(tmp_path / "out", tmp_path / "plain", "safetensors")
    (file,) = (tmp_path / "plain").glob("*.safetensors")
    assert dfloat11.read_file(file) == plain_of(wanted)


@pytest.mark.parametrize("to", ["dfloat11", "safetensors"])
def test_what_is_there_is_kept_or_not_touched(to, tmp_path):
    path = model(tmp_path, omnigen2(), {})
    export(path, tmp_path / "out", to)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()}
    report = export(path, tmp_path / "out", to)
    assert {file.status for file in report.files} == {"kept"}
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(errors.UsageError, match="already exists"):
        export(path, tmp_path / "out", to)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"
    export(path, tmp_path / "out", to, force=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file: data for file, (data, _) in before.items()
    }


def test_files_that_would_be_loaded_too_are_refused(tmp_path):
    path = model(tmp_path, omnigen2(), {})
    export(path, tmp_path / "out", "dfloat11", file_per_unit=True)
    with pytest.raises(errors.UsageError, match="would load this file, too"):
        export(path, tmp_path / "out", "dfloat11", force=True)


# Codes.


def entropy_cost(counts: np.ndarray, lengths: np.ndarray) -> int:
    return int((counts * lengths).sum())


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40), st.integers(6, 16))
def test_limited_codes_are_prefix_codes_and_as_short_as_can_be(values, limit):
    counts = np.array(values)
    lengths = limited_lengths(counts, limit)
    assert lengths.max() <= limit
    assert sum(2.0 ** -int(length) for length in lengths) == 1
    huffman = dfloat11.huffman(dict(enumerate(values)))
    free = np.array([len(huffman[one]) for one in range(len(values))])
    assert entropy_cost(counts, lengths) >= entropy_cost(counts, free)
    if free.max() <= limit:
        assert entropy_cost(counts, lengths) == entropy_cost(counts, free)


def test_a_limited_code_is_the_best_of_all():
    counts = np.array([1, 2, 3, 5, 8, 13])
    best = min(
        entropy_cost(counts, np.array(lengths))
        for lengths in itertools.product(range(1, 4), repeat=6)
        if sum(2.0**-length for length in lengths) <= 1
    )
    assert entropy_cost(counts, limited_lengths(counts, 3)) == best


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(st.integers(0, 239), st.integers(1, 1 << 40), min_size=1))
def test_tables_are_those_of_a_prefix_code(counted):
    counts = np.zeros(256, np.int64)
    counts[list(counted)] = list(counted.values())
    code = choose_code(counts)
    bits = {e: f"{int(code.codes[e]):0{int(code.lengths[e])}b}" for e in counted}
    assert all(2 <= len(text) <= 16 for text in bits.values())
    assert not any(a != b and bits[b].startswith(bits[a]) for a, b in itertools.permutations(counted, 2))
    assert code.luts.shape[0] <= 18
    for exponent, text in bits.items():
        row, rest = 0, text
        while len(rest) > 8:
            row, rest = 256 - int(code.luts[row, int(rest[:8], 2)]), rest[8:]
        for byte in range(1 << (8 - len(rest))):
            assert code.luts[row, (int(rest, 2) << (8 - len(rest))) + byte] == exponent
        assert code.luts[-1, exponent] == len(text)
    assert code.lengths[code.luts[0, 0]] or code.luts[0, 0] >= 240  # Zeros behind the end lead to an exponent.


def test_plain_weights_are_split_and_joined(tmp_path):
    weights = gaussian(70_000, 1)
    tensors = [Tensor("a.weight", "BF16", (70, 1000), weights.tobytes())]
    (tmp_path / "p.json").write_text(
        '{"dfloat11_config": {"threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": {"a": []}}}'
    )
    path = model(tmp_path, tensors, {})
    export(path, tmp_path / "out", "dfloat11", patterns=tmp_path / "p.json")
    (parts,) = check(tmp_path / "out", tensors).values()
    assert 8 * len(parts["encoded_exponent"]) < 2.7 * len(weights)


def test_a_folder_must_be_whole(tmp_path):
    plain = tmp_path / "plain"
    for folder in ("transformer", "vae"):
        sources.write(plain / folder / "model.safetensors", [bf16("x", (9, 9))])
    df11.convert(plain, tmp_path / "df11")
    journal = LocalStore(tmp_path / "df11").journal()
    journal.path.write_text("x")
    with pytest.raises(errors.ConflictError, match=r"a run that fills this folder has not ended.*to export what"):
        export(tmp_path / "df11", tmp_path / "out", "safetensors")
    journal.path.unlink()
    (tmp_path / "df11" / "vae" / "model.df11").unlink()
    with pytest.raises(errors.Df11Error, match=r"vae/model\.df11"):
        export(tmp_path / "df11", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()
