"""The vLLM plugin against stand-ins with the interface of vLLM 0.32 and 0.33: what it keeps, computes and refuses.

vLLM is too large for this environment. examples/vllm/README.md says which versions were tried."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from abc import ABC, abstractmethod
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

FOLDER = Path(__file__).parents[2] / "examples" / "vllm"
HIDDEN, HEADS, INNER = 256, 64, 512
REGISTERED: dict[str, type] = {}


# Stand-ins for vLLM.


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...
    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, _layer):
        return


class QuantizationConfig(ABC):
    @abstractmethod
    def get_name(self): ...
    @abstractmethod
    def get_supported_act_dtypes(self): ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...
    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...
    @classmethod
    @abstractmethod
    def from_config(cls, config): ...
    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class Plain(QuantizeMethodBase):
    """What a layer has without a quantization method."""

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, *_sizes, weight_loader):
        layer.weight = nn.Parameter(
            torch.zeros(sum(output_partition_sizes), input_size_per_partition, dtype=torch.bfloat16),
            requires_grad=False,
        )
        layer.weight.weight_loader = weight_loader

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """A linear layer whose parts lie below each other, split for ``ranks`` processes."""

    def __init__(
        self,
        config: Any,
        columns: int,
        parts: dict[Any, int],
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        ranks: int = 1,
    ):
        super().__init__()
        self.parts = parts
        self.quant_method = Plain() if config is None else config.get_quant_method(self, "layer")
        sizes = [rows // ranks for rows in parts.values()]
        self.quant_method.create_weights(
            self, columns, sizes, columns, sum(parts.values()), dtype, weight_loader=self.place
        )
        self.bias = nn.Parameter(torch.zeros(sum(sizes), dtype=dtype), requires_grad=False) if bias else None

    def place(self, param: nn.Parameter, loaded: torch.Tensor, loaded_shard_id: Any = None) -> None:
        if loaded_shard_id is None:
            param.data.copy_(loaded)
            return
        names = list(self.parts)
        start = sum(self.parts[name] for name in names[: names.index(loaded_shard_id)])
        param.data[start : start + self.parts[loaded_shard_id]].copy_(loaded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias)


class BaseModelLoader(ABC):
    def __init__(self, load_config):
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config): ...
    @abstractmethod
    def load_weights(self, model, model_config): ...

    def load_model(self, model: nn.Module, path: Path) -> nn.Module:
        self.load_weights(model, SimpleNamespace(model=str(path)))
        for module in model.modules():
            if isinstance(method := getattr(module, "quant_method", None), QuantizeMethodBase):
                method.process_weights_after_loading(module)
        return model


def register(name: str) -> Callable[[type], type]:
    def keep(made: type) -> type:
        assert issubclass(made, QuantizationConfig | BaseModelLoader)
        REGISTERED[f"{name} {made.__name__}"] = made
        return made

    return keep


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    layers = "vllm.model_executor.layers"
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {"LinearBase": LinearBase, "LinearMethodBase": QuantizeMethodBase},
        f"{layers}.quantization": {"register_quantization_config": register},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.model_loader": {"register_model_loader": register},
        "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": BaseModelLoader},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in contents.items():
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
    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, HIDDEN, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)
        self.qkv = LinearBase(config, HIDDEN, {"q": 4 * HEADS, "k": HIDDEN, "v": HIDDEN}, bias=True, **options)
        self.gate_up = LinearBase(config, HIDDEN, {0: INNER, 1: INNER}, **options)
        self.down = LinearBase(config, INNER, {None: HIDDEN}, **options)
        self.small = LinearBase(config, HIDDEN, {None: 8}, **options)
        self.change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _name, value: value

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, value in weights:
            module, _, kind = name.rpartition(".")
            module, *shard = FUSED.get(module, (module,))
            parameter = parameters[f"{module}.{kind}"]
            if kind == "weight" and hasattr(parameter, "weight_loader"):
                parameter.weight_loader(parameter, self.change(name, value), *shard)
            else:
                parameter.data.copy_(value)
            loaded.add(f"{module}.{kind}")
        return loaded

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        gate, up = self.gate_up(self.qkv(x)[..., :HIDDEN]).chunk(2, dim=-1)
        x = self.down(nn.functional.silu(gate) * up)
        return torch.cat([x, self.small(x)], dim=-1)


IDS = torch.tensor([[1, 5, 399], [7, 0, 5]])
SHAPES = {
    "up_proj.weight": (INNER, HIDDEN),  # The order in the file is not that of the fused matrices.
    "gate_proj.weight": (INNER, HIDDEN),
    "v_proj.weight": (HIDDEN, HIDDEN),
    "q_proj.weight": (4 * HEADS, HIDDEN),
    "k_proj.weight": (HIDDEN, HIDDEN),
    "qkv.bias": (4 * HEADS + 2 * HIDDEN,),
    "embed.weight": (400, HIDDEN),
    "norm.weight": (HIDDEN,),
    "norm.bias": (HIDDEN,),
    "down.weight": (HIDDEN, INNER),
    "small.weight": (8, HIDDEN),
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


@pytest.fixture
def expected(plugin: ModuleType, path: Path) -> torch.Tensor:  # noqa: ARG001
    return loader().load_model(Model(), path)(IDS)


def test_outputs_are_those_of_the_bf16_model(path: Path, expected: torch.Tensor) -> None:
    model = loader().load_model(Model(config()), path)
    assert torch.equal(model(IDS), expected)
    assert expected.float().std() > 0
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    assert [name for name, dtype in kinds.items() if dtype == torch.uint8] == [
        *(f"qkv.weight_df11_{part}" for part in range(3)),
        *(f"gate_up.weight_df11_{part}" for part in range(2)),
        "down.weight_df11_0",
    ]
    assert kinds["small.weight"] == kinds["embed.weight"] == torch.bfloat16  # one small, one not a linear layer
    assert not any(value.is_meta for value in model.parameters())


def test_a_tensor_that_the_model_changes_stays_bf16(path: Path, expected: torch.Tensor) -> None:
    model = Model(config())
    changes = {"up_proj.weight": lambda value: value.t().contiguous().t(), "down.weight": lambda value: value.mul_(1)}
    model.change = lambda name, value: changes[name](value) if name in changes else value
    loader().load_model(model, path)
    assert torch.equal(model(IDS), expected)
    assert {name for name, value in model.named_parameters() if value.dtype == torch.uint8} == {
        f"qkv.weight_df11_{part}" for part in range(3)
    }


def test_a_layer_that_is_fused_in_the_file_is_one_record(plugin: ModuleType, tmp_path: Path) -> None:  # noqa: ARG001
    matrix = torch.randn(2 * INNER, HIDDEN).to(torch.bfloat16)
    folder = write({"weight": matrix}, tmp_path)
    layer = LinearBase(config(), HIDDEN, {0: INNER, 1: INNER})
    layer.load_weights = lambda weights: (
        [layer.weight.weight_loader(layer.weight, value) for _, value in weights] and None
    )
    loader().load_model(layer, folder)
    x = torch.randn(3, HIDDEN).to(torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, matrix))
    assert [name for name, _ in layer.named_parameters()] == ["weight_df11_0"]


def test_what_cannot_be_right_is_refused(plugin: ModuleType, path: Path) -> None:
    with pytest.raises(errors.UsageError, match="tensor_parallel_size to 1"):
        Model(config(), ranks=2)
    with pytest.raises(errors.UsageError, match="dtype to bfloat16"):
        Model(config(), dtype=torch.float16)
    assert config().get_supported_act_dtypes() == [torch.bfloat16]
    model = Model(config())
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(errors.MissingError, match="extra"):
        loader().load_model(model, path)
    with pytest.raises(errors.MissingError, match="file in this folder"):
        loader().download_model(SimpleNamespace(model=str(FOLDER)))
    layer = LinearBase(config(), HIDDEN, {"q": HIDDEN, "k": HIDDEN})
    name, value = next(pair for pair in plugin.tensors(str(path)) if pair[0] == "v_proj.weight")
    assert name
    layer.weight.weight_loader(layer.weight, value, "k")
    with pytest.raises(errors.MissingError, match="parts of a linear layer"):
        layer.quant_method.process_weights_after_loading(layer)


def test_the_operator_can_be_compiled(plugin: ModuleType, path: Path) -> None:
    layer = loader().load_model(Model(config()), path).qkv
    records = [value for name, value in layer.named_parameters() if "df11" in name]
    x = torch.randn(2, 3, HIDDEN).to(torch.bfloat16)
    for bias in (None, layer.bias):
        torch.library.opcheck(
            plugin.linear,
            (x, records, layer.df11_rows, layer.df11_segments, bias),
            test_utils=("test_schema", "test_faketensor"),
        )
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_the_entry_point_is_there(plugin: ModuleType) -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["entry-points"]["vllm.general_plugins"]["df11"].partition(":")
    assert [module] == project["tool"]["setuptools"]["py-modules"] == [plugin.__name__]
    getattr(plugin, function)()
    getattr(plugin, function)()
    assert sorted(REGISTERED) == ["df11 Df11Config", "df11 Df11ModelLoader"]
