"""The ComfyUI node against stand-ins with the interface of ComfyUI 0.3.64 to 0.38: bits, memory, LoRAs, refusals.

ComfyUI is not a package that could be installed here. examples/comfyui/df11/README.md says which versions were tried.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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


class Patcher:
    """As in ComfyUI: patched weights are replaced when the model is loaded and then restored, or patched on use."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.load_device, self.patches, self.backup = model, CPU, {}, {}

    def load(self, low_memory: bool = False) -> None:
        for name, patch in self.patches.items():
            module = self.model.get_submodule(name)
            if low_memory:
                module.weight_function = [patch]
                continue
            self.backup[name] = module.weight.to(device=CPU, copy=False)
            module.weight = nn.Parameter(
                patch(module.weight.to(torch.float32, copy=True)).to(module.weight.dtype), requires_grad=False
            )
        self.model.to(self.load_device)

    def unload(self) -> None:
        for name, weight in self.backup.items():
            self.model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
        for module in self.model.modules():
            if hasattr(module, "weight_function"):
                module.weight_function = []
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


FOLDERS: dict[str, tuple[list[str], set[str]]] = {}


def names_of(key: str) -> list[str]:
    folders, ends = FOLDERS[key]
    return sorted(file.name for folder in folders for file in Path(folder).iterdir() if file.suffix in ends)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion_models")
    FOLDERS["diffusion_models"] = ([str(folder)], {".safetensors"})
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
    return folder


@pytest.fixture(scope="module")
def package(models: Path) -> Iterator[ModuleType]:  # noqa: ARG001
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.ops": {"manual_cast": manual_cast},
        "comfy.sd": {"load_diffusion_model_state_dict": load_state_dict},
        "folder_paths": {
            "folder_names_and_paths": FOLDERS,
            "get_filename_list": names_of,
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
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "custom_nodes_df11", made)
        patch.delitem(sys.modules, "custom_nodes_df11.nodes", raising=False)
        spec.loader.exec_module(made)
        yield made
        del sys.modules["custom_nodes_df11.nodes"]


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
@pytest.mark.parametrize("low_memory", [False, True])
def test_loras(node: Any, original: Patcher, mode: Callable[[], Any], low_memory: bool) -> None:
    with mode():
        patcher = node.load("model.df11")[0]
        plain = patcher.model(X)
        change = 0.1 * torch.randn(512, 256)
        outputs = []
        for each in (patcher, original):
            each.patches = {"up": lambda value: value + change.to(value.dtype)}
            each.load(low_memory)
            if each is patcher:
                assert compressed(patcher) == (["up.weight", "down.weight"] if low_memory else ["down.weight"])
            outputs.append(each.model(X))
            each.unload()
            each.patches = {}
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
        return SimpleNamespace(load_device=CPU)

    monkeypatch.setattr(sys.modules["comfy.sd"], "load_diffusion_model_state_dict", older)
    assert node.load("model.df11")[0].load_device == CPU
    assert given[0][1]["custom_operations"].Linear.__mro__[1] is manual_cast.Linear
