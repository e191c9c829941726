"""``from_pretrained`` and ``save_pretrained`` of transformers (5.20 and later) for models of `.df11` files.

transformers itself finds, names, merges, places and ties the tensors; it is given compressed weights in place of
decoded ones. Functions of ``transformers.modeling_utils`` are wrapped; other models load as before.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import hub, loading
from df11.runtime.foreign import refuse_dfloat11, refuse_dfloat11_folder
from df11.runtime.model import MismatchError, read_index, stays_compressed
from df11.runtime.modules import is_compressed, materialize
from df11.runtime.weight import joining

_FILE: Final = "model.df11"
_INDEX: Final = "model.df11.index.json"


class _Stored:
    # What transformers takes for a slice of a safetensors file: it is read when it is indexed, in one of several
    # threads.
    def __init__(self, container: Container, name: str, in_file: bool, read: set[tuple[str, str]]) -> None:
        self._container, self._name, self._in_file, self._read = container, name, in_file, read

    def __getitem__(self, _all: Any) -> torch.Tensor:
        if stays_compressed(self._container, self._name):
            self._read.add((self._container.path, self._name))
        return (loading.mapped if self._in_file else loading.read)(self._container, self._name)

    def get_dtype(self) -> str:
        return self._container.info(self._name).dtype

    def get_shape(self) -> list[int]:
        return list(self._container.info(self._name).shape)


@dataclasses.dataclass
class _Loading:
    # A model between the two steps in which transformers loads it.
    folder: str
    read: set[tuple[str, str]]
    disk_index: dict[str, Any] | None


_loading: Final[weakref.WeakKeyDictionary[nn.Module, _Loading]] = weakref.WeakKeyDictionary()


def install(library: Any) -> None:
    """Wrap the functions of ``transformers.modeling_utils``."""
    if not hasattr(library.PreTrainedModel, "_finalize_model_loading"):
        library._get_resolved_checkpoint_files = _refusing(library._get_resolved_checkpoint_files)
        return
    library._get_resolved_checkpoint_files = _resolving(library, library._get_resolved_checkpoint_files)
    if hasattr(library, "auto_conversion"):
        library.auto_conversion = _not_asking(library, library.auto_conversion)
    library._get_device_map = _placing(library._get_device_map)
    sizes = inspect.getmodule(inspect.unwrap(library._get_device_map))
    sizes.compute_module_sizes = loading.counting_records(sizes.compute_module_sizes)  # type: ignore[union-attr]
    model_class = library.PreTrainedModel
    model_class._load_pretrained_model = staticmethod(_loading_records(model_class._load_pretrained_model))
    model_class._finalize_model_loading = staticmethod(_finalizing(library, model_class._finalize_model_loading))
    model_class._resize_token_embeddings = _resizing(model_class._resize_token_embeddings)


def _resolving(library: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    # Find the weights: model.df11, or the shards of model.df11.index.json.
    signature = inspect.signature(original)

    @functools.wraps(original)
    def resolve(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        source, download = call.get("pretrained_model_name_or_path"), dict(call.get("download_kwargs") or {})
        if source is None or call.get("gguf_file") or call.get("transformers_explicit_filename"):
            return original(*args, **kwargs)
        names = [library._add_variant(name, call.get("variant")) for name in (_FILE, _INDEX)]
        if Path(source).is_dir():
            found = [path for name in names if (path := Path(source, download.get("subfolder") or "", name)).is_file()]
            if not found:
                refuse_dfloat11_folder(Path(source, download.get("subfolder") or ""))
            return _files(library, str(source), str(found[0]), download) if found else original(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        except OSError:  # A repository with neither safetensors nor pickled weights.
            for name in names:
                if (cached := _cached(library, str(source), name, download, call.get("user_agent"))) is not None:
                    return _files(library, str(source), cached, download)
            raise

    return resolve


def _not_asking(library: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    # With use_safetensors=True, transformers asks a bot on the Hub to convert a repository that has no safetensors
    # file. One with our files needs no conversion.
    @functools.wraps(original)
    def convert(source: Any, *args: Any, **kwargs: Any) -> Any:
        is_waited_for = not (args or kwargs.get("ignore_errors_during_conversion"))
        if is_waited_for and any(library.cached_file(source, name, **kwargs) is not None for name in (_FILE, _INDEX)):
            return None, kwargs.get("revision"), False  # Nothing converted: transformers goes on to our files.
        return original(source, *args, **kwargs)

    return convert


def _cached(library: Any, source: str, name: str, download: dict[str, Any], user_agent: Any) -> str | None:
    try:
        found: str | None = library.cached_file(
            source, name, user_agent=user_agent, _raise_exceptions_for_missing_entries=False, **download
        )
    except OSError:
        return None
    return found


def _files(library: Any, source: str, path: str, download: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    # The files, and metadata with the dtype that `dtype="auto"` falls back to.
    if not path.endswith(".index.json"):
        files, metadata = [path], {}
    else:
        read_index(path)  # Raises for a file that is no index, or that names a shard outside the folder.
        keywords = {
            name: value
            for name, value in download.items()
            if name in inspect.signature(library.get_checkpoint_shard_files).parameters
        }
        files, metadata = library.get_checkpoint_shard_files(source, path, **keywords)
    _resolved.files = files
    with hub.naming_downloads(), Container(files[0]) as container:
        return files, {"dtype": loading.first_dtype(container), **metadata}


class _Resolved(threading.local):
    # The files that were found last in this thread: a device map is made for what they hold.
    files: Sequence[str] = ()


_resolved: Final = _Resolved()


def _placing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_device_map(model: Any, *args: Any, **kwargs: Any) -> Any:
        files, _resolved.files = _resolved.files, ()
        with ExitStack() as stack:
            containers = [stack.enter_context(Container(file)) for file in files]
            stack.enter_context(loading.expecting(model, containers))
            found = original(model, *args, **kwargs)
        if files and len(set(found.values())) == 1:  # accelerate sets it for several devices only.
            model.hf_device_map = dict(found)
        return found

    return get_device_map


def _resizing(original: Callable[..., Any]) -> Callable[..., Any]:
    # transformers writes to the old embedding and output layer.
    @functools.wraps(original)
    def resize(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = nn.ModuleList(
            layer for layer in (self.get_input_embeddings(), self.get_output_embeddings()) if layer is not None
        )
        if is_compressed(layers):
            warnings.warn("the embeddings are decoded, as their size changes", stacklevel=3)
            materialize(layers)
            self.tie_weights()
        return original(self, *args, **kwargs)

    return resize


def _loading_records(original: Callable[..., Any]) -> Callable[..., Any]:
    # Give transformers the containers' tensors as a state dict whose values are read when they are used.
    @functools.wraps(original)
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".df11"):
            if checkpoint_files:  # They would be taken for weights under unknown names.
                refuse_dfloat11(load_config.pretrained_model_name_or_path, model.config)
            return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        folder = str(load_config.pretrained_model_name_or_path)
        quantizer = load_config.hf_quantizer
        if quantizer is not None and not (quantizer.pre_quantized and _is_fp8(quantizer)):
            what = "the weights are compressed and cannot be quantized; only checkpoints in FP8 are loaded quantized"
            raise errors.UsageError(what, file=folder, hint="quantize the original model")
        if load_config.device_mesh is not None:
            raise errors.UsageError(
                "compressed weights cannot be split for tensor parallelism", file=folder, hint="load the original model"
            )
        with hub.naming_downloads(), ExitStack() as stack:
            containers = [stack.enter_context(Container(file)) for file in checkpoint_files]
            cast = loading.cast_for_good(folder, load_config.dtype, containers)
            devices = load_config.device_map or {}
            to_disk = "disk" in devices.values()
            if to_disk:  # transformers would decode them: records stay in their files.
                kept = {name: "cpu" if device == "disk" else device for name, device in devices.items()}
                load_config = dataclasses.replace(load_config, device_map=kept)
            read: set[tuple[str, str]] = set()
            stored: dict[str, _Stored] = {}
            for container in containers:
                for name in container.keys():
                    if name in stored:
                        raise MismatchError("two shards hold this tensor", file=container.path, tensor=name)
                    stored[name] = _Stored(container, name, to_disk, read)
            stack.enter_context(joining())  # Experts that transformers merges.
            info, index = original(model, stored, checkpoint_files, load_config, *args, **kwargs)
        index = {} if to_disk else index
        _loading[model] = _Loading(folder, read - cast, index)
        return info, index

    return load


def _is_fp8(quantizer: Any) -> bool:
    return bool(quantizer.quantization_config.quant_method == "fp8")


def _finalizing(library: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    # After transformers has tied and initialized what was not loaded.
    @functools.wraps(original)
    def finalize(model: Any, load_config: Any, loading_info: Any, *args: Any, **kwargs: Any) -> Any:
        state = _loading.pop(model, None)
        if state is None:
            return original(model, load_config, loading_info, *args, **kwargs)
        for name, reason in loading_info.conversion_errors.items():
            raise errors.UsageError(
                f"transformers could not convert it: {str(reason).splitlines()[-1]}", file=state.folder, tensor=name
            )
        info = original(model, load_config, loading_info, *args, **kwargs)
        if state.disk_index is None:
            kept = loading.settle(model)
        else:

            def on_disk(name: str) -> bool:
                return bool(library.get_device(load_config.device_map, name) == "disk")

            kept = loading.settle(model, lambda name: not on_disk(name))
            state.disk_index.update(loading.disk_index(model, on_disk, load_config.disk_offload_folder))
        decoded = {name for _, name in state.read - kept}
        if len(decoded) > len(info.mismatched_keys):  # which have been read, and left out
            warnings.warn(
                f"{state.folder}: {len(decoded)} of {len(state.read)} compressed tensors are held decoded,"
                f" as transformers changes them while loading; the first is {min(decoded)}",
                stacklevel=2,
            )
        return info

    return finalize


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    # For a transformers that is too old: its own error would only name a missing file.
    @functools.wraps(original)
    def resolve(*args: Any, **kwargs: Any) -> Any:
        source = kwargs.get("pretrained_model_name_or_path")
        if source is not None and any(
            Path(source, kwargs.get("subfolder") or "", name).is_file() for name in (_FILE, _INDEX)
        ):
            import transformers

            raise errors.UsageError(
                "from_pretrained of .df11 files needs transformers 5.20 or later",
                file=source,
                found=transformers.__version__,
                hint="or build the model and call df11.runtime.load_model",
            )
        return original(*args, **kwargs)

    return resolve
