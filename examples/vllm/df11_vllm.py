"""vLLM plugin for models in `.df11` files: linear layers and experts hold records and decode weights for each product.

It has two parts. The *loader* (``--load-format df11``) reads the files and hands vLLM's model decoded BF16 tensors,
like vLLM's own loader. The *quantization methods* (``--quantization df11``) let vLLM fill a layer with BF16 weights as
usual, renamed, fused, cut for tensor parallelism and laid out for its kernels, and then encode what it holds: a record
for a linear layer, one for each expert of a mixture. Whatever a process holds is a record of its own, so no record is
ever cut, and what is decoded is what vLLM would have kept. Layers are filled one at a time, as for vLLM's own online
quantization: until the first tensor arrives, a weight takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from df11.converter.encode import encode_records
from df11.formats import errors, layout
from df11.formats.container import Container
from df11.runtime import cpu, load, warm_up
from df11.runtime.model import SMALL, files_of

NAME = "df11"
RECORDS = "_df11"
"""Appended to the name of a weight: the parameter with its records, u8, one behind the other."""
_EXPERTS = ("w13_weight", "w2_weight")


def register() -> None:
    """Entry point of the plugin, which vLLM calls in each process. Importing this module registers both parts."""


def tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and decoded tensors, in CPU memory, of a `.df11` file or a folder of them; checksums are checked."""
    for file in files_of(path):
        with Container(file) as container:
            for name in container.keys():
                tensor = torch.empty(container.info(name).shape, dtype=load.torch_dtype(container, name))
                load.load_on_cores(container, {name: tensor})
                yield name, tensor


@register_model_loader(NAME)
class Df11ModelLoader(BaseModelLoader):
    """Loads a local folder of `config.json`, tokenizer and `.df11` files; decoded without ``--quantization df11``."""

    def download_model(self, model_config: Any) -> None:
        """Downloads nothing: raises a Df11Error if the files are missing."""
        files_of(model_config.model)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Let vLLM's model take the tensors. Raises MissingError if it lacks some."""
        parameters = dict(model.named_parameters(remove_duplicate=False))  # Those of encoded layers will be others.
        compressed = {
            name: layer
            for name, layer in model.named_modules()
            if getattr(getattr(layer, "quant_method", None), "uses_meta_device", False)
        }
        for layer in compressed.values():
            initialize_online_processing(layer)  # Again, as biases were not there yet. They may be loaded first.
        loaded = model.load_weights(tensors(model_config.model))
        missing = [name for name, layer in compressed.items() if get_layerwise_info(layer).can_load()]
        if not missing and loaded is not None:  # Else the model does not report what it has loaded.
            # By identity: tied parameters are loaded once.
            filled = {id(parameters[name]) for name in loaded if name in parameters}
            missing = [name for name, value in parameters.items() if id(value) not in filled]
        if missing:
            raise errors.MissingError(
                f"the files lack weights of {len(missing)} layers or parameters",
                file=model_config.model,
                tensor=missing[0],
            )


@register_quantization_config(NAME)
class Df11Config(QuantizationConfig):
    """The quantization method as vLLM configures it: there is nothing to configure, and nothing is quantized."""

    def get_name(self) -> str:
        """Name of the method."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Records decode to BF16."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The compute capability that the kernels need, times ten."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file of the model mentions df11."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Df11Config:  # noqa: ARG003 - for a config.json with {"quant_method": "df11"}
        """The configuration."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Linear layers and experts; embeddings, output layers and attention stay as without a quantization method."""
        if isinstance(layer, RoutedExperts):
            return Df11MoEMethod(layer.moe_config) if layer.params_dtype == torch.bfloat16 else None
        if not isinstance(layer, LinearBase):
            return None
        if layer.params_dtype != torch.bfloat16 or prefix.endswith("kv_b_proj"):  # Latent attention reads its weight.
            return UnquantizedLinearMethod()
        return Df11LinearMethod()


@register_weight_loader_v2_supported_method
class Df11LinearMethod(LinearMethodBase):
    """Decode, multiply."""

    uses_meta_device = True

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,  # noqa: ARG002 - of all processes
        output_size: int,  # noqa: ARG002
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """A ``weight`` that has no memory until it is loaded."""
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = ModelWeightParameter(
            data=torch.empty(shape, dtype=params_dtype, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Encode the weight. vLLM calls this as soon as a layer is complete, and once more at the end."""
        if "weight" in layer._parameters and not encode(layer, "weight"):
            layer.quant_method = UnquantizedLinearMethod()

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Inputs [..., in] to [..., out]."""
        if x.device.type == "cpu":
            return linear_on_cpu(x, *held(layer, "weight"), bias)
        return nn.functional.linear(x, decode(*held(layer, "weight"), x, None), bias)


class Df11MoEMethod(UnquantizedFusedMoEMethod):
    """Decode the experts that are used, then compute as vLLM does with BF16."""

    uses_meta_device = True
    supports_eplb = False  # It would move experts from one process to another.

    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None:
        """Weights of all experts that have no memory until they are loaded."""
        with torch.device("meta"):
            super().create_weights(layer, *sizes, **options)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lay the weights out for vLLM's kernel, then encode them. Called as for a linear layer."""
        if self.moe_kernel is None:
            super().process_weights_after_loading(layer)
            for name in _EXPERTS:
                encode(layer, name)

    def apply(self, layer: nn.Module, x: torch.Tensor, topk_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Inputs [tokens, hidden], and the experts of each, [tokens, k], to [tokens, hidden]."""
        parallel = self.moe.moe_parallel_config
        ids = None
        if parallel.dp_size == parallel.pcp_size == parallel.sp_size == 1:  # Else tokens of other processes join them.
            ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        with _Decoded(layer, x, ids):
            return super().apply(layer=layer, x=x, topk_ids=topk_ids, **options)

    def apply_monolithic(self, layer: nn.Module, x: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        """The same for kernels that choose the experts themselves: all are decoded."""
        with _Decoded(layer, x, None):
            return super().apply_monolithic(layer, x, *inputs, **options)


class _Decoded:
    # The experts' weights are attributes of the layer, where vLLM's method reads them, inside ``with``.
    def __init__(self, layer: nn.Module, x: torch.Tensor, ids: torch.Tensor | None) -> None:
        self._layer, self._x, self._ids = layer, x, ids

    def __enter__(self) -> None:
        for name in _EXPERTS:
            if name not in self._layer._parameters:
                setattr(self._layer, name, decode(*held(self._layer, name), self._x, self._ids))

    def __exit__(self, *_: object) -> None:
        for name in _EXPERTS:
            if name in self._layer.__dict__:  # Not if another thread with a part of the batch was here first.
                delattr(self._layer, name)


def encode(layer: nn.Module, name: str) -> bool:
    """Replace a BF16 parameter by records: one, or one for each expert if it has three dimensions or more.

    False if that does not pay.
    """
    weight = layer._parameters[name].data
    if weight.numel() < SMALL:
        return False
    values = weight.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    records = encode_records(list(values.reshape(len(weight) if weight.dim() > 2 else 1, -1)), cpu.pool())
    if sum(map(len, records)) >= weight.nbytes:
        return False
    delattr(layer, name)
    data = torch.from_numpy(np.concatenate(records)).to(weight.device)
    layer.register_parameter(name + RECORDS, nn.Parameter(data, requires_grad=False))
    setattr(layer, name + "_sizes", [len(record) for record in records])
    setattr(layer, name + "_shape", list(weight.shape))
    warm_up(weight.device)  # A CUDA graph cannot capture the compilation of kernels.
    return True


def held(layer: nn.Module, name: str) -> tuple[torch.Tensor, list[int], list[int]]:
    """The records of a weight, their sizes in bytes, and its shape."""
    return getattr(layer, name + RECORDS), getattr(layer, name + "_sizes"), getattr(layer, name + "_shape")


def used(ids: torch.Tensor | None, count: int) -> Sequence[int]:
    """Which of ``count`` experts to decode: those in ``ids`` (any shape), where negative ones mean none.

    All without ``ids``, and while a CUDA graph is captured, which runs again for other ids.
    """
    if ids is None or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return range(count)
    return [number for number in ids.unique().tolist() if number >= 0]


@torch.library.custom_op("df11_vllm::decode", mutates_args=())
def decode(
    records: torch.Tensor,
    sizes: list[int],
    shape: list[int],
    x: torch.Tensor,  # noqa: ARG001
    ids: torch.Tensor | None,
) -> torch.Tensor:
    """BF16 of ``shape`` from records of ``sizes`` bytes, one behind the other.

    ``x`` is what will be multiplied: as it is an input, no compiler decodes a weight before its turn. ``ids``: the
    experts that will be read, see :func:`used`; others are whatever the memory held.
    """
    out = records.new_empty(shape, dtype=torch.bfloat16)
    matrices = out.view(len(sizes), -1)
    parts, numbers = records.split(sizes), used(ids, len(sizes))
    torch.ops.df11.decode_into(
        [parts[number] for number in numbers],
        [matrices.shape[1]] * len(numbers),
        [layout.DEFAULT_SEGMENT_WEIGHTS] * len(numbers),
        [0] * len(numbers),
        [matrices[number] for number in numbers],
    )
    return out


@decode.register_fake
def _(
    records: torch.Tensor,
    sizes: list[int],  # noqa: ARG001
    shape: list[int],
    x: torch.Tensor,  # noqa: ARG001
    ids: torch.Tensor | None,  # noqa: ARG001
) -> torch.Tensor:
    return records.new_empty(shape, dtype=torch.bfloat16)


@torch.library.custom_op("df11_vllm::linear_on_cpu", mutates_args=())
def linear_on_cpu(
    x: torch.Tensor, records: torch.Tensor, sizes: list[int], shape: list[int], bias: torch.Tensor | None
) -> torch.Tensor:
    """Inputs [..., in] by a weight [out, in] of ``shape``, decoded and packed for vLLM's product on the CPU."""
    layer = nn.Module()
    layer.weight = nn.Parameter(decode(records, sizes, shape, x, None), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    product: torch.Tensor = layer.cpu_linear(x, layer.weight, layer.bias)
    return product


@linear_on_cpu.register_fake
def _(
    x: torch.Tensor,
    records: torch.Tensor,  # noqa: ARG001
    sizes: list[int],  # noqa: ARG001
    shape: list[int],
    bias: torch.Tensor | None,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])
