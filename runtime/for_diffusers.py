"""``from_pretrained`` and ``save_pretrained`` of diffusers for models of `.df11` files, local or on the Hub.

diffusers itself finds, names and places the tensors of models and pipelines; it is given compressed weights in place of
decoded ones. Functions of three of its modules are wrapped; other models load as before.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import hub, loading
from df11.runtime.foreign import refuse_dfloat11
from df11.runtime.weight import CompressedWeight

_SAFETENSORS: Final = ".safetensors"
_DF11: Final = ".df11"
_WEIGHTS: Final = re.compile(r"\.df11(?=$|\.index\.)")
_INDEX: Final = "diffusion_pytorch_model.df11.index.json"


def install(library: Any) -> None:
    """Wrap the functions of ``diffusers.models.modeling_utils``."""
    reader = inspect.getmodule(library.load_state_dict)
    original = library._get_model_file
    library._get_model_file = _finding(original)
    library._fetch_index_file = _finding_index(library, library._fetch_index_file)
    library.load_state_dict = reader.load_state_dict = _reading(library.load_state_dict)  # type: ignore[union-attr]
    model_class = library.ModelMixin
    model_class._load_pretrained_model = classmethod(_loading(model_class._load_pretrained_model.__func__))


def install_group_offloading(library: Any) -> None:
    """Let groups of ``diffusers.hooks.group_offloading`` keep records, rather than decoded weights, on disk."""
    library.ModuleGroup.__init__ = _offloading_records(library.ModuleGroup.__init__)


def install_pipelines(library: Any) -> None:
    """Wrap what chooses the files to download in ``diffusers.pipelines.pipeline_utils``; it sees safetensors files."""
    library.filter_model_files = _filtering(library.filter_model_files)
    library._get_ignore_patterns = _ignoring(library._get_ignore_patterns)
    library.variant_compatible_siblings = _choosing(library.variant_compatible_siblings)


def _renamed(names: Iterable[str]) -> dict[str, str]:
    # Names as if safetensors files stood in place of ours, where there are none as well -> the real names.
    known = set(names)
    renamed = {_WEIGHTS.sub(_SAFETENSORS, name): name for name in known}
    return {**renamed, **{name: name for name in known if name in renamed}}


def _filtering(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def filter_model_files(filenames: Any) -> Any:
        names = _renamed(filenames)
        return [names[name] for name in original(list(names))]

    return filter_model_files


def _ignoring(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def ignore_patterns(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.arguments["model_filenames"] = set(_renamed(call.arguments["model_filenames"]))
        return original(*call.args, **call.kwargs)

    return ignore_patterns


def _choosing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compatible(filenames: Any, variant: Any = None, ignore_patterns: Any = None) -> Any:
        names = _renamed(filenames)
        if (
            names.keys() != names.values()
        ):  # Ours are wanted even if safetensors files are not, as when a component has pickled weights only.
            ignore_patterns = [pattern for pattern in ignore_patterns or [] if pattern != f"*{_SAFETENSORS}"]
        chosen = original(set(names), variant=variant, ignore_patterns=ignore_patterns)
        return tuple({names[name] for name in part} for part in chosen)

    return compatible


def _finding(original: Callable[..., Any]) -> Callable[..., Any]:
    # Take a .df11 file in place of a safetensors file.
    @functools.wraps(original)
    def get_model_file(source: Any, *args: Any, weights_name: str, **kwargs: Any) -> Any:
        if not weights_name.endswith(_SAFETENSORS):
            return original(source, *args, weights_name=weights_name, **kwargs)
        ours = weights_name.removesuffix(_SAFETENSORS) + _DF11
        if Path(source).is_dir():
            path = Path(source, kwargs.get("subfolder") or "", ours)
            return str(path) if path.is_file() else original(source, *args, weights_name=weights_name, **kwargs)
        try:
            return original(source, *args, weights_name=weights_name, **kwargs)
        except OSError as error:
            try:
                return original(source, *args, weights_name=ours, **kwargs)
            except OSError:
                raise error from None

    return get_model_file


def _finding_index(library: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fetch_index_file(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        subfolder, name = call.get("subfolder") or "", library._add_variant(_INDEX, call.get("variant"))
        if not call.get("use_safetensors"):
            return original(*args, **kwargs)
        if call["is_local"]:
            path = Path(call["pretrained_model_name_or_path"], subfolder, name)
            return path if path.is_file() else original(*args, **kwargs)
        found = original(*args, **kwargs)
        if found is None:
            keywords = {key: value for key, value in call.items() if key in _DOWNLOAD}
            source = call["pretrained_model_name_or_path"]
            try:
                found = Path(
                    library._get_model_file(source, weights_name=name, subfolder=subfolder or None, **keywords)
                )
            except OSError:
                return None
        return found

    return fetch_index_file


_DOWNLOAD: Final = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "user_agent",
    "commit_hash",
)


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(checkpoint_file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(checkpoint_file, (str, Path)) and str(checkpoint_file).endswith(_DF11):
            with hub.naming_downloads():
                return loading.read_all(checkpoint_file)
        return original(checkpoint_file, *args, **kwargs)

    return load_state_dict


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(cls, *args, **kwargs)
        call = bound.arguments
        model, files = call["model"], call["resolved_model_file"]
        if not files or not str(files[0]).endswith(_DF11):
            refuse_dfloat11(call["pretrained_model_name_or_path"], model.config)
            return original(cls, *args, **kwargs)
        folder = str(call["pretrained_model_name_or_path"])
        if call.get("hf_quantizer") is not None:
            raise errors.UsageError(
                "the weights are compressed and cannot be quantized", file=folder, hint="quantize the original model"
            )
        if call.get("tp_config") is not None:
            raise errors.UsageError(
                "compressed weights cannot be split for tensor parallelism", file=folder, hint="load the original model"
            )
        with hub.naming_downloads(), ExitStack() as stack:
            containers = [stack.enter_context(Container(file)) for file in files]
            loading.cast_for_good(folder, call.get("dtype") or torch.get_default_dtype(), containers)
        devices = call.get("device_map") or {}
        to_disk = "disk" in devices.values()
        if to_disk:  # diffusers would decode them: records stay in their files.
            call["device_map"] = {name: "cpu" if device == "disk" else device for name, device in devices.items()}
        model, missing, unexpected, mismatched, index, messages = original(*bound.args, **bound.kwargs)
        loading.settle(model)
        if to_disk:
            index = loading.disk_index(model, lambda name: _device(name, devices) == "disk", call.get("offload_folder"))
        return model, missing, unexpected, mismatched, index, messages

    return load


def _device(name: str, devices: dict[str, Any]) -> Any:
    while name and name not in devices:
        name = name.rpartition(".")[0]
    return devices.get(name)


class _RecordOf:
    # A weight's record in the place of the weight: what is set here is the same record, elsewhere or to come.
    def __init__(self, weight: CompressedWeight) -> None:
        self._weight = weight

    @property
    def data(self) -> torch.Tensor:
        return self._weight.record

    @data.setter
    def data(self, record: torch.Tensor) -> None:
        self._weight.data = CompressedWeight.of(self._weight.compressed.with_record(record))


def _offloading_records(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.offload_to_disk_path is not None:
            self.key_to_tensor = {
                key: _RecordOf(tensor) if isinstance(tensor, CompressedWeight) else tensor
                for key, tensor in self.key_to_tensor.items()
            }
            self.tensor_to_key = {tensor: key for key, tensor in self.key_to_tensor.items()}

    return init
