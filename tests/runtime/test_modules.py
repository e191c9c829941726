"""Models whose weights stay compressed: outputs equal to the bit, whatever is done to the modules, or a clear error."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import df11
from df11 import runtime
from df11.formats import errors
from df11.runtime import modules, operators, weight_operations
from df11.runtime.model import MismatchError, files_of
from df11.runtime.weight import CompressedWeight, FrozenWeightError


class Block(nn.Module):
    """Linear layers with and without bias, a norm, and a weight that its owner uses directly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(256)
        self.up = nn.Linear(256, 1024)
        self.down = nn.Linear(1024, 256, bias=False)
        self.mix = nn.Parameter(torch.zeros(256, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) @ self.mix


class Model(nn.Module):
    """An embedding to which the output layer is tied, blocks, a convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, 256)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.convolution = nn.Conv1d(256, 256, 3, padding=1)
        self.head = nn.Linear(256, 400, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.convolution(x.transpose(1, 2)).transpose(1, 2)) * self.scale


IDS = torch.tensor([[1, 5, 399], [7, 0, 5]])


@pytest.fixture(scope="module")
def original() -> Model:
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(original: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return convert(
        {name: value for name, value in original.state_dict().items() if name != "head.weight"}, folder / "model.df11"
    )


def convert(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path.with_suffix(".safetensors"))
    df11.convert(path.with_suffix(".safetensors"), path)
    return path


def empty() -> Model:
    with torch.device("meta"):
        return Model().to(torch.bfloat16).eval()


@pytest.fixture
def model(path: Path) -> Model:
    return runtime.load_model(empty(), path, "cpu")


# The same outputs.


def test_outputs_are_the_same(model: Model, original: Model) -> None:
    assert torch.equal(model(IDS), original(IDS))
    compressed = [name for name, _ in modules.compressed_modules(model)]
    assert compressed == [
        "embed",
        "blocks.0",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1",
        "blocks.1.up",
        "blocks.1.down",
        "convolution",
        "head",
    ]
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_has_weights_already(path: Path, original: Model) -> None:
    model = runtime.load_model(Model().to(torch.bfloat16), path, "cpu")
    assert torch.equal(model(IDS), original(IDS))


def test_tied_weights_are_stored_once(model: Model) -> None:
    assert isinstance(model.embed.weight, CompressedWeight)
    assert model.embed.weight is model.head.weight
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))


def test_large_layers_are_decoded_in_slices(model: Model, original: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    rows = operators.decode_rows

    def counting(*arguments: Any) -> torch.Tensor:
        found: torch.Tensor = rows(*arguments)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(weight_operations, "SLICE_WEIGHTS", 40_000)
    monkeypatch.setattr(operators, "decode_rows", counting)
    x = torch.randn(5, 256).to(torch.bfloat16)
    for layer, expected in ((model.head, original.head), (model.blocks[0].up, original.blocks[0].up)):
        sizes.clear()
        assert torch.equal(layer(x), expected(x))
        assert max(sizes) <= 40_000
        assert sum(sizes) == expected.weight.numel()


def test_in_two_threads(model: Model, original: Model) -> None:
    expected, found = original(IDS), []

    def run() -> None:
        with torch.inference_mode():
            found.extend(model(IDS) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert all(torch.equal(one, expected) for one in found)


def test_a_part_that_is_called_alone(model: Model, original: Model) -> None:
    # As TeaCache does, which reaches into the first block.
    x = torch.randn(2, 256).to(torch.bfloat16)
    assert torch.equal(model.blocks[0].norm(x), original.blocks[0].norm(x))
    assert torch.equal(model.blocks[1].up(x), original.blocks[1].up(x))


def test_gradients_of_inputs(model: Model, original: Model) -> None:
    gradients = []
    for one in (model, original):
        x = torch.full((2, 256), 0.5, dtype=torch.bfloat16, requires_grad=True)
        one.blocks[0](x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_compiled(model: Model, original: Model) -> None:
    layer = torch.compile(model.blocks[0].up, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 256).to(torch.bfloat16)
    assert torch.equal(layer(x), original.blocks[0].up(x))


# What users do with modules.


def test_copies(model: Model, original: Model) -> None:
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS), original(IDS))
        assert copied.embed.weight is copied.head.weight
        assert copied.embed.weight is not model.embed.weight
        assert isinstance(copied.embed.weight, CompressedWeight)


def test_state_dict(model: Model, original: Model) -> None:
    state = model.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    assert model.load_state_dict(state) == model.load_state_dict(original.state_dict())  # No change.
    other = Model().to(torch.bfloat16)
    other.load_state_dict(state)
    assert type(other.embed.weight) is nn.Parameter
    assert torch.equal(other(IDS), original(IDS))
    third = empty()
    third.load_state_dict(state, assign=True)
    assert isinstance(third.embed.weight, CompressedWeight)
    assert torch.equal(third(IDS), original(IDS))


def test_weight_reads_as_the_original(model: Model, original: Model) -> None:
    weight, expected = model.blocks[0].up.weight, original.blocks[0].up.weight
    assert torch.equal(weight, expected)
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, expected.dtype, expected.device)
    assert type(weight + 1) is torch.Tensor
    assert torch.equal(weight.float().sum(0), expected.float().sum(0))
    assert torch.equal(weight[3:5].clone(), expected[3:5])
    assert repr(weight) == (
        f"CompressedWeight(shape=(1024, 256), dtype=torch.bfloat16, device=cpu, record={weight.record.numel():,} bytes)"
    )


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "add_": lambda layer: layer.weight.add_(1),
    "data": lambda layer: layer.weight.data.add_(1),
    "data is set": lambda layer: setattr(layer.weight, "data", torch.zeros(1024, 256)),
    "data +=": lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
    "detached": lambda layer: layer.weight.detach().mul_(2),
    "a view": lambda layer: layer.weight.t()[3].zero_(),
    "an item": lambda layer: layer.weight.__setitem__(0, 1),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(1024, 256)),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "out": lambda layer: torch.add(torch.zeros(1024, 256), 1, out=layer.weight),
    "state dict": lambda layer: layer.load_state_dict({"weight": torch.zeros(1024, 256)}, strict=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_refused(change: str, model: Model, original: Model) -> None:
    with pytest.raises((FrozenWeightError, RuntimeError), match="materialize"):
        CHANGES[change](model.blocks[0].up)
    assert torch.equal(model(IDS), original(IDS))


@pytest.mark.parametrize("change", CHANGES)
def test_and_work_after_materializing(change: str, model: Model) -> None:
    layer = runtime.materialize(model).blocks[0].up
    layer.float().requires_grad_(False)
    CHANGES[change](layer)


def test_materialize(model: Model, original: Model) -> None:
    assert runtime.materialize(model) is model
    assert torch.equal(model(IDS), original(IDS))
    assert model.state_dict().keys() == original.state_dict().keys()
    assert model.head.weight is model.embed.weight
    assert type(model.blocks[0].up) is nn.Linear
    assert not list(modules.compressed_modules(model))
    assert not modules.is_compressed(model)


def test_report(model: Model, original: Model) -> None:
    report = runtime.memory_report(model)
    unique = {id(value): value for value in [*original.parameters(), *original.buffers()]}
    assert report.bf16 == sum(value.numel() * value.element_size() for value in unique.values())
    assert 0.6 < (report.compressed + report.verbatim) / report.bf16 < 0.72
    assert report.scratch == 2 * 1024 * 256
    assert "scratch 524,288" in str(report)


# What does not fit.


def test_mismatches_are_listed(path: Path) -> None:
    model = empty()
    model.more = nn.Linear(3, 3).to(torch.bfloat16)
    del model.convolution
    model.blocks[0].up = nn.Linear(256, 512).to(torch.bfloat16)
    before = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(MismatchError) as caught:
        runtime.load_model(model, path, "cpu")
    text = str(caught.value)
    assert "not in the container: more.weight, more.bias" in text
    assert "not in the model: convolution." in text
    assert "blocks.0.up.weight (1024, 256) in the container, (512, 256) in the model" in text
    assert {name: id(value) for name, value in model.named_parameters()} == before
    with torch.device("meta"):
        wide = Model()
    with pytest.raises(
        MismatchError, match=r"dtypes differ.*BF16 in the container, torch.float32 in the model.*bfloat16\) first"
    ):
        runtime.load_model(wide, path, "cpu")


def test_renaming(original: Model, tmp_path: Path) -> None:
    other = convert(
        {f"old.{name}": value for name, value in original.state_dict().items() if name != "head.weight"},
        tmp_path / "x.df11",
    )
    model = runtime.load_model(empty(), other, "cpu", rename=lambda name: name.removeprefix("old."))
    assert torch.equal(model(IDS), original(IDS))
    with pytest.raises(MismatchError, match="two tensors have the name"):
        runtime.load_model(empty(), other, "cpu", rename=lambda _: "embed.weight")


def test_a_weight_on_the_meta_device(model: Model) -> None:
    model.to("meta")
    assert type(model.blocks[0].up.weight) is nn.Parameter
    with pytest.raises(RuntimeError, match="meta"):
        model.blocks[0].up(torch.zeros(1, 256, dtype=torch.bfloat16))


def test_folders(original: Model, tmp_path: Path) -> None:
    state = {name: value for name, value in original.state_dict().items() if name != "head.weight"}
    names = sorted(state)
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.df11"
        convert({name: state[name] for name in names[i::2]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    assert len(files_of(tmp_path)) == 2
    (tmp_path / "model.df11.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(runtime.load_model(empty(), tmp_path, "cpu")(IDS), original(IDS))
    (tmp_path / "model-00002-of-00002.df11").unlink()
    with pytest.raises(errors.MissingError, match=r"1 of 2 shards are missing: model-00002-of-00002\.df11"):
        runtime.load_model(empty(), tmp_path, "cpu")
    (tmp_path / "model.df11.index.json").write_text(json.dumps({"weight_map": {"a": "../x.df11"}}))
    with pytest.raises(errors.FormatError, match="another folder"):
        files_of(tmp_path)
    (tmp_path / "model.df11.index.json").write_text("[]")
    with pytest.raises(errors.FormatError, match="not a shard index"):
        files_of(tmp_path)
    with pytest.raises(errors.MissingError, match=r"no \.df11 file"):
        files_of(Path(__file__).parent)


def test_damage(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-70_000] ^= 1
    (tmp_path / "bad.df11").write_bytes(data)
    with pytest.raises(errors.ChecksumError, match=r"bad\.df11, tensor "):
        runtime.load_model(empty(), tmp_path / "bad.df11", "cpu")


# Prefetching, and records elsewhere.


class Immediate:
    """Streams of a device that does everything immediately, like the CPU."""

    def usable(self) -> bool:
        return True

    def current(self) -> None:
        return None

    @contextmanager
    def side(self) -> Iterator[None]:
        yield

    def event(self) -> Any:
        return SimpleNamespace(record=lambda _stream: None, wait=lambda _stream: None)


def test_decoding_ahead(model: Model, original: Model) -> None:
    prefetcher = modules.enable_prefetch(model, torch.device("cpu"), Immediate())
    for _ in range(3):
        assert torch.equal(model(IDS), original(IDS))
    assert (prefetcher.hits, prefetcher.misses) == (
        9,
        6,
    )  # Five layers; the step back to the first is learnt in the second pass.
    assert runtime.memory_report(model).scratch == prefetcher.scratch == 2 * 2 * 1024 * 256
    # Out of order, skipped, with gradients, compiled: decoded on demand.
    x = torch.randn(2, 256).to(torch.bfloat16)
    for block, expected in ((model.blocks[1], original.blocks[1]), (model.blocks[0], original.blocks[0])):
        assert torch.equal(block(x), expected(x))
    y = x.clone().requires_grad_()
    model.blocks[0](y).sum().backward()
    z = x.clone().requires_grad_()
    original.blocks[0](z).sum().backward()
    assert torch.equal(y.grad, z.grad)  # type: ignore[arg-type]
    compiled = torch.compile(model.blocks[0].up, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), original.blocks[0].up(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), original(IDS))
    modules.disable_prefetch(model)
    before = prefetcher.hits + prefetcher.misses
    assert torch.equal(model(IDS), original(IDS))
    assert prefetcher.hits + prefetcher.misses == before
    assert runtime.memory_report(model).scratch == 2 * 1024 * 256


def test_decoding_ahead_in_inference_mode(model: Model, original: Model) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(model)  # as moving it to a GPU would, this makes tensors that count no writes
        prefetcher = modules.enable_prefetch(model, torch.device("cpu"), Immediate())
        for _ in range(3):
            assert torch.equal(model(IDS), original(IDS))
    assert prefetcher.hits > prefetcher.misses


def test_records_elsewhere(path: Path, original: Model) -> None:
    model = runtime.load_model(empty(), path, "cpu", cpu_offload=True)
    assert torch.equal(model(IDS), original(IDS))
    assert model.embed.weight is model.head.weight
    assert torch.equal(runtime.materialize(model)(IDS), original(IDS))


# Found by trying to break it.


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256)
        self.register_buffer("table", torch.randn(512, 256))
        self.register_buffer("other", torch.ones(3), persistent=False)


def test_a_large_buffer_is_decoded(tmp_path: Path) -> None:
    original = WithBuffers().to(torch.bfloat16)
    path = convert(original.state_dict(), tmp_path / "b.df11")
    with torch.device("meta"):
        lost = WithBuffers().to(torch.bfloat16)
    with pytest.raises(MismatchError, match="not stored are on the meta device: other"):
        runtime.load_model(lost, path, "cpu")
    model = runtime.load_model(WithBuffers().to(torch.bfloat16), path, "cpu")
    assert torch.equal(model.table, original.table)
    assert isinstance(model.layer.weight, CompressedWeight)
    assert type(model.table) is torch.Tensor


def test_casts_are_refused(model: Model) -> None:
    for cast in (model.half, model.float, lambda: model.to(torch.float16)):
        with pytest.raises(FrozenWeightError, match="materialize"):
            cast()
    assert model.blocks[0].up.to("cpu") is model.blocks[0].up


def test_a_model_that_is_compressed_already(model: Model, path: Path) -> None:
    with pytest.raises(errors.UsageError, match="compressed already"):
        runtime.load_model(model, path, "cpu")


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ("[" * 10_000, "nested too deeply"),
        ("{}", "not a shard index"),
        ('{"weight_map": {}}', "not a shard index"),
        ('{"weight_map": {"a": null}}', "not a shard index"),
        ('{"weight_map": {"a": "/x.df11"}}', "another folder"),
        (json.dumps({"weight_map": {"a": "x" * 300 + ".df11"}}), r"shards are missing|name too long"),
    ],
)
def test_indexes_of_all_kinds(index: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "model.df11.index.json").write_text(index)
    with pytest.raises(errors.Df11Error, match=f"(?i){what}") as caught:
        files_of(tmp_path)
    assert len(str(caught.value)) < 600


def test_paths_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "folder.df11.index.json").mkdir()
    os.mkfifo(tmp_path / "pipe.df11")
    for path in ("a" * 300, "x\0y", tmp_path / "pipe.df11", tmp_path / "none", tmp_path):
        with pytest.raises(errors.Df11Error) as caught:
            runtime.load_model(empty(), path, "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(errors.UsageError, match="a folder, not a file"):
        runtime.load_file(tmp_path, "cpu")
    with pytest.raises(errors.DeviceError, match="no such device"):
        runtime.load_file(tmp_path / "pipe.df11", "gpu")
