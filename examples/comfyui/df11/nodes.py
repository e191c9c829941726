"""The node "Load Diffusion Model (df11)": large weights stay records, and a linear layer decodes its own as it runs.

ComfyUI moves, patches, merges, saves and casts weights in many places. To all of them, a weight here is a tensor like
any other: it has the shape and dtype of what it decodes to, and computations see the decoded values. Only three things
are special: it moves between devices as a record, it counts as many bytes as the record has, and it cannot be written
to, only replaced. LoRAs change what a layer has decoded (patching.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.ops
import comfy.sd
import folder_paths
import torch

from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import CompressedTensor, warm_up
from df11.runtime.model import load_tensor
from df11.runtime.weight import CompressedWeight

from .patching import keep_compressed  # noqa: TID252 - ComfyUI chooses the name of this folder


def list_folder(kind: str) -> str:
    """Let ComfyUI list the `.df11` files in its folders of a kind; returns its name for them."""
    name = f"{kind}_df11"
    folder_paths.folder_names_and_paths[name] = (folder_paths.folder_names_and_paths[kind][0], {".df11"})
    return name


FOLDER = list_folder("diffusion_models")
_CPU = torch.device("cpu")
_aten = torch.ops.aten


class Df11Weight(torch.Tensor):
    """A BF16 tensor held as a record, ``compressed``. Not writable."""

    compressed: CompressedTensor

    @staticmethod
    def __new__(cls: type[Df11Weight], compressed: CompressedTensor) -> Df11Weight:
        """Wrap a record."""
        made: Df11Weight = torch.Tensor._make_wrapper_subclass(
            cls, compressed.shape, dtype=torch.bfloat16, device=compressed.device
        )
        made.compressed = compressed
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the record: ComfyUI uses this to decide what fits into GPU memory."""
        return self.compressed.record.nbytes

    def __repr__(self, **_: Any) -> str:
        return f"Df11Weight({tuple(self.shape)}, {self.nbytes:,} bytes on {self.device})"

    def __setitem__(self, *_: Any) -> None:
        raise _read_only("an assignment")

    def storage(self) -> Any:
        """Nothing that could be written to a file; safetensors asks for it."""
        raise errors.UsageError(
            "a compressed weight cannot be saved as it is",
            hint="restore the .safetensors file with df11 restore, and start from that",
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_record"], (self.compressed.shape, self.compressed.segment_elements)

    @property
    def _record(self) -> torch.Tensor:
        return self.compressed.record

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, *_: Any) -> Df11Weight:
        return Df11Weight(CompressedTensor(inner["_record"], *context))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            written = [
                a
                for a, s in zip(args, function._schema.arguments, strict=False)
                if s.alias_info is not None and s.alias_info.is_write
            ]
            if any(isinstance(value, Df11Weight) for value in [*written, kwargs.get("out")]):
                raise _read_only(str(function))
        if function.overloadpacket is _aten.to:  # In inference mode these arrive undivided.
            return function.decompose(*args, **kwargs)
        if function is _aten.copy_.default:
            return args[0].copy_(
                args[1].compressed.to(args[0].device).decode()
            )  # moved as a record, decoded at the destination
        if function is _aten.detach.default or function is _aten.alias.default:
            return Df11Weight(args[0].compressed)
        if function is _aten.clone.default:
            old = args[0].compressed
            return Df11Weight(CompressedTensor(old.record.clone(), old.shape, old.segment_elements))
        if function is _aten._to_copy.default and kwargs.get("dtype") in (None, torch.bfloat16):
            old = args[0].compressed
            record = old.record.to(
                kwargs.get("device") or old.device, non_blocking=kwargs.get("non_blocking", False), copy=True
            )
            return Df11Weight(CompressedTensor(record, old.shape, old.segment_elements))
        if function is _aten.empty_like.default or function is _aten.new_empty.default:
            size = args[1] if len(args) > 1 else args[0].shape
            return torch.empty(
                size, dtype=kwargs.get("dtype") or torch.bfloat16, device=kwargs.get("device") or args[0].device
            )
        if isinstance(args[0], Df11Weight) and any(value.alias_info is not None for value in function._schema.returns):
            return function(CompressedWeight.of(args[0].compressed), *args[1:], **kwargs)  # a view, as frozen as this
        return function(*_decoded(args), **_decoded(kwargs))


def _read_only(what: str) -> errors.UsageError:
    return errors.UsageError(
        f"{what}: the weight is compressed and cannot be written to", hint="load the .safetensors file instead"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, Df11Weight):
        return value.compressed.decode()
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(part) for part in value)
    return {key: _decoded(part) for key, part in value.items()} if isinstance(value, dict) else value


class Df11Ops(comfy.ops.manual_cast):
    """ComfyUI's layers; linear ones keep records, the others decode theirs when they are loaded."""

    class Linear(comfy.ops.manual_cast.Linear):
        """A linear layer whose weight may be a Df11Weight."""

        def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
        ) -> None:
            if isinstance(
                state_dict.get(prefix + "weight"), Df11Weight
            ):  # kept as it is rather than copied into a BF16 tensor
                local_metadata = {**local_metadata, "assign_to_params_buffers": True}
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - ComfyUI's name
            """Inputs [..., in] to [..., out]: decode where the inputs are, cast and patch like ComfyUI, multiply."""
            if not isinstance(self.weight, Df11Weight):  # a small one, or one with a LoRA
                return super().forward_comfy_cast_weights(input)
            weight = self.weight.compressed.to(input.device).decode().to(input.dtype)
            for patch in self.weight_function:
                weight = patch(weight)
            bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
            for patch in self.bias_function if bias is not None else ():
                bias = patch(bias)
            return torch.nn.functional.linear(input, weight, bias)


def state_dict(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a `.df11` file in CPU memory, checked; large BF16 ones as Df11Weight."""
    tensors: dict[str, torch.Tensor] = {}
    with Container(path) as container:
        for name in container.keys():
            value = load_tensor(container, name, _CPU, _CPU)
            if isinstance(value, CompressedWeight):
                is_bf16 = value.dtype == torch.bfloat16
                value = torch.nn.Parameter(Df11Weight(value.compressed), False) if is_bf16 else value.decode()
            tensors[name] = value
    return tensors


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that this version of ComfyUI knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def ready(patcher: Any) -> None:
    """Prepare a ModelPatcher that has just been loaded."""
    keep_compressed(patcher)
    if patcher.load_device.type == "cuda":
        warm_up(patcher.load_device)


class LoadDiffusionModelDf11:
    """A diffusion model from a `.df11` file in ``models/diffusion_models``."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "advanced/loaders"
    DESCRIPTION = "Loads a diffusion model whose weights stay compressed, without loss, in memory."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The files to choose from."""
        return {"required": {"model_name": (folder_paths.get_filename_list(FOLDER),)}}

    def load(self, model_name: str) -> tuple[Any]:
        """The model, as ComfyUI's own loader returns it."""
        path = folder_paths.get_full_path_or_raise(FOLDER, model_name)
        load = comfy.sd.load_diffusion_model_state_dict
        options = {"custom_operations": Df11Ops}
        # Dynamic loading copies weights as raw bytes into memory of its own.
        model = load(state_dict(path), model_options=options, **accepted(load, disable_dynamic=True))
        if model is None:
            raise errors.UsageError(
                "ComfyUI does not recognize this model",
                file=path,
                hint="it must be a diffusion model that ComfyUI can load",
            )
        ready(model)
        return (model,)


NODE_CLASS_MAPPINGS: dict[str, type] = {"LoadDiffusionModelDf11": LoadDiffusionModelDf11}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {"LoadDiffusionModelDf11": "Load Diffusion Model (df11)"}
