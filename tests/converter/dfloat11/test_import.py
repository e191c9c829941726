"""Checkpoints of DFloat11 as sources: every weight comes back, whoever encoded it and however it is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import df11
from df11.converter import parquet
from df11.converter.dfloat11.recognise import decoded
from df11.formats import errors
from df11.storage.local import LocalStore
from df11.storage.store import open_source
from tests.support import commands, dfloat11, sources
from tests.support.dfloat11 import with_exponents
from tests.support.sources import Tensor, bf16, gaussian

RNG = np.random.default_rng(5)


def shuffled(counts: dict[int, int]) -> np.ndarray:
    return with_exponents(RNG.permutation(np.repeat(list(counts), list(counts.values()))))


def fibonacci(count: int, first: int = 100) -> dict[int, int]:
    values = [1, 1]
    while len(values) < count:
        values.append(values[-1] + values[-2])
    return {first + place: value for place, value in enumerate(values)}


LONG = {exponent: "1" * exponent + "0" for exponent in range(31)} | {31: "1" * 31 + "0", dfloat11.END: "1" * 32}
NINE = {10: "0", 11: "10", 12: "111111111", dfloat11.END: "110"}
UNITS = {
    "plain": gaussian(5000, 1),
    "single_weight": with_exponents([127]),
    "two": shuffled({120: 40, 121: 3}),
    "zeros": shuffled({0: 900, 1: 20, 2: 5}),
    "all_240": shuffled({exponent: 20 + exponent % 7 for exponent in range(240)}),
    "deep": shuffled(fibonacci(17)),
}


def arrays(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All tensors of the containers at a path."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*.df11")):
        with df11.open(file) as container:
            for name in container.keys():
                info = container.info(name)
                found[name] = (info.dtype, info.shape, container.tensor(name).tobytes())
    return found


def as_original(folder: Path, tensors: list[Tensor]) -> Path:
    return sources.write(folder / "original.safetensors", tensors)


@pytest.mark.parametrize("threads", [32, 128, 512, 1024])
@pytest.mark.parametrize("end", [True, False])
def test_units_of_one_layer(threads, end, tmp_path):
    stored, original = [], []
    for name, weights in UNITS.items():
        if end and name == "single_weight":
            continue
        stored += dfloat11.tensors(name, dfloat11.encode([weights], threads, end=end))
        original.append(Tensor(f"{name}.weight", "BF16", (1, len(weights)), weights.tobytes()))
    stored.append(bf16("norm", (7,)))
    path = dfloat11.write(
        tmp_path / "in", {"model.safetensors": stored}, dfloat11.config(dict.fromkeys(UNITS, ()), threads)
    )
    df11.convert(path, tmp_path / "out", shapes=as_original(tmp_path, original))
    found = arrays(tmp_path / "out")
    assert found == {one.name: (one.dtype, one.shape, one.data) for one in [*original, stored[-1]]}


@pytest.mark.parametrize(
    "weights",
    [
        with_exponents([10] * 32767 + [12]),  # The last code runs into a new block, and ends with a byte.
        with_exponents([10] * 319 + [12]),  # Into a new thread.
        with_exponents([10] * 32768),  # A whole block.
        with_exponents([10] * 32769),
        with_exponents([10] * 32765 + [12]),
    ],
    ids=len,
)
@pytest.mark.parametrize("end", [True, False])
def test_the_end_of_a_unit(weights, end, tmp_path):
    parts = dfloat11.encode([weights], codes=NINE, end=end)
    files = {"model.safetensors": dfloat11.tensors("a", parts)}
    path = dfloat11.write(tmp_path / "in", files, dfloat11.config({"a": []}))
    tensor = Tensor("a.weight", "BF16", (len(weights), 1), weights.tobytes())
    df11.convert(path, tmp_path / "out", shapes=as_original(tmp_path, [tensor]))
    assert arrays(tmp_path / "out") == {"a.weight": ("BF16", tensor.shape, tensor.data)}


def test_codes_of_up_to_32_bits(tmp_path):
    weights = with_exponents(RNG.integers(0, 32, 3000))
    parts = dfloat11.encode([weights], 32, codes=LONG)
    path = dfloat11.write(
        tmp_path / "in", {"a.safetensors": dfloat11.tensors("a", parts)}, dfloat11.config({"a": []}, 32)
    )
    tensor = Tensor("a.weight", "BF16", (1000, 3), weights.tobytes())
    df11.convert(path, tmp_path / "out", shapes=as_original(tmp_path, [tensor]))
    assert arrays(tmp_path / "out") == {"a.weight": ("BF16", (1000, 3), tensor.data)}


BLOCK = ["attn.to_q", "mlp"]
Q, MLP, EMBED = gaussian(40 * 30, 1), gaussian(64 * 30, 2), gaussian(50 * 30, 3)


def block_files() -> dict[str, list[Tensor]]:
    unit = dfloat11.tensors("layers.3", dfloat11.encode([Q, MLP]))
    embed = dfloat11.tensors("embed", dfloat11.encode([EMBED]))
    biases = [bf16("layers.3.attn.to_q.bias", (40,)), bf16("layers.3.mlp.bias", (64,)), sources.f32("norm", (3, 5))]
    return {"layers_3.safetensors": [*unit, *biases[:2]], "model.safetensors": [*embed, biases[2]]}


PATTERNS = {r"layers.\d+": BLOCK, "emb(e|x)d": []}
WANTED = {
    "layers.3.attn.to_q.weight": ("BF16", (40, 30), Q.tobytes()),
    "layers.3.mlp.weight": ("BF16", (64, 30), MLP.tobytes()),
    "embed.weight": ("BF16", (50, 30), EMBED.tobytes()),
}


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """A checkpoint with a unit of two layers in a file of its own; biases, and a config for the rest."""
    document = dfloat11.config(PATTERNS, _class_name="X", a=[1, {"b": None}])
    return dfloat11.write(tmp_path / "in", block_files(), document)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    plain = [one for file in block_files().values() for one in file if one.name.endswith(("bias", "norm"))]
    tensors = [Tensor(name, *rest) for name, rest in WANTED.items()]
    return sources.write(tmp_path / "original" / "model.safetensors", [*tensors, *plain])


def test_a_model_folder(block, original, tmp_path):
    result = commands.run("convert", block, tmp_path / "out", "--shapes", original).fine()
    assert "1 files" in result.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "df11-manifest.parquet",
        "diffusion_pytorch_model.df11",
    ]
    found = arrays(tmp_path / "out")
    assert {name: found[name] for name in WANTED} == WANTED
    assert found.keys() - WANTED.keys() == {"layers.3.attn.to_q.bias", "layers.3.mlp.bias", "norm"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"_class_name": "X", "a": [1, {"b": None}]}
    commands.run("verify", tmp_path / "out").fine()


def test_where_it_came_from_is_named(block, original, tmp_path):
    df11.convert(block, tmp_path / "out", shapes=original)
    files = {path.name: sources.sha256(path) for path in block.glob("*.safetensors")}
    (row,) = parquet.read(tmp_path / "out").files
    assert {one.file: one.sha256 for one in row.made_from} == files
    with df11.open(tmp_path / "out" / row.file) as container:
        assert container.made_from == row.made_from
        assert container.source.sha256 == row.source_sha256
    out = commands.run("inspect", tmp_path / "out").fine().out
    assert all(sha256 in out for sha256 in files.values())
    restored = tmp_path / "restored"
    df11.restore(tmp_path / "out", restored)
    assert sources.sha256(restored / row.source_file) == row.source_sha256
    assert {**dfloat11.read_file(restored / row.source_file)}.items() >= WANTED.items()


def test_what_is_finished_is_kept_until_a_file_changes(block, original, tmp_path):
    options = {"shapes": original}
    assert [file.status for file in df11.convert(block, tmp_path / "out", **options).files] == ["converted"]
    assert [file.status for file in df11.convert(block, tmp_path / "out", **options).files] == ["skipped"]
    files = block_files()
    files["model.safetensors"][-1] = sources.f32("norm", (3, 5), seed=9)
    sources.write(block / "model.safetensors", files["model.safetensors"])
    assert [file.status for file in df11.convert(block, tmp_path / "out", **options).files] == ["converted"]
    assert arrays(tmp_path / "out")["norm"][2] == files["model.safetensors"][-1].data


def test_its_tensors_may_lie_anywhere(block, original, tmp_path):
    tensors = [one for file in block_files().values() for one in file]
    files = {f"part{number}.safetensors": tensors[number::3] for number in range(3)}
    scattered = dfloat11.write(tmp_path / "scattered", files, dfloat11.config(PATTERNS, _class_name="X"))
    (scattered / "model.safetensors.index.json").write_text('{"weight_map": {"x": "nothing.safetensors"}}')
    df11.convert(block, tmp_path / "a", shapes=original)
    df11.convert(scattered, tmp_path / "b", shapes=original)
    assert arrays(tmp_path / "a") == arrays(tmp_path / "b")


def test_large_models_become_shards_with_an_index(block, original, tmp_path, monkeypatch):
    monkeypatch.setattr("df11.converter.dfloat11.recognise.SHARD_BYTES", 5000)
    df11.convert(block, tmp_path / "out", shapes=original)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.df11.index.json").read_text())
    found = arrays(tmp_path / "out")
    assert index["weight_map"].keys() == found.keys()
    for name, file in index["weight_map"].items():
        assert name in arrays(tmp_path / "out" / file)
    assert {name: found[name] for name in WANTED} == WANTED
    assert len({*index["weight_map"].values()}) == 3


def test_a_tree_of_models(block, original, tmp_path):
    tree = tmp_path / "tree"
    (tree / "vae").mkdir(parents=True)
    block.rename(tree / "transformer")
    sources.write(tree / "vae" / "model.safetensors", [bf16("x", (9, 9))])
    (tree / "model_index.json").write_text("{}")
    originals = tmp_path / "originals"
    originals.mkdir()
    original.parent.rename(originals / "transformer")
    df11.convert(tree, tmp_path / "out", shapes=originals)
    assert {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == {
        "df11-manifest.parquet",
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.df11",
        "vae/model.df11",
    }
    assert arrays(tmp_path / "out" / "transformer").items() >= WANTED.items()


# A single file.


def test_a_single_file(original, tmp_path):
    one = [tensor for file in block_files().values() for tensor in file]
    with_config = dfloat11.write(tmp_path / "one", {"m.safetensors": one}, dfloat11.config(PATTERNS)) / "m.safetensors"
    df11.convert(with_config, tmp_path / "x.df11", shapes=original)
    assert arrays(tmp_path / "x.df11").items() >= WANTED.items()
    alone = sources.write(tmp_path / "alone.safetensors", one)
    commands.run("convert", alone, tmp_path / "y.df11").error(
        2, "'layers.3'", "no model is known", "config.json beside"
    )


def test_a_single_file_of_a_known_model(tmp_path):
    parts = ["img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0"]
    parts.append("txt_mlp.2")
    weights = {part: gaussian(12 * (place + 1), place) for place, part in enumerate(parts)}
    unit = dfloat11.tensors("double_blocks.0", dfloat11.encode(list(weights.values())))
    biases = [bf16(f"double_blocks.0.{part}.bias", (12,)) for part in parts]
    path = sources.write(tmp_path / "chroma.safetensors", [*unit, *biases])
    df11.convert(path, tmp_path / "chroma.df11")
    found = arrays(tmp_path / "chroma.df11")
    for place, part in enumerate(parts):
        assert found[f"double_blocks.0.{part}.weight"][1:] == ((12, place + 1), weights[part].tobytes())


# Shapes.


def decoder_files() -> dict[str, list[Tensor]]:
    hidden, inner = 16, 24
    sizes = {"q": hidden * hidden, "k": 8 * hidden, "v": 8 * hidden, "o": hidden * hidden}
    sizes |= {"gate": inner * hidden, "up": inner * hidden, "down": inner * hidden}
    layer = [gaussian(size, place) for place, size in enumerate(sizes.values())]
    embed = gaussian(40 * hidden, 99)
    return {
        "model.safetensors": [
            *dfloat11.tensors("model.layers.0", dfloat11.encode(layer)),
            *dfloat11.tensors("model.embed_tokens", dfloat11.encode([embed])),
            *dfloat11.tensors("lm_head", dfloat11.encode([embed])),
            bf16("model.norm.weight", (hidden,)),
        ]
    }


DECODER = {
    r"model\.layers\.\d+": [
        *(f"self_attn.{one}_proj" for one in "qkvo"),
        *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
    ],
    r"model\.embed_tokens": [],
    "lm_head": [],
}


@pytest.mark.parametrize(
    "more", [{"hidden_size": 16}, {"text_config": {"hidden_size": 16}, "hidden_size": 99}], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_by_config_and_tied_copies_once(more, tied, tmp_path):
    document = dfloat11.config(DECODER, tie_word_embeddings=tied, **more)
    path = dfloat11.write(tmp_path / "in", decoder_files(), document)
    df11.convert(path, tmp_path / "out")
    shapes = {name: shape for name, (_, shape, _) in arrays(tmp_path / "out").items()}
    assert shapes == {
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.self_attn.k_proj.weight": (8, 16),
        "model.layers.0.self_attn.v_proj.weight": (8, 16),
        "model.layers.0.self_attn.o_proj.weight": (16, 16),
        "model.layers.0.mlp.gate_proj.weight": (24, 16),
        "model.layers.0.mlp.up_proj.weight": (24, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 24),
        "model.embed_tokens.weight": (40, 16),
        "model.norm.weight": (16,),
    } | ({} if tied else {"lm_head.weight": (40, 16)})


def test_shapes_by_norms(tmp_path):
    files = decoder_files()
    files["model.safetensors"].append(bf16("model.layers.0.input_layernorm.weight", (16,)))
    mlp = [gaussian(12 * 12, 1), gaussian(5 * 12, 2)]
    files["v.safetensors"] = dfloat11.tensors("visual.merger.mlp", dfloat11.encode(mlp))
    files["v.safetensors"].append(bf16("visual.merger.mlp.0.bias", (12,)))
    patterns = DECODER | {r"visual\.merger\.mlp": ["0", "2"]}
    df11.convert(dfloat11.write(tmp_path / "in", files, dfloat11.config(patterns, hidden_size=8)), tmp_path / "out")
    shapes = {name: shape for name, (_, shape, _) in arrays(tmp_path / "out").items()}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (16, 24)
    assert shapes["lm_head.weight"] == (40, 16)
    assert shapes["visual.merger.mlp.2.weight"] == (5, 12)


def test_weights_that_should_be_tied_but_differ_are_kept(tmp_path):
    files = decoder_files()
    signs = next(place for place, one in enumerate(files["model.safetensors"]) if one.name == "lm_head.sign_mantissa")
    old = files["model.safetensors"][signs]
    files["model.safetensors"][signs] = Tensor(old.name, "U8", old.shape, old.data[:-1] + bytes([old.data[-1] ^ 1]))
    path = dfloat11.write(tmp_path / "in", files, dfloat11.config(DECODER, tie_word_embeddings=True, hidden_size=16))
    df11.convert(path, tmp_path / "out")
    found = arrays(tmp_path / "out")
    assert found["lm_head.weight"][2] != found["model.embed_tokens.weight"][2]


def test_without_a_shape_there_is_one_line(block, tmp_path):
    commands.run("convert", block, tmp_path / "out").error(2, "'embed'", "'embed.weight'", "--shapes")
    plain = sources.write(tmp_path / "x.safetensors", [bf16("x", (9, 9))])
    commands.run("convert", plain, tmp_path / "y.df11", "--shapes", plain).error(2, "--shapes is for DFloat11")


@pytest.mark.parametrize("shape", [(40, 29), (30, 40), (41, 30)])
def test_shapes_that_do_not_fit(shape, block, tmp_path):
    wrong = [
        bf16("layers.3.attn.to_q.weight", shape),
        bf16("layers.3.mlp.weight", (64, 30)),
        bf16("embed.weight", (50, 30)),
    ]
    path = sources.write(tmp_path / "wrong.safetensors", wrong)
    commands.run("convert", block, tmp_path / "out", "--shapes", path).error(2, "the shape of", "does not fit")


# Reading in any order.


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_part_of_a_made_file_can_be_read(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "parts"
    if not folder.exists():
        weights = gaussian(9000, 4)
        unit = dfloat11.tensors("layers.3", dfloat11.encode([weights[:4000], weights[4000:]], 32))
        biases = [
            bf16("layers.3.attn.to_q.bias", (40,)),
            bf16("layers.3.mlp.bias", (50,)),
            sources.random_tensor("u", "U8", (3,)),
        ]
        dfloat11.write(folder, {"model.safetensors": [*unit, *biases]}, dfloat11.config(PATTERNS, 32))
    store = decoded(open_source(folder))
    (entry,) = (one for one in store.list() if one.name.endswith(".safetensors"))
    with store.open(entry) as file:
        whole = np.empty(file.size, np.uint8)
        file.read(0, whole)
        if data.draw(st.booleans()):
            file.expect(0)
        for _ in range(data.draw(st.integers(1, 8))):
            start = data.draw(st.integers(0, file.size))
            size = data.draw(st.integers(0, min(file.size - start, 3000)))
            out = np.empty(size, np.uint8)
            file.read(start, out)
            assert np.array_equal(out, whole[start : start + size])


def test_a_checkpoint_that_changes_meanwhile(block, original, tmp_path, monkeypatch):
    from df11.converter.dfloat11 import imported

    real = imported._UnitReader.read
    calls: list[int] = []

    def read(self, first, out):
        calls.append(first)
        if len(calls) == 4:
            (block / "model.safetensors").touch()
        real(self, first, out)

    monkeypatch.setattr(imported._UnitReader, "read", read)
    with pytest.raises(errors.ConflictError, match="changed while"):
        df11.convert(block, tmp_path / "out", shapes=original)
    assert not list((tmp_path / "out").glob("*.df11"))


def test_it_can_be_compared_with_the_checkpoint_itself(block, original, tmp_path):
    df11.convert(block, tmp_path / "out", shapes=original)
    assert df11.verify(tmp_path / "out", block).compared
    files = block_files()
    unit = dfloat11.tensors("layers.3", dfloat11.encode([Q, gaussian(64 * 30, 8)]))
    sources.write(block / "layers_3.safetensors", [*unit, *files["layers_3.safetensors"][-2:]])
    with pytest.raises(errors.DifferenceError):
        df11.verify(tmp_path / "out", block)


def test_a_file_of_several_shards_is_hashed_once(block, original, tmp_path, monkeypatch):
    from df11.converter.dfloat11 import imported

    calls: list[str] = []
    real = imported._Window.hashed
    monkeypatch.setattr(imported._Window, "hashed", lambda self: (calls.append(self._entry.name), real(self))[1])
    monkeypatch.setattr("df11.converter.dfloat11.recognise.SHARD_BYTES", 5000)
    df11.convert(block, tmp_path / "out", shapes=original)
    assert sorted(calls) == ["layers_3.safetensors", "model.safetensors"]


# What is there already, and what changes meanwhile.


def test_a_container_without_a_manifest_is_proved(block, original, tmp_path):
    df11.convert(block, tmp_path / "out", shapes=original)
    manifest = tmp_path / "out" / "df11-manifest.parquet"
    rows = parquet.read(manifest).files
    manifest.unlink()
    before = (tmp_path / "out" / rows[0].file).stat()
    df11.convert(block, tmp_path / "out", shapes=original)
    assert (tmp_path / "out" / rows[0].file).stat().st_ino == before.st_ino
    assert parquet.read(manifest).files == rows


def test_what_a_container_says_of_itself_is_no_proof(block, original, tmp_path, monkeypatch):
    from df11.converter.dfloat11 import imported

    forged = dfloat11.write(tmp_path / "forged", block_files(), dfloat11.config(PATTERNS, _class_name="X"))
    norm = sources.f32("norm", (3, 5), seed=9)
    sources.write(forged / "model.safetensors", [*block_files()["model.safetensors"][:-1], norm])
    mine = tuple(entry for entry in map(LocalStore(block).hashed, LocalStore(block).list()) if "safe" in entry.name)
    with monkeypatch.context() as patch:
        patch.setattr(imported.ImportedFile, "hashed_sources", lambda _: mine)
        df11.convert(forged, tmp_path / "out", shapes=original)
    (tmp_path / "out" / "df11-manifest.parquet").unlink()
    with pytest.raises(errors.UsageError, match="--force"):
        df11.convert(block, tmp_path / "out", shapes=original)
    df11.convert(block, tmp_path / "out", shapes=original, force=True)
    assert arrays(tmp_path / "out")["norm"][2] == block_files()["model.safetensors"][-1].data != norm.data


def test_a_run_that_did_not_end_is_named_by_the_folder(block, original, tmp_path, monkeypatch):
    from df11.converter import work

    real, calls = work.convert_file, []

    def convert_file(*args):
        calls.append(args)
        if len(calls) == 2:
            raise errors.DifferenceError("enough")
        return real(*args)

    monkeypatch.setattr("df11.converter.dfloat11.recognise.SHARD_BYTES", 5000)
    monkeypatch.setattr(work, "convert_file", convert_file)
    with pytest.raises(errors.DifferenceError, match="enough"):
        df11.convert(block, tmp_path / "out", shapes=original)
    (made,) = (tmp_path / "out").glob("*.df11")
    inode = made.stat().st_ino
    other = block.rename(tmp_path / "other")
    with pytest.raises(errors.ConflictError, match=f"has not ended here: convert of '?{block}"):
        df11.convert(other, tmp_path / "out", shapes=original)
    other.rename(block)
    df11.convert(block, tmp_path / "out", shapes=original)
    assert made.stat().st_ino == inode
    assert len(calls) == 4
    assert arrays(tmp_path / "out").items() >= WANTED.items()


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_a_link_that_comes_after_the_list_is_not_followed(name, block, original, tmp_path):
    (block / "notes.txt").write_text("x")
    store = decoded(open_source(block), shapes=original)
    entries = store.list()
    (block / name).rename(tmp_path / "elsewhere")
    (block / name).symlink_to(tmp_path / "elsewhere")
    assert store.find([entry.name for entry in entries]).keys() == {entry.name for entry in entries}
    made = next(entry for entry in entries if entry.name.endswith(".txt" if "txt" in name else ".safetensors"))
    with pytest.raises(errors.ConflictError, match="after it was listed"), store.open(made) as file:
        file.read(0, np.empty(file.size, np.uint8))
    store.list()
    assert {*store.refused} == {name}


def test_a_tree_is_compared_with_its_original(block, original, tmp_path):
    tree, originals = tmp_path / "tree", tmp_path / "originals"
    tree.mkdir()
    originals.mkdir()
    block.rename(tree / "transformer")
    original.parent.rename(originals / "transformer")
    for folder in (tree, originals):
        sources.write(folder / "vae" / "model.safetensors", [bf16("x", (9, 9))])
    df11.convert(tree, tmp_path / "out", shapes=originals)
    assert df11.verify(tmp_path / "out", originals).compared
    sources.write(originals / "text_encoder" / "model.safetensors", [bf16("y", (9, 9))])
    with pytest.raises(errors.MissingError, match="the source has text_encoder"):
        df11.verify(tmp_path / "out", originals)
    (tmp_path / "out" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(errors.DifferenceError, match="not the file that df11 wrote"):
        df11.verify(tmp_path / "out")


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_original_that_has_more(is_whole, block, original, tmp_path):
    (tmp_path / "tree").mkdir()
    block.rename(tmp_path / "tree" / "transformer")
    df11.convert(tmp_path / "tree", tmp_path / "out", shapes=original.parent)
    assert df11.verify(tmp_path / "out", original.parent).compared
    assert df11.verify(tmp_path / "out", original).compared
    container = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.df11"
    assert df11.verify(container, original.parent).compared
    originals = tmp_path / "originals"
    originals.mkdir()
    original.parent.rename(originals / "transformer")
    if is_whole:
        assert df11.verify(tmp_path / "out", originals).compared
    else:
        sources.write(originals / "vae" / "model.safetensors", [bf16("x", (9, 9))])
        with pytest.raises(errors.MissingError, match=r"the source has vae/model\.safetensors"):
            df11.verify(tmp_path / "out", originals)
