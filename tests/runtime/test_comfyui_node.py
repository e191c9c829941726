"""The ComfyUI node against stand-ins with the interface of ComfyUI 0.3.64 to 0.38: bits, memory, LoRAs, refusals.

ComfyUI is not a package that could be installed here. examples/comfyui/df11/README.md says which versions were tried.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import df11
from df11.formats import errors

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui" / "df11"
CPU = torch.device("cpu")


# Stand-ins for ComfyUI.


class Cast:
    comfy_cast_weights = True
    weight_function: Any = ()
    bias_function: Any = ()


class manual_cast:  # noqa: N801 - ComfyUI's name
    class Linear(nn.Linear, Cast):
        def reset_parameters(self):
            return

        def forward_comfy_cast_weights(self, input):  # noqa: A002
            weight = self.weight.to(input.device, input.dtype)
            for function in self.weight_function:
                weight = function(weight)
            return nn.functional.linear(
                input, weight, None if self.bias is None else self.bias.to(input.device, input.dtype)
            )

        def forward(self, *args):
            return self.forward_comfy_cast_weights(*args)

    class Conv1d(nn.Conv1d, Cast):
        def reset_parameters(self):
            return


class Diffusion(nn.Module):
    """What the stand-in of ComfyUI recognizes: linear layers, two matrices fused while loading, a convolution."""

    def __init__(self, operations: Any) -> None:
        super().__init__()
        self.up = operations.Linear(256, 512, dtype=torch.bfloat16)
        self.down = operations.Linear(512, 256, bias=False, dtype=torch.bfloat16)
        self.fused = operations.Linear(256, 512, bias=False, dtype=torch.bfloat16)
        self.small = operations.Linear(256, 8, dtype=torch.bfloat16)
        self.convolution = operations.Conv1d(256, 256, 3, padding=1, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(nn.functional.gelu(self.up(x)))
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return torch.cat([self.fused(x), self.small(x)], dim=-1)


class LowVramPatch:
    """What ComfyUI gives a layer that it does not load: patches on use."""

    def __init__(self, key: str, patches: dict[str, Any]) -> None:
        self.key, self.patches = key, patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return calculate_weight(self.patches[self.key], weight, self.key)


def calculate_weight(patches: list[torch.Tensor], weight: torch.Tensor, _key: str) -> torch.Tensor:
    for patch in patches:
        weight = weight + patch.to(weight.dtype)
    return weight


class Patcher:
    """As in ComfyUI: patched weights are replaced when the model is loaded and then restored, or patched on use."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.load_device, self.patches, self.backup = model, CPU, {}, {}

    def clone(self) -> Any:
        made = self.__class__(self.model)
        made.patches, made.backup = dict(self.patches), self.backup
        return made

    def patch_weight_to_device(self, key: str) -> None:
        module = self.model.get_submodule(key.removesuffix(".weight"))
        self.backup[key] = module.weight.to(device=CPU, copy=False)
        changed = calculate_weight(self.patches[key], module.weight.to(torch.float32, copy=True), key)
        module.weight = nn.Parameter(changed.to(module.weight.dtype), requires_grad=False)

    def load(self, low_memory: bool = False) -> None:
        for module in self.model.modules():
            module.weight_function = []
        for key in self.patches:
            module = self.model.get_submodule(key.removesuffix(".weight"))
            if low_memory:
                module.weight_function = [LowVramPatch(key, self.patches)]
            elif key not in self.backup:
                self.patch_weight_to_device(key)
        self.model.to(self.load_device)

    def partially_unload(self) -> None:
        for key in self.patches:
            module = self.model.get_submodule(key.removesuffix(".weight"))
            if key in self.backup:
                module.weight = nn.Parameter(self.backup.pop(key), requires_grad=False)
            module.weight_function.append(LowVramPatch(key, self.patches))

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:  # noqa: ARG002
        for key, weight in self.backup.items():
            module = self.model.get_submodule(key.removesuffix(".weight"))
            module.weight = nn.Parameter(weight, requires_grad=False)
        for module in self.model.modules():
            functions = getattr(module, "weight_function", ())
            module.weight_function = [found for found in functions if not isinstance(found, LowVramPatch)]
        self.backup.clear()


def load_state_dict(
    sd: dict[str, torch.Tensor], model_options: dict[str, Any], disable_dynamic: bool
) -> Patcher | None:
    assert disable_dynamic
    if "up.weight" not in sd:
        return None
    model = Diffusion(model_options["custom_operations"])
    sd["fused.weight"] = torch.cat([sd.pop("first.weight"), sd.pop("second.weight")])
    assert model.load_state_dict(sd, strict=False, assign=False) == ([], [])
    return Patcher(model)


class CLIPType(Enum):
    STABLE_DIFFUSION = 1
    OMNIGEN2 = 17


class TextEncoder:
    def __init__(self, state_dicts: list[dict[str, torch.Tensor]], operations: Any, kind: CLIPType) -> None:
        self.kind = kind
        models = [Diffusion(operations) for _ in state_dicts]
        for model, sd in zip(models, state_dicts, strict=True):
            sd["fused.weight"] = torch.cat([sd.pop("first.weight"), sd.pop("second.weight")])
            assert model.load_state_dict(sd, assign=False) == ([], [])
        self.patcher = Patcher(nn.ModuleList(models))


def load_text_encoders(
    state_dicts: Any, embedding_directory: Any, clip_type: CLIPType, model_options: Any, disable_dynamic: bool
) -> TextEncoder:
    assert embedding_directory == ["embeddings"]
    assert disable_dynamic
    return TextEncoder(state_dicts, model_options["custom_operations"], clip_type)


class VAE:
    def __init__(self, sd: dict[str, torch.Tensor], metadata: Any = None) -> None:
        self.sd, self.metadata = sd, metadata

    def throw_exception_if_invalid(self) -> None:
        if "decoder.weight" not in self.sd:
            raise RuntimeError("not a VAE")


def load_checkpoint(
    sd: dict[str, torch.Tensor],
    output_vae: bool,
    output_clip: bool,
    embedding_directory: Any,
    model_options: Any,
    te_model_options: Any,
    metadata: Any = None,
    disable_dynamic: bool = False,
) -> Any:
    assert output_vae and output_clip

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in sd.items() if name.startswith(prefix)}

    model = load_state_dict(part("model."), model_options, disable_dynamic)
    text = load_text_encoders(
        [part("text.")], embedding_directory, CLIPType.STABLE_DIFFUSION, te_model_options, disable_dynamic
    )
    return None if model is None else (model, text, VAE(part("vae."), metadata), None)


class ProgressBar:
    made: ClassVar[list[ProgressBar]] = []

    def __init__(self, total: int) -> None:
        self.total, self.current = total, 0
        self.made.append(self)

    def update(self, value: int) -> None:
        self.current = min(self.total, self.current + value)


FOLDERS: dict[str, tuple[list[str], set[str]]] = {}


def names_of(key: str) -> list[str]:
    folders, ends = FOLDERS[key]
    files = [(folder, file) for folder in folders for file in Path(folder).rglob("*") if file.suffix in ends]
    return sorted(str(file.relative_to(folder)) for folder, file in files)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = {
        kind: tmp_path_factory.mktemp(kind) for kind in ("diffusion_models", "checkpoints", "text_encoders", "vae")
    }
    FOLDERS.update({kind: ([str(path)], {".safetensors"}) for kind, path in folders.items()})
    folder = folders["diffusion_models"]
    torch.manual_seed(0)
    values = {
        name: (0.05 * torch.randn(value.shape)).to(torch.bfloat16)
        for name, value in Diffusion(manual_cast).state_dict().items()
    }
    fused = values.pop("fused.weight")
    values |= {"first.weight": fused[:256].clone(), "second.weight": fused[256:].clone()}
    for name, tensors in (("model", values), ("other", {"weight": torch.zeros(2)})):
        save_file(tensors, folder / f"{name}.safetensors")
        df11.convert(folder / f"{name}.safetensors", folder / f"{name}.df11")
    vae = {"decoder.weight": (0.05 * torch.randn(512, 256)).to(torch.bfloat16)}
    whole = {f"model.{name}": value for name, value in values.items()}
    whole |= {f"text.{name}": value.clone() for name, value in values.items()}
    whole |= {f"vae.{name}": value for name, value in vae.items()}
    for kind, name, tensors in (
        ("checkpoints", "whole", whole),
        ("checkpoints", "other", {name: value for name, value in whole.items() if not name.startswith("model.")}),
        ("text_encoders", "sub/text", values),
        ("vae", "vae", vae),
    ):
        path = folders[kind] / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, {"config": "a"} if kind == "vae" else None)
        df11.convert(path, path.with_suffix(".df11"))
    return folder


@pytest.fixture(scope="module")
def package(models: Path) -> Iterator[ModuleType]:  # noqa: ARG001
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.ops": {"manual_cast": manual_cast},
        "comfy.sd": {
            "load_diffusion_model_state_dict": load_state_dict,
            "load_state_dict_guess_config": load_checkpoint,
            "load_text_encoder_state_dicts": load_text_encoders,
            "CLIPType": CLIPType,
            "VAE": VAE,
        },
        "comfy.lora": {"calculate_weight": calculate_weight},
        "comfy.float": {"stochastic_rounding": lambda value, dtype, seed: value.to(dtype)},  # noqa: ARG005
        "comfy.model_patcher": {"string_to_seed": len},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": lambda: None},
        "folder_paths": {
            "folder_names_and_paths": FOLDERS,
            "get_filename_list": names_of,
            "get_folder_paths": lambda key: [key],
            "get_full_path_or_raise": lambda key, name: str(Path(FOLDERS[key][0][0]) / name),
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        spec = importlib.util.spec_from_file_location("custom_nodes_df11", FOLDER / "__init__.py")  # as ComfyUI does
        inner = [f"custom_nodes_df11.{part}" for part in ("nodes", "patching", "loaders", "conversion")]
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "custom_nodes_df11", made)
        for name in inner:
            patch.delitem(sys.modules, name, raising=False)
        spec.loader.exec_module(made)
        yield made
        for name in inner:
            del sys.modules[name]


@pytest.fixture
def node(package: ModuleType) -> Any:
    return package.NODE_CLASS_MAPPINGS["LoadDiffusionModelDf11"]()


@pytest.fixture
def patcher(node: Any) -> Patcher:
    return node.load("model.df11")[0]


@pytest.fixture
def weight(patcher: Patcher) -> torch.Tensor:
    return patcher.model.up.weight


@pytest.fixture(scope="module")
def original(models: Path) -> Patcher:
    loaded = load_state_dict(
        df11.runtime.load_file(models / "model.df11", "cpu"), {"custom_operations": manual_cast}, True
    )
    assert loaded is not None
    return loaded


X = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def compressed(patcher: Patcher) -> list[str]:
    return [name for name, value in patcher.model.named_parameters() if type(value).__name__ == "Df11Weight"]


def test_the_node_is_as_comfyui_wants_it(package: ModuleType, node: Any) -> None:
    assert package.NODE_DISPLAY_NAME_MAPPINGS.keys() == package.NODE_CLASS_MAPPINGS.keys()
    assert node.INPUT_TYPES() == {"required": {"model_name": (["model.df11", "other.df11"],)}}
    assert FOLDERS["diffusion_models"][1] == {".safetensors"}
    assert callable(getattr(node, node.FUNCTION))
    assert node.RETURN_TYPES == ("MODEL",)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_the_same(node: Any, original: Patcher, mode: Callable[[], Any], dtype: torch.dtype) -> None:
    with mode():
        patcher = node.load("model.df11")[0]
        patcher.model.convolution.to(dtype)
        original.model.convolution.to(dtype)
        assert torch.equal(patcher.model(X.to(dtype)), original.model(X.to(dtype)))
        original.model.convolution.to(torch.bfloat16)
    assert compressed(patcher) == [
        "up.weight",
        "down.weight",
    ]  # The others are small, not in a linear layer, or made of two while loading.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["loaded", "loaded twice", "loaded, then unloaded", "in low memory"])
def test_loras(node: Any, original: Patcher, mode: Callable[[], Any], way: str) -> None:
    # They are not fused: the weights stay compressed, and outputs are those of fused ones to the bit.
    with mode():
        patcher = node.load("model.df11")[0]
        plain = patcher.model(X)
        changes = [0.1 * torch.randn(512, 256), 0.01 * torch.randn(512, 256)]
        outputs = []
        for loaded in (patcher, original):
            each = loaded.clone()
            assert type(each) is type(loaded)
            each.patches = {"up.weight": changes, "fused.weight": changes[:1]}
            each.load(low_memory=way == "in low memory")
            if way == "loaded twice":
                each.load()
            if way == "loaded, then unloaded":
                each.partially_unload()
            outputs.append(each.model(X))
            if each.model is patcher.model:
                assert compressed(patcher) == ["up.weight", "down.weight"]
            each.unpatch_model()
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], plain)
        assert compressed(patcher) == ["up.weight", "down.weight"]
        assert torch.equal(patcher.model(X), plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_is_the_tensor_that_it_decodes_to(node: Any, original: Patcher, mode: Callable[[], Any]) -> None:
    expected = original.model.up.weight.detach()
    with mode():
        weight = node.load("model.df11")[0].model.up.weight
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, torch.bfloat16, CPU)
    assert weight.nbytes < 0.75 * expected.nbytes
    for compute in (
        lambda w: w + 1,
        lambda w: w.float(),
        lambda w: w.to(torch.float32, copy=True),
        lambda w: w[3:7, ::2],
        lambda w: torch.cat([w, w]),
        lambda w: torch.stack(w.chunk(2)),
        lambda w: torch.empty_like(w, dtype=torch.float32).copy_(w),
        lambda w: torch.empty_like(w).copy_(w),
        lambda w: w.T @ w,
        lambda w: torch.std(w),
        lambda w: w.new_zeros(3, 4),
    ):
        with mode():
            got = compute(weight)
            assert torch.equal(got, compute(expected))
            assert type(got).__name__ != "Df11Weight"


def test_it_moves_and_is_copied_as_a_record(patcher: Patcher, weight: torch.Tensor) -> None:
    kind = type(weight)
    for copied in (
        weight.detach(),
        weight.clone(),
        copy.deepcopy(weight),
        weight.to(CPU, copy=True),
        weight.to(torch.bfloat16),
        weight.data,
    ):
        assert isinstance(copied, kind)
        assert torch.equal(copied.compressed.record, weight.compressed.record)
    record = weight.compressed.record
    patcher.model.to("meta")  # the only other device here
    moved = patcher.model.up.weight
    assert isinstance(moved, kind)
    assert moved.device == moved.compressed.record.device == torch.device("meta")
    assert moved.compressed.record.shape == record.shape


def test_it_cannot_be_written_to_or_saved(weight: torch.Tensor, tmp_path: Path) -> None:
    before = weight.float()
    for write in (
        lambda w: w.add_(1),
        lambda w: w.copy_(torch.zeros_like(before)),
        lambda w: w.data.copy_(w),
        lambda w: w.__setitem__(0, 1),
        lambda w: w[0].add_(1),
        lambda w: w.view(-1).zero_(),
        lambda w: w.chunk(2)[0].mul_(2),
        lambda w: torch.add(before, 1, out=w),
        lambda w: nn.init.normal_(w),
    ):
        with torch.no_grad(), pytest.raises(errors.UsageError, match="compressed"):
            write(weight)
    assert torch.equal(weight.float(), before)
    with pytest.raises(errors.UsageError, match="saved"):
        save_file({"weight": weight}, tmp_path / "model.safetensors")


def test_an_unknown_model_is_refused(node: Any) -> None:
    with pytest.raises(errors.UsageError, match="does not recognize"):
        node.load("other.df11")


def test_an_older_comfyui_has_no_dynamic_loading(
    package: ModuleType, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert package
    given: list[Any] = []

    def older(sd: Any, model_options: Any) -> Any:
        given.append((sd, model_options))
        return Patcher(nn.Module())

    monkeypatch.setattr(sys.modules["comfy.sd"], "load_diffusion_model_state_dict", older)
    assert node.load("model.df11")[0].load_device == CPU
    assert given[0][1]["custom_operations"].Linear.__mro__[1] is manual_cast.Linear


# Everything else that a workflow loads.


@torch.no_grad()
def test_a_checkpoint(package: ModuleType, original: Patcher) -> None:
    loader = package.NODE_CLASS_MAPPINGS["LoadCheckpointDf11"]()
    assert loader.INPUT_TYPES() == {"required": {"ckpt_name": (["other.df11", "whole.df11"],)}}
    model, clip, vae = loader.load("whole.df11")
    assert torch.equal(model.model(X), original.model(X))
    assert torch.equal(clip.patcher.model[0](X), original.model(X))
    assert compressed(model) == ["up.weight", "down.weight"]
    assert compressed(clip.patcher) == ["0.up.weight", "0.down.weight"]
    assert vae.sd["decoder.weight"].shape == (512, 256)
    with pytest.raises(errors.UsageError, match="does not recognize this checkpoint"):
        loader.load("other.df11")


@torch.no_grad()
def test_text_encoders(package: ModuleType, original: Patcher) -> None:
    loader = package.NODE_CLASS_MAPPINGS["LoadTextEncoderDf11"]()
    name = str(Path("sub", "text.df11"))  # with a backslash on Windows
    kinds = ["stable_diffusion", "omnigen2"]
    assert loader.INPUT_TYPES() == {
        "required": {"clip_name": ([name],), "type": (kinds,)},
        "optional": {"clip_name2": (["none", name],)},
    }
    for more, count in (({}, 1), ({"clip_name2": name}, 2)):
        (clip,) = loader.load(name, "omnigen2", **more)
        assert clip.kind is CLIPType.OMNIGEN2
        assert len(clip.patcher.model) == count
        assert len(compressed(clip.patcher)) == 2 * count
        assert torch.equal(clip.patcher.model[-1](X), original.model(X))


def test_a_vae(package: ModuleType) -> None:
    loader = package.NODE_CLASS_MAPPINGS["LoadVaeDf11"]()
    assert loader.INPUT_TYPES() == {"required": {"vae_name": (["vae.df11"],)}}
    (vae,) = loader.load("vae.df11")
    assert type(vae.sd["decoder.weight"]) is torch.Tensor
    assert vae.metadata == {"config": "a"}


def test_conversion(package: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = package.NODE_CLASS_MAPPINGS["ConvertToDf11"]()
    files = convert.INPUT_TYPES()["required"]["file"][0]
    assert files == [
        "checkpoints/other.safetensors",
        "checkpoints/whole.safetensors",
        "diffusion_models/model.safetensors",
        "diffusion_models/other.safetensors",
        f"text_encoders/{Path('sub', 'text.safetensors')}",
        "vae/vae.safetensors",
    ]
    target = models / "model.df11"
    before = target.read_bytes()
    target.unlink()

    def interrupt() -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["comfy.model_management"], "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(InterruptedError):
            convert.convert(files[2], False)
    assert not target.exists()
    found = convert.convert(files[2], False)
    assert found["result"] == (str(target),)
    assert "->" in found["ui"]["text"][0]
    assert target.read_bytes() == before
    bar = ProgressBar.made[-1]
    assert bar.current == bar.total >= (models / "model.safetensors").stat().st_size


def test_the_workflow_is_one_that_comfyui_can_open(package: ModuleType) -> None:
    workflow = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = {node["type"] for node in workflow["nodes"] if node["type"].endswith("Df11")}
    assert ours == {"LoadDiffusionModelDf11", "LoadTextEncoderDf11", "LoadVaeDf11"}
    for node in workflow["nodes"]:
        if node["type"] in ours:
            known = package.NODE_CLASS_MAPPINGS[node["type"]]
            given = known.INPUT_TYPES()
            assert len(node["widgets_values"]) == len(given["required"]) + len(given.get("optional", {}))
            assert tuple(output["type"] for output in node["outputs"]) == known.RETURN_TYPES
    seen = set()
    for link, source, slot, target, place, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][place]["link"] == link
        seen.add(link)
    assert seen == {entry["link"] for node in workflow["nodes"] for entry in node.get("inputs", ())}
