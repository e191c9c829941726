"""The vLLM plugin against stand-ins for vLLM (tests/support/vllm_stand_in.py): what it keeps, computes and refuses.

vLLM is too large for this environment. examples/vllm/README.md says which versions were tried."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import df11
from df11.formats import errors
from tests.support import vllm_stand_in
from tests.support.vllm_stand_in import REGISTERED, LinearBase, RoutedExperts, UnquantizedLinearMethod

FOLDER = Path(__file__).parents[2] / "examples" / "vllm"
HIDDEN, HEADS, INNER, EXPERTS = 256, 64, 512, 4


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        for name, values in vllm_stand_in.MODULES.items():
            module = ModuleType(name)
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("df11_vllm", FOLDER / "df11_vllm.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "df11_vllm", made)
        spec.loader.exec_module(made)
        yield made


# A model as written in vLLM.

FUSED = {
    "q_proj": ("qkv", "q"),
    "k_proj": ("qkv", "k"),
    "v_proj": ("qkv", "v"),
    "gate_proj": ("gate_up", 0),
    "up_proj": ("gate_up", 1),
}


class Model(nn.Module):
    def __init__(self, config: Any = None, *, dtype: torch.dtype = torch.bfloat16, **options: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, HIDDEN, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)
        qkv = {"q": 4 * HEADS, "k": HIDDEN, "v": HIDDEN}
        self.qkv = LinearBase(config, HIDDEN, qkv, bias=True, **options)
        self.gate_up = LinearBase(config, HIDDEN, {0: INNER, 1: INNER}, **options)
        self.down = LinearBase(config, INNER, {None: HIDDEN}, by_columns=True, dtype=dtype, **options)
        self.small = LinearBase(config, HIDDEN, {None: 8})
        self.experts = RoutedExperts(config, EXPERTS, HIDDEN, INNER, **options)
        self.change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _name, value: value

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, value in weights:
            module, _, kind = name.rpartition(".")
            if module.startswith("experts."):
                _, expert, shard = module.split(".")
                target = f"experts.{'w2' if shard == 'w2' else 'w13'}_{kind}"
                parameters[target].weight_loader(parameters[target], value, shard_id=shard, expert_id=int(expert))
            else:
                module, *shard_id = FUSED.get(module, (module,))
                target = f"{module}.{kind}"
                parameter = parameters[target]
                load = getattr(parameter, "weight_loader", lambda parameter, value: parameter.data.copy_(value))
                if kind == "bias" and module == "qkv":
                    for part, rows in zip("qkv", value.split(HIDDEN), strict=True):
                        load(parameter, rows, part)
                else:
                    load(parameter, self.change(name, value), *shard_id)
            loaded.add(target)
        return loaded

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What each layer makes of the same inputs: what would follow in another process is not here."""
        x = self.norm(self.embed(ids)).flatten(0, -2)
        wide = torch.cat([x, -x], dim=-1)[..., : INNER // self.down.ranks]
        return [self.qkv(x), self.gate_up(x), self.down(wide), self.small(x), self.experts(x, x[:, :EXPERTS])]


IDS = torch.tensor([[1, 5, 399], [7, 0, 5]])
SHAPES = {
    "qkv.bias": (4 * HEADS + 2 * HIDDEN,),  # The order in the file is not that of the fused matrices.
    "up_proj.weight": (INNER, HIDDEN),
    "gate_proj.weight": (INNER, HIDDEN),
    "v_proj.weight": (HIDDEN, HIDDEN),
    "q_proj.weight": (4 * HEADS, HIDDEN),
    "k_proj.weight": (HIDDEN, HIDDEN),
    "embed.weight": (400, HIDDEN),
    "norm.weight": (HIDDEN,),
    "norm.bias": (HIDDEN,),
    "down.weight": (HIDDEN, INNER),
    "small.weight": (8, HIDDEN),
    **{
        f"experts.{expert}.{shard}.weight": (HIDDEN, INNER) if shard == "w2" else (INNER, HIDDEN)
        for expert in range(EXPERTS)
        for shard in ("w1", "w2", "w3")
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write(
        {name: (0.05 * torch.randn(shape)).to(torch.bfloat16) for name, shape in SHAPES.items()},
        tmp_path_factory.mktemp("model"),
    )


def write(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors")
    df11.convert(folder / "model.safetensors", folder / "model.df11")
    return folder


def loader() -> Any:
    return REGISTERED["df11 Df11ModelLoader"](SimpleNamespace())


def config() -> Any:
    return REGISTERED["df11 Df11Config"].from_config({"quant_method": "df11"})


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def sizes_of(model: nn.Module) -> dict[str, int]:
    return {name: value.nbytes for name, value in model.named_parameters() if value.dtype == torch.uint8}


COMPRESSED = [
    "qkv.weight_df11",
    "gate_up.weight_df11",
    "down.weight_df11",
    "experts.w13_weight_df11",
    "experts.w2_weight_df11",
]


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_outputs_are_those_of_the_bf16_model(plugin: ModuleType, path: Path, rank: int, ranks: int) -> None:  # noqa: ARG001
    expected = loader().load_model(Model(rank=rank, ranks=ranks), path)(IDS)
    model = loader().load_model(Model(config(), rank=rank, ranks=ranks), path)
    assert equal(model(IDS), expected)
    assert all(output.float().std() > 0 for output in expected)
    sizes = sizes_of(model)
    assert list(sizes) == COMPRESSED
    for name, size in sizes.items():
        weights = sum(
            torch.Size(shape).numel()
            for source, shape in SHAPES.items()
            if source.endswith("weight") and name in (target_of(source) + "_df11")
        )
        assert 0.6 < size / (2 * weights / ranks) < 0.75, name
    assert not hasattr(model.experts, "w2_weight")  # Nothing decoded is left.
    assert not any(value.is_meta for value in model.parameters())
    for layer in (model.embed, model.norm):
        assert layer.weight.dtype == torch.bfloat16
    assert isinstance(model.small.quant_method, UnquantizedLinearMethod)  # Decoding costs more than it saves.


def target_of(source: str) -> str:
    module, _, kind = source.rpartition(".")
    if module.startswith("experts."):
        return f"experts.{'w2' if module.endswith('w2') else 'w13'}_{kind}"
    return f"{FUSED.get(module, (module,))[0]}.{kind}"


def test_no_layer_is_bf16_for_longer_than_it_takes(
    plugin: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, waiting = Model(config()), []

    def tensors(_path: str) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in found:
            weights = [
                getattr(model.get_submodule(name.split(".")[0]), name.split(".")[1][:-5], None) for name in COMPRESSED
            ]
            assert all(weight is None or weight.is_meta for weight in weights)
            waiting.append(sum(weight is not None for weight in weights))
            yield pair

    found = sorted(plugin.tensors(str(path)), key=lambda pair: pair[0] != "qkv.bias")  # A bias may come first.
    monkeypatch.setattr(plugin, "tensors", tensors)
    loader().load_model(model, path)
    assert waiting == sorted(waiting, reverse=True)
    assert set(waiting) == {5, 4, 2, 1, 0}  # Two weights are experts' and become complete together.


def test_a_tensor_that_the_model_changes_is_compressed_as_changed(plugin: ModuleType, path: Path) -> None:  # noqa: ARG001
    outputs = []
    for chosen in (None, config()):
        model = Model(chosen)
        changes = {
            "up_proj.weight": lambda value: value.t().contiguous().t(),
            "down.weight": lambda value: value.mul_(2),
        }
        model.change = lambda name, value: changes.get(name, lambda value: value)(value)  # noqa: B023
        outputs.append(loader().load_model(model, path)(IDS))
        assert list(sizes_of(model)) == ([] if chosen is None else COMPRESSED)
    assert equal(*outputs)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_layer_that_is_fused_in_the_file(plugin: ModuleType, tmp_path: Path, rank: int) -> None:
    matrix = torch.randn(2 * INNER, HIDDEN).to(torch.bfloat16)
    folder = write({"weight": matrix}, tmp_path)
    layer = LinearBase(config(), HIDDEN, {0: INNER, 1: INNER}, rank=rank, ranks=2)
    layer.load_weights = lambda weights: (
        [layer.weight.weight_loader(layer.weight, value) for _, value in weights] and {"weight"}
    )
    loader().load_model(layer, folder)
    own = torch.cat([part.chunk(2)[rank] for part in matrix.chunk(2)])
    assert torch.equal(
        plugin.decode(*plugin.held(layer, "weight"), torch.empty(0), None).view(torch.int16), own.view(torch.int16)
    )


def test_other_layers_stay_as_they_are(plugin: ModuleType, path: Path) -> None:  # noqa: ARG001
    model = loader().load_model(Model(config(), dtype=torch.float32), path)
    assert isinstance(model.down.quant_method, UnquantizedLinearMethod)
    assert "down.weight_df11" not in sizes_of(model)
    in_f32 = RoutedExperts(config(), EXPERTS, HIDDEN, INNER, dtype=torch.float32)
    assert type(in_f32.quant_method) is vllm_stand_in.UnquantizedFusedMoEMethod
    layer = LinearBase(config(), HIDDEN, {None: INNER}, prefix="model.layers.0.self_attn.kv_b_proj")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert config().get_quant_method(nn.Embedding(4, 4), "embed") is None
    assert config().get_supported_act_dtypes() == [torch.bfloat16]


def test_what_is_missing_is_named(plugin: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(config())
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(errors.MissingError, match="extra"):
        loader().load_model(model, path)
    with pytest.raises(errors.MissingError, match="file in this folder"):
        loader().download_model(SimpleNamespace(model=str(FOLDER)))
    found = list(plugin.tensors(str(path)))
    for left_out, layer in [("v_proj.weight", "qkv"), ("experts.3.w2.weight", "experts"), ("qkv.bias", "qkv")]:
        kept = [(name, value) for name, value in found if name != left_out]
        monkeypatch.setattr(plugin, "tensors", lambda _path, kept=kept: iter(kept))
        with pytest.raises(errors.MissingError, match=f"tensor '{layer}'.*weights of 1 layers"):
            loader().load_model(Model(config()), path)


# Experts.

USED = torch.tensor([[2.0, -9, 1, -9], [1, -9, 2, -9]], dtype=torch.bfloat16)  # Logits: experts 0 and 2.


def experts(path: Path, **options: Any) -> tuple[RoutedExperts, RoutedExperts, torch.Tensor]:
    """Experts of the file in BF16 and compressed, and two tokens."""
    made = []
    for chosen in (None, config()):
        model = Model(chosen)
        model.experts = RoutedExperts(chosen, EXPERTS, HIDDEN, INNER, **options)
        made.append(loader().load_model(model, path).experts)
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return made[0], made[1], x


def damage(layer: RoutedExperts, name: str, expert: int) -> None:
    """Make one expert's record such that it cannot be decoded."""
    layer._parameters[name].data.split(getattr(layer, name.replace("_df11", "_sizes")))[expert].zero_()


def test_only_experts_that_are_used_are_decoded(plugin: ModuleType, path: Path) -> None:  # noqa: ARG001
    plain, compressed, x = experts(path)
    for name in ("w13_weight_df11", "w2_weight_df11"):
        damage(compressed, name, 1)
        damage(compressed, name, 3)
    assert torch.equal(compressed(x, USED), plain(x, USED))
    with pytest.raises(errors.RecordHeaderError):
        compressed(x, USED.flip(1))
    assert not hasattr(compressed, "w13_weight")  # Not even after an error.


def test_whole_experts_on_several_processes(plugin: ModuleType, path: Path) -> None:  # noqa: ARG001
    plain, compressed, x = experts(path, expert_map=torch.tensor([-1, 0, 1, -1]))
    assert torch.equal(compressed(x, USED), plain(x, USED))
    damage(compressed, "w13_weight_df11", 1)
    with pytest.raises(errors.RecordHeaderError):
        compressed(x, USED)
    damage(compressed, "w13_weight_df11", 0)
    elsewhere = torch.tensor([[5.0, -9, -9, 6]] * 2, dtype=torch.bfloat16)
    assert not compressed(x, elsewhere).any()  # All chosen experts are in the other process.


def test_all_experts_are_decoded_where_the_choice_is_unknown(plugin: ModuleType, path: Path) -> None:  # noqa: ARG001
    plain, compressed, x = experts(path, dp_size=2)  # The kernel also sees tokens of other processes.
    assert torch.equal(compressed(x, USED), plain(x, USED))
    chosen = [layer.quant_method.apply_monolithic(layer, x, USED.float()) for layer in (plain, compressed)]
    assert torch.equal(*chosen)
    damage(compressed, "w2_weight_df11", 3)
    with pytest.raises(errors.RecordHeaderError):
        compressed(x, USED)
    with pytest.raises(errors.RecordHeaderError):
        compressed.quant_method.apply_monolithic(compressed, x, USED.float())


def test_a_cuda_graph_decodes_all_experts(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(is_cuda=True, unique=torch.tensor([[2, 0], [0, 2]]).unique)
    for capturing, expected in [(True, [0, 1, 2, 3]), (False, [0, 2])]:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        assert list(plugin.used(on_gpu, 4)) == expected


def test_experts_are_not_moved_between_processes() -> None:
    assert (
        not REGISTERED["df11 Df11Config"]()
        .get_quant_method(RoutedExperts(None, EXPERTS, HIDDEN, INNER), "experts")
        .supports_eplb
    )


# The operators.


def test_the_operators_can_be_compiled(plugin: ModuleType, path: Path) -> None:
    model = loader().load_model(Model(config()), path)
    x = torch.randn(2, 3, HIDDEN).to(torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    for bias in (None, model.qkv.bias):
        torch.library.opcheck(plugin.linear_on_cpu, (x, *plugin.held(model.qkv, "weight"), bias), test_utils=tests)
    for name in ("w13_weight", "w2_weight"):
        torch.library.opcheck(plugin.decode, (*plugin.held(model.experts, name), x, None), test_utils=tests)
    compiled = torch.compile(model.qkv, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model.qkv(x))


def test_a_product_elsewhere_is_torchs_own(plugin: ModuleType, path: Path) -> None:  # noqa: ARG001
    layer = loader().load_model(Model(config()), path).qkv.to("meta")  # No GPU here: shapes show the way it takes.
    assert layer(torch.empty(2, 3, HIDDEN, dtype=torch.bfloat16, device="meta")).shape == (2, 3, 3 * HIDDEN)


def test_the_entry_point_is_there(plugin: ModuleType) -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["entry-points"]["vllm.general_plugins"]["df11"].partition(":")
    assert [module] == project["tool"]["setuptools"]["py-modules"] == [plugin.__name__]
    getattr(plugin, function)()
    getattr(plugin, function)()
    assert sorted(REGISTERED) == ["df11 Df11Config", "df11 Df11ModelLoader"]
