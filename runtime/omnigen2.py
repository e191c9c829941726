"""OmniGen2 with weights that stay compressed. ``load_pipeline`` loads it from a converted folder.

Such a folder is what ``df11-convert --cast bf16 OmniGen2 OmniGen2-df11`` writes. The classes of the transformer, the
scheduler and the pipeline are OmniGen2's own: from its repository or, where the user allows that by name, from the
folder. ``python -m df11.runtime.omnigen2 inference.py ARGUMENTS...`` runs one of OmniGen2's own scripts unchanged, with
df11 folders wherever it loads a model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import runpy
import sys
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from df11.formats import errors, json_text, layout
from df11.runtime import hub
from df11.runtime.foreign import refuse_dfloat11_folder
from df11.runtime.omnigen2_classes import REPOSITORY, execute, import_library, known_classes
from df11.storage.address import Address, is_address
from df11.storage.paths import read_file

if TYPE_CHECKING:
    import torch
    from torch import nn

Offload = Literal["model", "sequential", "group"]
StrPath = str | os.PathLike[str]

_INDEX: Final = "model_index.json"
_CONFIG: Final = "config.json"
_MODELS: Final = ("transformer", "mllm", "vae")
_BLOCKS_IN_A_GROUP: Final = 2
"""For group offloading, as in OmniGen2's scripts."""


def load_pipeline(
    path: StrPath,
    device: str | torch.device = "cuda",
    *,
    offload: Offload | None = None,
    classes: Any = None,
    trust_remote_code: bool | str | Collection[str] = (),
    chat: bool = False,
    **components: Any,
) -> Any:
    """The pipeline of a df11 folder, all BF16: an ``OmniGen2Pipeline``, or with ``chat`` an ``OmniGen2ChatPipeline``.

    Weights that are F32 in the folder are rounded, and not compressed in memory: ``--cast bf16`` does that for good.
    ``path`` may be on the Hub: ``hf://owner/name[@revision][/folder]``, or ``owner/name`` if there is no such folder.
    ``offload``: where weights are between uses. None: on ``device``. Otherwise in CPU memory, and on the device while
    the model ("model"), the layer ("sequential") or two blocks ("group") run. ``classes``: a module or object that has
    OmniGen2's classes, or the folder of a checkout of its repository; by default the installed package ``omnigen2``.
    ``trust_remote_code``: names of Python files in ``path``, without suffix, that may be executed to get classes that
    are not installed. ``components``: a ready ``transformer``, ``scheduler``, …, or a folder or ``hf://`` address to
    load it from; then only the others are downloaded from the Hub.

    When asked for its hidden states, the mllm computes no logits; see :func:`skip_unused_logits`.
    """
    import torch

    from df11.runtime import gpu, load, operators

    if offload not in (None, "model", "sequential", "group"):
        raise errors.UsageError("offload", expected="None, 'model', 'sequential' or 'group'", found=repr(offload))
    target = load.device_of(device)
    operators.decoder_of(target)
    target = gpu.of(target).device if target.type == "cuda" else target
    snapshot = hub.opened(path, _INDEX)
    folder = _PipelineFolder(
        snapshot.folder if snapshot else path,
        classes,
        _names(trust_remote_code),
        "OmniGen2ChatPipeline" if chat else "OmniGen2Pipeline",
    )
    if snapshot:
        snapshot.fetch(folder.parts.keys() - components.keys())
    pipeline = folder.build(target if offload is None else torch.device("cpu"), components)
    _place(pipeline, target, offload)
    return pipeline


def _names(allowed: bool | str | Collection[str]) -> frozenset[str]:
    if allowed is False:
        return frozenset()
    if allowed is True:
        hint = "pass the names of the files, such as trust_remote_code=('transformer_omnigen2',)"
        raise errors.UsageError("remote code is allowed by name", found="trust_remote_code=True", hint=hint)
    return frozenset([allowed] if isinstance(allowed, str) else allowed)


def _place(pipeline: Any, device: torch.device, offload: Offload | None) -> None:
    if offload is None:
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        for name in _MODELS:
            import_library("diffusers.hooks").apply_group_offloading(
                getattr(pipeline, name),
                onload_device=device,
                offload_type="block_level",
                num_blocks_per_group=_BLOCKS_IN_A_GROUP,
                use_stream=device.type == "cuda",
            )


class _PipelineFolder:
    # A df11 folder. Its classes are looked up when it is opened, before anything large is read.

    def __init__(self, path: StrPath, classes: Any, allowed: frozenset[str], pipeline: Any) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise errors.MissingError("no such folder", file=path, hint="on the Hub it would be hf://owner/name")
        refuse_dfloat11_folder(self.path)
        self.index = _read_json(self.path / _INDEX)
        self.allowed = allowed
        self.known = known_classes(classes)
        self.pipeline = self._pipeline_class(pipeline) if isinstance(pipeline, str) else pipeline
        self.parts: dict[str, tuple[Any, Path]] = {}
        for name, found in self.index.items():
            if name.startswith("_"):
                continue
            if not (isinstance(found, list) and len(found) == 2 and all(isinstance(part, str) for part in found)):
                raise errors.UsageError(
                    "a component must be a library and a class", file=self.path / _INDEX, found=f"{name}: {found}"
                )
            self.parts[name] = (self._component_class(name, *found), self.path / name)
        if missing := {"transformer", "vae", "scheduler", "mllm", "processor"} - self.parts.keys():
            raise errors.MissingError(
                f"not an OmniGen2 pipeline: no {', '.join(sorted(missing))}", file=self.path / _INDEX
            )

    def build(self, device: torch.device, components: dict[str, Any]) -> Any:
        if unknown := sorted(components.keys() - self.parts.keys()):
            raise errors.UsageError(
                "no such component", expected=", ".join(sorted(self.parts)), found=", ".join(unknown)
            )
        ready = {name: value for name, value in components.items() if not isinstance(value, (str, os.PathLike))}
        folders = {
            name: _folder(components.get(name, folder)) for name, (_, folder) in self.parts.items() if name not in ready
        }
        for name in _MODELS:
            if name in folders:
                _check_weights(folders[name])
        for name, folder in folders.items():
            ready[name] = _load_component(self.parts[name][0], folder, device)
        if getattr(ready["mllm"], "lm_head", None) is not None:
            skip_unused_logits(ready["mllm"])
        return self.pipeline(**ready)

    def _pipeline_class(self, name: str) -> Any:
        found = self.index.get("_class_name")
        file = found[0] if isinstance(found, list) and found else "pipeline"
        cls = self.known(name, "") or self._remote_class(self.path, str(file), name)
        return cls or self._raise_missing(name)

    def _component_class(self, name: str, library: str, cls: str) -> Any:
        if library in ("transformers", "diffusers"):
            return getattr(import_library(library), cls)
        return (
            self.known(cls, library) or self._remote_class(self.path / name, library, cls) or self._raise_missing(cls)
        )

    def _remote_class(self, folder: Path, file: str, cls: str) -> Any:
        if file not in self.allowed or not (folder / f"{file}.py").is_file():
            return None
        return getattr(execute(folder / f"{file}.py", self.allowed), cls, None)

    def _raise_missing(self, cls: str) -> Any:
        files = [folder / f"{library}.py" for folder, library in self._remote_files()]
        names = ", ".join(repr(file.stem) for file in files if file.is_file())
        hint = f"git clone {REPOSITORY} and pass classes='OmniGen2', the folder of the checkout"
        if names and not self.allowed:
            hint += f"; the folder's own code ({names}) is executed only if trust_remote_code names it"
        raise errors.MissingExtraError(f"OmniGen2's class {cls} is not installed", file=self.path, hint=hint)

    def _remote_files(self) -> Iterator[tuple[Path, str]]:
        for name, found in self.index.items():
            if isinstance(found, list) and found and isinstance(found[0], str):
                yield (self.path if name.startswith("_") else self.path / name), found[0]


def _folder(path: StrPath) -> Path:
    return hub.Snapshot.open(Address.parse(str(path)), _CONFIG).fetch() if is_address(path) else Path(path)


def _read_json(file: Path) -> dict[str, Any]:
    data = read_file(file, layout.MAX_JSON_HEADER)
    content = json_text.parse(data, what="this file", where={"file": file}, error=errors.UsageError)
    if not isinstance(content, dict):
        raise errors.UsageError("not a JSON object", file=file)
    return content


# Components.


def _check_weights(folder: Path) -> None:
    from df11.formats.container import Container
    from df11.runtime.model import files_of

    if not _is_df11(folder):
        refuse_dfloat11_folder(folder)
        raise errors.MissingError(
            "no .df11 file in this folder", file=folder, hint="df11-convert --cast bf16 OmniGen2 OmniGen2-df11"
        )
    for file in files_of(folder):
        with Container(file) as container:
            for name in container.keys():
                if (found := container.info(name).dtype) not in ("BF16", "F32"):
                    raise errors.UsageError("the weights are neither BF16 nor F32", file=file, tensor=name, found=found)


def _is_df11(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.df11"))


def _load_component(cls: Any, folder: Path, device: torch.device) -> Any:
    if hasattr(cls, "tie_weights"):
        return _load_transformers_model(cls, folder, device)
    if hasattr(cls, "parameters"):
        return _load_diffusers_model(cls, folder, device)
    try:
        return cls.from_pretrained(
            folder, **({"trust_remote_code": False} if cls.__module__.startswith("transformers.") else {})
        )
    except ImportError as error:  # The processor's requirements; transformers explains them in a box of many lines.
        missing = next((name for name in ("torchvision", "PIL") if importlib.util.find_spec(name) is None), None)
        hint = "run: pip install " + {"PIL": "pillow"}.get(missing, missing) if missing else None
        raise errors.MissingExtraError(
            f"{cls.__name__} needs {missing or str(error).strip()}", file=folder, hint=hint
        ) from error


def _load_diffusers_model(cls: Any, folder: Path, device: torch.device) -> Any:
    import torch

    from df11.runtime.model import load_model

    config = cls.load_config(folder)
    with import_library("accelerate").init_empty_weights(include_buffers=False):
        model = cls.from_config(config)
    model = torch.nn.Module.to(model, torch.bfloat16).eval()  # As from_pretrained does it: ModelMixin.to would warn.
    model.register_to_config(_name_or_path=str(folder))
    return load_model(model, folder, device).to(device)


def _load_transformers_model(cls: Any, folder: Path, device: torch.device) -> Any:
    # Buffers that are not stored, such as rotary frequencies, come from the constructor and stay F32, as in
    # from_pretrained.
    import torch

    from df11.runtime.model import load_model

    dtype = "dtype" if int(import_library("transformers").__version__.partition(".")[0]) >= 5 else "torch_dtype"
    with import_library("accelerate").init_empty_weights(include_buffers=False):
        model = cls._from_config(cls.config_class.from_pretrained(folder), **{dtype: torch.bfloat16})
    model.tie_weights()  # The context has undone that.
    model.eval()
    if (folder / "generation_config.json").is_file():
        model.generation_config = import_library("transformers").GenerationConfig.from_pretrained(folder)
    runtime_names = {_stored_name(name): name for name in model.state_dict()}
    load_model(model, folder, device, rename=lambda name: runtime_names.get(_stored_name(name), name))
    return model.to(device)


def _stored_name(name: str) -> str:
    # Qwen2.5-VL's names in files, and whether a name is one of them or that of a model in transformers 4.52 and later.
    for runtime, stored in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(runtime):
            return stored + name.removeprefix(runtime)
    return name


# The mllm without logits.


class _Quiet(threading.local):
    # Models whose logits nobody needs at this moment in this thread.

    def __init__(self) -> None:
        self.models: list[nn.Module] = []


_quiet: Final = _Quiet()


def skip_unused_logits(model: nn.Module) -> nn.Module:
    """Let a language model skip its output layer when it is asked for hidden states, which is all OmniGen2 reads.

    Returns the model. A call with ``output_hidden_states=True`` then returns logits without columns, [batch, tokens,
    0], unless it also passes ``labels``, ``logits_to_keep`` or ``past_key_values``, as ``generate`` does.
    """
    if not hasattr(type(model), "_with_logits"):
        kind: Any = type(model)
        model.__class__ = _without_logits(kind)
    return model


@functools.cache
def _without_logits(original: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = any(kwargs.get(name) is not None for name in ("labels", "logits_to_keep", "past_key_values"))
        if len(args) > 1 or wanted or not kwargs.get("output_hidden_states"):
            return original.forward(self, *args, **kwargs)
        _quiet.models.append(self)
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            _quiet.models.pop()

    def attribute(
        self: Any, name: str
    ) -> Any:  # Only submodules are looked up on this, so the layer's own hooks do not run either: nothing is moved.
        if name == "lm_head" and any(model is self for model in _quiet.models):
            return _no_logits
        return original.__getattr__(self, name)

    def device(
        self: Any,
    ) -> (
        torch.device
    ):  # Even while all its weights are offloaded: the chat pipeline and ``generate`` put their inputs there.
        import torch

        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        targets = (getattr(hook, "execution_device", None) for hook in hooks)
        found: torch.device = original.device.__get__(self)
        return (
            next((torch.device(target) for target in targets if target is not None), found)
            if found.type == "meta"
            else found
        )

    def reduce(self: Any, _: Any) -> Any:
        return _rebuild, (original,), self.__dict__.copy()

    fields = {
        "forward": functools.wraps(original.forward)(forward),
        "__getattr__": attribute,
        "__reduce_ex__": reduce,
        "_with_logits": original,
    }
    fields["device"] = property(device)
    same = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }  # Saved with the model.
    return type(original.__name__, (original,), fields | same)


def _rebuild(original: Any) -> Any:
    cls = _without_logits(original)
    return cls.__new__(cls)


def _no_logits(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], 0))


# OmniGen2's own scripts.

_IGNORED: Final = {"revision", "trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "local_files_only"}


@contextmanager
def loading_df11() -> Iterator[None]:
    """Within this context, ``from_pretrained`` of diffusers and OmniGen2 loads df11 folders too.

    Weights are loaded into CPU memory, as from other folders. A transformer that the pipeline has loaded is not loaded
    again.
    """
    diffusers = import_library("diffusers")
    pipelines, models = diffusers.DiffusionPipeline, diffusers.ModelMixin
    load_other_pipeline, load_other_model = pipelines.__dict__["from_pretrained"], models.__dict__["from_pretrained"]
    loaded: weakref.WeakValueDictionary[tuple[Any, Path], Any] = weakref.WeakValueDictionary()

    def load_pipeline_here(cls: Any, /, path: StrPath, **options: Any) -> Any:
        snapshot = hub.found(path, _INDEX, _MODELS, revision=options.get("revision"))
        if snapshot is None and not any(_is_df11(Path(path) / name) for name in _MODELS):
            return load_other_pipeline.__get__(None, cls)(path, **options)
        import torch

        folder = _PipelineFolder(snapshot.folder if snapshot else path, sys.modules[cls.__module__], frozenset(), cls)
        components = _components(path, options)
        if snapshot:
            snapshot.fetch(folder.parts.keys() - components.keys())
        pipeline = folder.build(torch.device("cpu"), components)
        loaded[type(pipeline.transformer), (folder.path / "transformer").resolve()] = pipeline.transformer
        return pipeline

    def load_model_here(cls: Any, /, path: StrPath, **options: Any) -> Any:
        snapshot = hub.found(path, _CONFIG, revision=options.get("revision"), subfolder=options.get("subfolder"))
        folder = snapshot.folder if snapshot else Path(path, options.get("subfolder") or "")
        if snapshot is None and not _is_df11(folder):
            return load_other_model.__get__(None, cls)(path, **options)
        import torch

        options.pop("subfolder", None)
        if snapshot:
            snapshot.fetch()
        if rest := _components(path, options):
            raise errors.UsageError(
                "a df11 folder does not take these options", file=folder, found=", ".join(sorted(rest))
            )
        known = loaded.pop((cls, folder.resolve()), None)
        if known is None:
            _check_weights(folder)
        return _load_diffusers_model(cls, folder, torch.device("cpu")) if known is None else known

    pipelines.from_pretrained, models.from_pretrained = classmethod(load_pipeline_here), classmethod(load_model_here)
    try:
        yield
    finally:
        pipelines.from_pretrained, models.from_pretrained = load_other_pipeline, load_other_model


def _components(path: StrPath, options: dict[str, Any]) -> dict[str, Any]:
    # The remaining options of from_pretrained are, for a pipeline, its components.
    import torch

    for name in ("torch_dtype", "dtype"):
        if options.get(name) not in (None, torch.bfloat16):
            raise errors.UsageError(
                "df11 folders are BF16",
                file=path,
                found=f"{name}={options[name]}",
                hint="pass --dtype bf16 to OmniGen2's scripts",
            )
    return {
        name: value for name, value in options.items() if name not in _IGNORED and name not in ("torch_dtype", "dtype")
    }


def main(arguments: list[str]) -> int:
    """Run a script of OmniGen2 with df11 folders; returns the exit status."""
    try:
        if not arguments or not Path(arguments[0]).is_file():
            raise errors.MissingError(
                "no such script",
                file=arguments[0] if arguments else None,
                hint="python -m df11.runtime.omnigen2 SCRIPT ARGUMENTS...",
            )
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        with loading_df11():
            runpy.run_path(arguments[0], run_name="__main__")
    except errors.Df11Error as error:
        sys.stderr.write(f"df11: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(
        importlib.import_module("df11.runtime.omnigen2").main(sys.argv[1:])
    )  # Not the copy that is __main__, so that what it makes can be pickled.
