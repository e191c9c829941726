"""vLLM plugin for models in `.df11` files: linear layers keep records and decode each weight only for its product.

It has two parts. The *loader* (``--load-format df11``) reads the files and hands vLLM's model decoded BF16 tensors,
like vLLM's own loader, so that embeddings, norms and everything a model does with its weights while loading work as
usual. The *quantization method* (``--quantization df11``) looks up the record that a linear layer's tensor was decoded
from, keeps that and drops the tensor. The parts of a fused layer (q, k and v; gate and up) keep a record each and are
decoded side by side into one matrix, so that the product is that of the BF16 model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import CompressedTensor, warm_up
from df11.runtime.model import files_of, load_tensor
from df11.runtime.weight import CompressedWeight

NAME = "df11"
RECORD = "df11_record"
"""Attribute of a decoded tensor: the CompressedTensor it comes from, and the tensor's version at that time.

A view, a slice or a copy of the tensor does not have it."""
_ORDER = {"q": 0, "k": 1, "v": 2}
_CPU = torch.device("cpu")


def register() -> None:
    """Entry point of the plugin, which vLLM calls in each process. Importing this module registers both parts."""


def tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and decoded tensors, in CPU memory, of a `.df11` file or a folder of them; checksums are checked."""
    for file in files_of(path):
        with Container(file) as container:
            for name in container.keys():
                value = load_tensor(container, name, _CPU, _CPU)
                if not isinstance(value, CompressedWeight):
                    yield name, value
                    continue
                compressed = value.compressed
                values = compressed.decode()
                setattr(values, RECORD, (compressed, values._version))
                yield name, values


@register_model_loader(NAME)
class Df11ModelLoader(BaseModelLoader):
    """Loads a local folder of `config.json`, tokenizer and `.df11` files; decoded without ``--quantization df11``."""

    def download_model(self, model_config: Any) -> None:
        """Downloads nothing: raises a Df11Error if the files are missing."""
        files_of(model_config.model)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Let vLLM's model take the tensors."""
        loaded = model.load_weights(tensors(model_config.model))
        if loaded is None:  # Such a model does not report what it has loaded: only its linear layers are checked.
            return
        parameters = dict(model.named_parameters(remove_duplicate=False))
        filled = {
            id(parameters[name]) for name in loaded if name in parameters
        }  # by identity: tied parameters are loaded once
        missing = [name for name, value in parameters.items() if id(value) not in filled and not value.is_meta]
        if missing:
            raise errors.MissingError(
                f"{len(missing)} parameters are not in the files", file=model_config.model, tensor=missing[0]
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

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:  # noqa: ARG002
        """Linear layers; embeddings, output layers, experts and attention stay as without a quantization method."""
        return Df11LinearMethod() if isinstance(layer, LinearBase) else None


class Df11LinearMethod(LinearMethodBase):
    """Decode, multiply. A layer has a record per part, in the parameters ``weight_df11_0``, ``weight_df11_1``, etc."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ARG002 - vLLM's weight loader, which would copy into a BF16 parameter
    ) -> None:
        """A ``weight`` without memory that takes the parts as they arrive.

        Raises if tensor parallelism would have to split a record.
        """
        rows = sum(output_partition_sizes)
        if (input_size_per_partition, rows) != (input_size, output_size):
            raise errors.UsageError(
                "df11: a record cannot be split for tensor parallelism", hint="set tensor_parallel_size to 1"
            )
        if params_dtype != torch.bfloat16:
            raise errors.UsageError(
                "df11: records decode to bfloat16", found=params_dtype, hint="set dtype to bfloat16"
            )
        weight = nn.Parameter(torch.empty(rows, input_size, dtype=params_dtype, device="meta"), requires_grad=False)
        device, parts = torch.get_default_device(), {}  # The device on which vLLM creates the model

        def load(_: nn.Parameter, loaded: torch.Tensor, loaded_shard_id: Any = None) -> None:
            key = (
                loaded_shard_id
                if isinstance(loaded_shard_id, tuple)
                else (_ORDER.get(loaded_shard_id, loaded_shard_id or 0),)
            )
            record, version = getattr(loaded, RECORD, (None, None))
            parts[key] = (
                record.to(device) if record is not None and loaded._version == version else loaded.to(device, copy=True)
            )

        weight.weight_loader, weight.output_dim, weight.input_dim = load, 0, 1
        layer.register_parameter("weight", weight)
        layer.df11_loaded = parts

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put what was loaded into the layer: records, or BF16 if the model has changed a tensor on its way here."""
        parts = [part for _, part in sorted(layer.__dict__.pop("df11_loaded", {}).items())]
        shape = tuple(layer.weight.shape)
        found = [tuple(part.shape) for part in parts]
        if sum(part[0] for part in found) != shape[0] or any(part[1:] != shape[1:] for part in found):
            raise errors.MissingError(
                "df11: the parts of a linear layer", tensor=getattr(layer, "prefix", None), expected=shape, found=found
            )
        del layer._parameters["weight"]
        compressed = [part for part in parts if isinstance(part, CompressedTensor)]
        if len(compressed) < len(parts):
            values = [
                part.decode() if isinstance(part, CompressedTensor) else part.to(torch.bfloat16) for part in parts
            ]
            layer.register_parameter("weight", nn.Parameter(torch.cat(values), requires_grad=False))
            return
        for number, part in enumerate(compressed):
            layer.register_parameter(f"weight_df11_{number}", nn.Parameter(part.record, requires_grad=False))
        layer.df11_rows = [part.shape[0] for part in compressed]
        layer.df11_segments = [part.segment_elements for part in compressed]
        warm_up(compressed[0].device)  # A CUDA graph cannot capture the compilation of kernels.

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Inputs [..., in] to [..., out]."""
        if "weight" in layer._parameters:
            return nn.functional.linear(x, layer.weight, bias)
        records = [getattr(layer, f"weight_df11_{number}") for number in range(len(layer.df11_rows))]
        return linear(x, records, layer.df11_rows, layer.df11_segments, bias)


@torch.library.custom_op("df11_vllm::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    records: list[torch.Tensor],
    rows: list[int],
    segment_elements: list[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Inputs [..., in] by records of [rows[i], in], one below the other.

    A single operator, so that no compiler decodes a weight early.
    """
    columns = x.shape[-1]
    weight = x.new_empty(sum(rows), columns, dtype=torch.bfloat16)
    weights = [count * columns for count in rows]
    torch.ops.df11.decode_into(records, weights, segment_elements, [0] * len(rows), list(weight.split(rows)))
    return nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(
    x: torch.Tensor,
    records: list[torch.Tensor],  # noqa: ARG001
    rows: list[int],
    segment_elements: list[int],  # noqa: ARG001
    bias: torch.Tensor | None,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(rows))
