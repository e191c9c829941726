"""Stand-ins with the interface of vLLM 0.32 and 0.33 that examples/vllm uses: linear layers and experts, cut for tensor
parallelism, the loading of a layer at a time, and the classes without quantization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

REGISTERED: dict[str, type] = {}
"""What a plugin has registered."""


class QuantizeMethodBase(ABC):
    uses_meta_device = False

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


class ModelWeightParameter(nn.Parameter):
    def __new__(cls, data, **_attributes):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, *, input_dim, output_dim, weight_loader):
        assert (data.dim(), input_dim, output_dim) == (2, 1, 0)
        self.weight_loader = weight_loader


# Linear layers.


class UnquantizedLinearMethod(QuantizeMethodBase):
    def create_weights(self, layer, columns, rows, _all_columns, _all_rows, dtype, *, weight_loader):
        data = torch.zeros(sum(rows), columns, dtype=dtype)
        layer.register_parameter(
            "weight", ModelWeightParameter(data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        )

    def process_weights_after_loading(self, layer):
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def apply(self, layer, x, bias=None):
        return layer.cpu_linear(x, layer.weight, bias)


def dispatch_cpu_unquantized_gemm(layer, remove_weight):
    """The product on a CPU, which packs its weight: here with other rounding than torch's own."""
    packed = layer.weight.float()
    layer.cpu_linear = lambda x, _weight, bias: (x.float() @ packed.T + (0 if bias is None else bias)).to(x.dtype)
    if remove_weight:
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def register_weight_loader_v2_supported_method(method):
    return method


class LinearBase(nn.Module):
    """Parts below each other; ``rank`` of ``ranks`` holds some rows of each or, with ``by_columns``, some columns."""

    def __init__(
        self,
        config: QuantizationConfig | None,
        columns: int,
        parts: dict[Any, int],
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        by_columns: bool = False,
        rank: int = 0,
        ranks: int = 1,
        prefix: str = "layer",
    ) -> None:
        super().__init__()
        self.parts, self.dimension, self.rank, self.ranks = parts, int(by_columns), rank, ranks
        self.params_dtype = dtype
        self.quant_method = (
            UnquantizedLinearMethod() if config is None else config.get_quant_method(self, prefix=prefix)
        )
        sizes = list(parts.values()) if by_columns else [rows // ranks for rows in parts.values()]
        own_columns = columns // ranks if by_columns else columns
        self.quant_method.create_weights(
            self, own_columns, sizes, columns, sum(parts.values()), dtype, weight_loader=self.place
        )
        self.bias = nn.Parameter(torch.zeros(sum(sizes), dtype=dtype), requires_grad=False) if bias else None
        if self.bias is not None:
            self.bias.weight_loader = self.place

    def place(self, param: nn.Parameter, loaded: torch.Tensor, loaded_shard_id: Any = None) -> None:
        names = list(self.parts)
        if loaded_shard_id is None and len(names) > 1:  # Fused in the file.
            for name, part in zip(names, loaded.split(list(self.parts.values())), strict=True):
                self.place(param, part, name)
            return
        if loaded.dim() > self.dimension:
            loaded = loaded.chunk(self.ranks, self.dimension)[self.rank]
        start = sum(self.parts[name] for name in names[: names.index(loaded_shard_id)])
        start //= 1 if self.dimension else self.ranks
        param.data[start : start + len(loaded)].copy_(loaded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias)


# Experts.


class UnquantizedFusedMoEMethod(QuantizeMethodBase):
    def __init__(self, moe: Any) -> None:
        self.moe, self.moe_kernel = moe, None

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size, params_dtype, *, weight_loader):
        for name, rows, columns in (
            ("w13_weight", 2 * intermediate_size, hidden_size),
            ("w2_weight", hidden_size, intermediate_size),
        ):
            data = torch.zeros(num_experts, rows, columns, dtype=params_dtype)
            layer.register_parameter(name, nn.Parameter(data, requires_grad=False))
            layer._parameters[name].weight_loader = weight_loader

    def process_weights_after_loading(self, layer):
        assert self.moe_kernel is None, "the weights would be laid out twice"
        self.moe_kernel = object()
        for name in ("w13_weight", "w2_weight"):  # As kernels have a layout of their own.
            layer.register_parameter(name, nn.Parameter(layer._parameters[name].data.flip(1), requires_grad=False))

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        assert shared_experts is shared_experts_input is None
        return self._compute(layer, x, topk_weights, topk_ids)

    def apply_monolithic(self, layer, x, router_logits, input_ids=None):
        assert input_ids is None
        return self._compute(layer, x, *router_logits.softmax(-1).topk(2))

    def _compute(self, layer, x, topk_weights, topk_ids):
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for weight, chosen in zip(topk_weights[token], topk_ids[token], strict=True):
                expert = int(chosen if layer.expert_map is None else layer.expert_map[chosen])
                if expert >= 0:
                    gate, up = (layer.w13_weight[expert].flip(0) @ x[token]).chunk(2)
                    hidden = nn.functional.silu(gate) * up
                    out[token] += weight * (layer.w2_weight[expert].flip(0) @ hidden)
        return out


class RoutedExperts(nn.Module):
    """Experts of a mixture; ``rank`` of ``ranks`` holds a part of each or, with ``expert_map``, some of them whole."""

    def __init__(
        self,
        config: QuantizationConfig | None,
        experts: int,
        hidden: int,
        inner: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        expert_map: torch.Tensor | None = None,
        dp_size: int = 1,
    ) -> None:
        super().__init__()
        self.rank, self.ranks, self.expert_map, self.params_dtype = rank, ranks, expert_map, dtype
        self.moe_config = SimpleNamespace(
            moe_parallel_config=SimpleNamespace(dp_size=dp_size, pcp_size=1, sp_size=1, tp_size=ranks)
        )
        chosen = None if config is None else config.get_quant_method(self, "experts")
        self.quant_method = chosen or UnquantizedFusedMoEMethod(self.moe_config)
        local = experts if expert_map is None else int((expert_map >= 0).sum())
        self.quant_method.create_weights(
            layer=self,
            num_experts=local,
            hidden_size=hidden,
            intermediate_size=inner // ranks,
            params_dtype=dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: str, expert_id: int) -> bool:
        if self.expert_map is not None:
            expert_id = int(self.expert_map[expert_id])
        if expert_id < 0:
            return False
        loaded_weight = loaded_weight.chunk(self.ranks, int(shard_id == "w2"))[self.rank]
        first = len(loaded_weight) if shard_id == "w3" else 0
        param.data[expert_id, first : first + len(loaded_weight)].copy_(loaded_weight)
        return True

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = logits.float().softmax(-1).topk(2)
        return self.quant_method.apply(
            layer=self,
            x=x,
            topk_weights=weights.to(x.dtype),
            topk_ids=ids,
            shared_experts=None,
            shared_experts_input=None,
        )


# Loading a layer at a time.


class _Info:
    # What a layer waits for.
    def __init__(self) -> None:
        self.open, self.count, self.calls = False, 0, []

    def can_load(self) -> bool:
        return self.open


class _CopiedElements(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


_INFOS: WeakKeyDictionary[nn.Module, _Info] = WeakKeyDictionary()


def get_layerwise_info(layer: nn.Module) -> _Info:
    return _INFOS.setdefault(layer, _Info())


def initialize_online_processing(layer: nn.Module) -> None:
    """Keep what is loaded into a layer until all of it is there; then fill the layer, and process it."""
    info = get_layerwise_info(layer)
    info.open, info.count = True, 0
    for name, parameter in layer.named_parameters(recurse=False):
        if not hasattr(parameter.weight_loader, "original"):
            parameter.weight_loader = _keeping(layer, name, parameter.weight_loader)


def _keeping(layer: nn.Module, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def load(param, *args, **kwargs):
        info = get_layerwise_info(layer)
        if not info.open:  # Such as an expert of another process.
            return None
        info.calls.append((name, args, kwargs))
        with _CopiedElements() as copied:
            result = original(param, *args, **kwargs)
        info.count += copied.count
        if info.count >= sum(parameter.numel() for parameter in layer.parameters(recurse=False)):
            _fill(layer, info)
        return result

    load.original = original
    return load


def _fill(layer: nn.Module, info: _Info) -> None:
    originals = {}
    for name, parameter in list(layer.named_parameters(recurse=False)):
        originals[name] = parameter.weight_loader.original
        if parameter.is_meta:
            layer.register_parameter(
                name, nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"), requires_grad=False)
            )
    for name, args, kwargs in info.calls:
        originals[name](layer._parameters[name], *args, **kwargs)
    layer.quant_method.process_weights_after_loading(layer)
    info.open, info.calls = False, []


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
                if (info := get_layerwise_info(module)).can_load() and method.uses_meta_device:
                    _fill(module, info)
                module.quant_method.process_weights_after_loading(module)
        return model


def register(name: str) -> Callable[[type], type]:
    def keep(made: type) -> type:
        assert issubclass(made, QuantizationConfig | BaseModelLoader)
        REGISTERED[f"{name} {made.__name__}"] = made
        return made

    return keep


_LAYERS = "vllm.model_executor.layers"
_LOADER = "vllm.model_executor.model_loader"
MODULES: dict[str, dict[str, object]] = {
    "vllm": {},
    "vllm.model_executor": {},
    _LAYERS: {},
    f"{_LAYERS}.fused_moe": {"RoutedExperts": RoutedExperts},
    f"{_LAYERS}.fused_moe.unquantized_fused_moe_method": {"UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod},
    f"{_LAYERS}.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": QuantizeMethodBase,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
        "register_weight_loader_v2_supported_method": register_weight_loader_v2_supported_method,
    },
    f"{_LAYERS}.quantization": {"register_quantization_config": register},
    f"{_LAYERS}.quantization.base_config": {
        "QuantizationConfig": QuantizationConfig,
        "QuantizeMethodBase": QuantizeMethodBase,
    },
    f"{_LAYERS}.utils": {"dispatch_cpu_unquantized_gemm": dispatch_cpu_unquantized_gemm},
    _LOADER: {"register_model_loader": register},
    f"{_LOADER}.base_loader": {"BaseModelLoader": BaseModelLoader},
    f"{_LOADER}.reload": {},
    f"{_LOADER}.reload.layerwise": {
        "get_layerwise_info": get_layerwise_info,
        "initialize_online_processing": initialize_online_processing,
    },
    "vllm.model_executor.parameter": {"ModelWeightParameter": ModelWeightParameter},
}
"""Modules of vLLM, and what is taken from them."""
