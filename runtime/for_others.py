"""What else must know of compressed weights: accelerate, peft, safetensors, sentence-transformers, torch's FSDP."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from df11.runtime import loading, weight
from df11.runtime.model import plain
from df11.runtime.modules import is_compressed, materialize
from df11.runtime.weight import CompressedWeight, FrozenWeightError


def install_sizes(library: Any) -> None:
    """``accelerate.utils.modeling``: device maps count compressed sizes."""
    library.compute_module_sizes = loading.counting_records(library.compute_module_sizes)


def install_disk(library: Any) -> None:
    """``accelerate.utils.offload``: records that are on disk stay in their containers."""
    loader = library.OffloadedWeightsLoader
    loader.__getitem__ = loading.reading_records(loader.__getitem__)


def install_safetensors(library: Any) -> None:
    """``safetensors.torch``: what copies a tensor's bytes for a file, through its address, gets decoded values."""
    for name in ("_to_ndarray", "_tobytes"):
        if hasattr(library, name):
            setattr(library, name, _decoding(getattr(library, name)))
            weight.COMPARING.add(library.__name__)  # The rest of it only compares addresses.


def _decoding(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return original(tensor.decode() if isinstance(tensor, CompressedWeight) else tensor, *args, **kwargs)

    return read


def install_peft(library: Any) -> None:
    """``peft.utils.other``: a copy of a layer that peft trains as a whole (``modules_to_save``) is decoded."""
    wrapper = library.ModulesToSaveWrapper
    wrapper.update = _materializing(wrapper.update)


def _materializing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="compressed weights are not trained")
            result = original(self, adapter_name, *args, **kwargs)
        copied = self.modules_to_save[adapter_name]
        if is_compressed(copied):
            warnings.warn(f"modules_to_save: the copy for {adapter_name!r} is decoded, as it is trained", stacklevel=3)
            materialize(copied)
            copied.requires_grad_(adapter_name in self.active_adapters)
        return result

    return update


def install_merging(library: Any) -> None:
    """``peft.tuners.tuners_utils``: weights that an adapter is merged into are decoded."""
    name = "check_adapters_to_merge"
    original = getattr(library, name)
    wrapped = _decoding_merged(original)
    # Tuners import the function by name.
    for module in [module for key, module in sys.modules.items() if key.startswith("peft.")]:
        if vars(module).get(name) is original:
            setattr(module, name, wrapped)


def _decoding_merged(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def check(module: Any, *args: Any, **kwargs: Any) -> Any:
        names = original(module, *args, **kwargs)
        # An attention layer is merged into in every pass, and puts other parameters in the place of its own.
        if names and not isinstance(module.get_base_layer(), nn.MultiheadAttention):
            _decode_base(module)
        return names

    return check


def install_lora(library: Any) -> None:
    """``peft.tuners.lora.layer``: weights that an adapter takes a part of, as it is initialized, are decoded."""
    for name in ("corda_init", "loftq_init", "lora_ga_init", "olora_init", "pissa_init"):
        if hasattr(library.LoraLayer, name):
            setattr(library.LoraLayer, name, _decoding_base(getattr(library.LoraLayer, name)))


def _decoding_base(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> Any:
        _decode_base(self)
        return original(self, *args, **kwargs)

    return initialize


def _decode_base(module: Any) -> None:
    layer = module.get_base_layer()
    if is_compressed(layer):
        warnings.warn("layers that an adapter changes are decoded, and stay so", stacklevel=4)
        materialize(layer)


def install_fsdp(library: Any) -> None:
    """FSDP2's parameters: a compressed weight is cut into decoded shards, so that each rank holds a part of it."""
    library.FSDPParam.__init__ = _sharding(library.FSDPParam.__init__)


def _sharding(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, param: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(param, CompressedWeight):
            message = "fully_shard: compressed weights are sharded decoded; pass them as ignored_params to keep them"
            warnings.warn(message, stacklevel=2)
        original(self, param, *args, **kwargs)

    return init


def install_flat_fsdp(library: Any) -> None:
    """The older FSDP joins parameters and writes to them; it refuses compressed ones."""
    library.FlatParamHandle.__init__ = _refusing(library.FlatParamHandle.__init__)


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(param, CompressedWeight) for param in params):
            raise FrozenWeightError("FullyShardedDataParallel: pass compressed weights as ignored_states")
        original(self, params, *args, **kwargs)

    return init


def install_sentence_transformers(library: Any) -> None:
    """``Module`` of sentence-transformers, which reads the weights of its own layers by file name."""
    library.Module.load_torch_weights = classmethod(_finding(library.Module.load_torch_weights.__func__))


def _finding(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(cls, *args, **kwargs)
        except ValueError:  # There is neither of the two files that it knows.
            call = dict(signature.bind(cls, *args, **kwargs).arguments)
            model = call.pop("model", None)
            call.pop(next(iter(signature.parameters)))
            path = cls.load_file_path(filename="model.df11", **call)
            if path is None:
                raise
            state = {name: plain(value) for name, value in loading.read_all(path).items()}
            if model is None:
                return state
            model.load_state_dict(state)
            return model

    return load
