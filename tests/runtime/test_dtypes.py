"""Models that are not BF16, in torch, transformers and diffusers: compressed in memory, equal to the plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

import df11
from df11 import runtime
from df11.formats.container import Container
from df11.runtime import kernels
from df11.runtime import model as models
from df11.runtime.model import MismatchError
from df11.runtime.weight import CompressedWeight
from tests.support.cuda.device import emulate

pytestmark = [pytest.mark.libraries, pytest.mark.usefixtures("quiet_libraries")]
BF16, F16, F32, E4M3, E5M2 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
ROUNDED = "float32, cast to bfloat16 on loading, and not compressed in memory; df11-convert --cast bf16 would keep"


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.decode() if isinstance(tensor, CompressedWeight) else tensor.detach()
    return plain.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def dtypes_of_compressed(model: nn.Module) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters() if isinstance(weight, CompressedWeight)}


def all_large_are_compressed(model: nn.Module) -> bool:
    return all(isinstance(one, CompressedWeight) == (one.numel() >= models.SMALL) for one in model.parameters())


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "df11"]


def rounded(values: torch.Tensor) -> torch.Tensor:
    """F32 that BF16 can hold."""
    return values.to(BF16).to(F32)


# transformers.


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.06)
    return model


def pair(model: Any, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The model as its library writes it, and converted."""
    model.save_pretrained(folder / "plain")
    df11.convert(folder / "plain", folder / "converted", **options)
    return folder / "plain", folder / "converted"


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model: nn.Module) -> bytes:
    with torch.no_grad():
        return bits(model(input_ids=torch.tensor([[1, 2, 310, 5, 6]])).logits)


@pytest.fixture(scope="module")
def of_f16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(llama().to(F16), tmp_path_factory.mktemp("f16"))


@pytest.fixture(scope="module")
def of_f32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(llama(), tmp_path_factory.mktemp("f32"))


@pytest.fixture(scope="module")
def of_narrowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """F32 that was BF16 once."""
    return pair(llama().to(BF16).to(F32), tmp_path_factory.mktemp("narrowed"))


@pytest.mark.parametrize("options", [{"dtype": F16}, {}, {"dtype": "auto", "device_map": "cpu"}], ids=str)
def test_a_transformers_model_in_f16(options: dict[str, Any], of_f16: tuple[Path, Path], tmp_path: Path) -> None:
    plain, model = load(of_f16[0], **options), load(of_f16[1], **options)
    assert dtypes_of_compressed(model) == {F16}
    assert all_large_are_compressed(model)
    assert logits(model) == logits(plain)
    report = runtime.memory_report(model)
    assert report.compressed < 0.9 * report.bf16
    model.save_pretrained(tmp_path)
    saved, source = load_file(tmp_path / "model.safetensors"), load_file(of_f16[0] / "model.safetensors")
    assert {name: bits(one) for name, one in saved.items()} == {name: bits(one) for name, one in source.items()}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_model_that_is_cast(dtype: torch.dtype, of_f16: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    plain, model = load(of_f16[0], dtype=dtype), load(of_f16[1], dtype=dtype)
    assert dtypes_of_compressed(model) == {dtype}
    assert all_large_are_compressed(model)
    assert logits(model) == logits(plain) == logits(load(of_f16[1]).to(dtype))
    assert not lines(caplog)


def test_an_f32_model(of_f32: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    plain, model = load(of_f32[0]), load(of_f32[1])
    assert dtypes_of_compressed(model) == {F32}
    assert all_large_are_compressed(model)
    assert logits(model) == logits(plain)
    assert not lines(caplog)
    plain, model = load(of_f32[0], dtype=BF16), load(of_f32[1], dtype=BF16)
    assert not dtypes_of_compressed(model)
    assert logits(model) == logits(plain)
    (line,) = lines(caplog)
    assert ROUNDED in line


@pytest.mark.parametrize("on_disk", [False, True])
def test_f32_that_is_held_as_bf16(on_disk: bool, of_narrowed: tuple[Path, Path], tmp_path: Path) -> None:
    plain = load(of_narrowed[0])
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"} if on_disk else {"": "cpu"}
    model = load(of_narrowed[1], device_map=places, offload_folder=tmp_path / "offloaded")
    assert {one.dtype for one in model.parameters()} == {F32}
    if not on_disk:
        assert all_large_are_compressed(model)
        report = runtime.memory_report(model)
        assert report.compressed < 0.35 * report.bf16
        assert all(bits(one) == bits(plain.state_dict()[name]) for name, one in model.state_dict().items())
    assert dtypes_of_compressed(model) == {F32}
    assert logits(model) == logits(plain)
    plain, model = load(of_narrowed[0], dtype=BF16), load(of_narrowed[1], dtype=BF16)
    assert dtypes_of_compressed(model) == {BF16}
    assert all_large_are_compressed(model)
    assert logits(model) == logits(plain)
    assert type(model.lm_head.weight.float()) is torch.Tensor  # Only loaders get another weight.


def test_a_model_in_f32_that_is_cast_later(of_f32: tuple[Path, Path]) -> None:
    plain, model = (load(path).to(BF16) for path in of_f32)
    assert dtypes_of_compressed(model) == {BF16}  # In records of F32.
    assert logits(model) == logits(plain)


def test_what_was_rounded_is_bf16(of_f32: tuple[Path, Path], tmp_path: Path) -> None:
    df11.convert(of_f32[0], tmp_path / "converted", cast="bf16")
    for options, dtype in (({}, F32), ({"dtype": F32}, F32), ({"dtype": BF16}, BF16)):
        model = load(tmp_path / "converted", **options)
        assert dtypes_of_compressed(model) == {dtype}
        expected = load(of_f32[0]).to(BF16).to(dtype).state_dict()
        assert {name: bits(one) for name, one in model.state_dict().items()} == {
            name: bits(one) for name, one in expected.items()
        }
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    text = json.dumps({name: config[name] for name in config if "dtype" not in name})
    (tmp_path / "converted" / "config.json").write_text(text)
    assert dtypes_of_compressed(load(tmp_path / "converted")) == {BF16}


# FP8, with scales.


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in E4M3, and F32 factors for its blocks of 128 x 128."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=E4M3)
    for row in range(rows):
        for column in range(columns):
            box = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scales[row, column] = weight[box].abs().max() / 448
            values[box] = (weight[box] / scales[row, column]).to(E4M3)
    return values, scales


@pytest.fixture(scope="module")
def of_fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint as DeepSeek and Qwen publish them."""
    folder = tmp_path_factory.mktemp("fp8")
    model = llama().to(BF16)
    tensors = {}
    for name, value in model.state_dict().items():
        if "_proj." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantized(value.float())
        else:
            tensors[name] = value.clone()
    model.save_pretrained(folder / "plain")
    save_file(tensors, folder / "plain" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    df11.convert(folder / "plain", folder / "converted")
    return folder / "plain", folder / "converted"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, transformers keeps FP8")
def test_a_checkpoint_in_fp8(of_fp8: tuple[Path, Path]) -> None:
    """On a CPU, transformers multiplies the scales in as it loads: nothing stays FP8, here and there."""
    with Container(of_fp8[1] / "model.df11") as container:
        held = [container.info(name) for name in container.keys() if "_proj.weight" in name]
        assert {info.encoding for info in held if info.dtype == "F8_E4M3"} == {"df11"}
    with pytest.warns(UserWarning, match="14 of 16 compressed tensors are held decoded, as transformers changes them"):
        model = load(of_fp8[1], dtype=BF16)
    plain = load(of_fp8[0], dtype=BF16)
    assert {name: bits(one) for name, one in model.state_dict().items()} == {
        name: bits(one) for name, one in plain.state_dict().items()
    }
    assert logits(model) == logits(plain)


def test_layers_of_transformers_in_fp8_stay_compressed(tmp_path: Path) -> None:
    """Their kernels do not run on a CPU: this is what they multiply with."""
    torch.manual_seed(0)
    weight, scales = quantized(torch.randn(300, 384) * 0.02)
    save_file({"weight": weight, "weight_scale_inv": scales}, tmp_path / "x.safetensors")
    df11.convert(tmp_path / "x.safetensors", tmp_path / "x.df11")
    with torch.device("meta"):
        layer = FP8Linear(384, 300, block_size=(128, 128))
    runtime.load_model(layer, tmp_path / "x.df11", "cpu")
    assert dtypes_of_compressed(layer) == {E4M3}
    assert bits(layer.weight.to(BF16)) == bits(weight.to(BF16))
    assert bits(layer.weight_scale_inv) == bits(scales)


class Scaled(nn.Module):
    """A layer that multiplies the scales in as it runs: per tensor, channel, or block of 128 x 128."""

    def __init__(self, dtype: torch.dtype, *scales: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(256, 384, dtype=dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(scales), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        if self.scale.dim() == 2 and self.scale.shape[1] > 1:
            scale = self.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return nn.functional.linear(x, (self.weight.to(F32) * scale).to(x.dtype))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("scales", [(), (256, 1), (2, 3)], ids=str)
def test_fp8_with_scales_stays_compressed(dtype: torch.dtype, scales: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Scaled(dtype, *scales)
    plain.weight.copy_(torch.randn(256, 384) * 30)
    nn.init.uniform_(plain.scale)
    save_file(plain.state_dict(), tmp_path / "x.safetensors")
    df11.convert(tmp_path / "x.safetensors", tmp_path / "x.df11")
    model = runtime.load_model(Scaled(dtype, *scales).to("meta"), tmp_path / "x.df11", "cpu")
    assert dtypes_of_compressed(model) == {dtype}
    x = torch.randn(3, 384).to(BF16)
    assert bits(model(x)) == bits(plain(x))


# diffusers.


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, tuple[Path, Path]]:
    """A pipeline in F16, and one in F32 that was BF16 once; as diffusers writes them, and converted."""
    found = {}
    for dtype in (F16, F32):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 96),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
        )
        unet = unet.to(BF16).to(F32) if dtype == F32 else unet.to(dtype)
        folder = tmp_path_factory.mktemp("pipeline")
        found[dtype] = pair(diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()), folder)
    return found


def image(pipeline: Any) -> bytes:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    return bits(made.images)


@pytest.mark.parametrize(
    ("held", "options", "compressed"),
    [
        (F16, {"dtype": F16}, F16),
        (F32, {}, F32),
        (F32, {"dtype": F32}, F32),
        (F32, {"dtype": BF16}, BF16),
    ],
    ids=str,
)
def test_a_diffusers_pipeline(
    held: torch.dtype,
    options: dict[str, Any],
    compressed: torch.dtype,
    pipelines: dict[torch.dtype, tuple[Path, Path]],
) -> None:
    plain, pipeline = (diffusers.DiffusionPipeline.from_pretrained(path, **options) for path in pipelines[held])
    assert dtypes_of_compressed(pipeline.unet) == {compressed}
    assert all_large_are_compressed(pipeline.unet)
    assert all(type(one.float() + 0) is torch.Tensor for one in pipeline.unet.parameters())
    assert image(pipeline) == image(plain)


# Any model.


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 300), nn.Linear(300, 7)).to(dtype)


def converted(model: nn.Module, folder: Path, **options: Any) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    df11.convert(folder / "model.safetensors", folder / "model.df11", **options)
    return folder / "model.df11"


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_load_model_keeps_every_dtype_compressed(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = layers(dtype)
    loaded = runtime.load_model(layers(dtype).to("meta"), converted(plain, tmp_path), "cpu")
    assert dtypes_of_compressed(loaded) == {dtype}
    x = torch.randn(3, 300).to(dtype)
    assert bits(loaded(x)) == bits(plain(x))
    assert bits(torch.compile(loaded, backend="aot_eager")(x)) == bits(plain(x))
    assert bits(runtime.materialize(loaded)[0].weight) == bits(plain[0].weight)


def test_load_model_widens_and_rounds_f32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = layers(BF16).to(F32)
    plain[2].to(F32).weight.data.mul_(1 / 3)  # No longer BF16.
    path = converted(plain, tmp_path)
    loaded = runtime.load_model(layers(F32).to("meta"), path, "cpu")
    assert dtypes_of_compressed(loaded) == {F32}
    first, second = (loaded[n].weight.compressed.pieces[0].dtype for n in (0, 2))
    assert (first, second) == (BF16, F32)
    x = torch.randn(3, 300, requires_grad=True)
    assert bits(loaded(x)) == bits(plain(x))
    loaded(x).sum().backward()
    gradient, x.grad = x.grad, None
    plain(x).sum().backward()
    assert gradient is not None
    assert x.grad is not None
    assert bits(gradient) == bits(x.grad)
    compiled, saved = torch.compile(loaded, backend="aot_eager"), []

    def note(value: torch.Tensor) -> torch.Tensor:
        saved.append(value.shape)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        found = compiled(x)
    assert bits(found) == bits(plain(x))
    assert torch.Size([300, 300]) not in saved  # Only records, which are decoded and widened again.
    assert not lines(caplog)
    loaded = runtime.load_model(layers(BF16).to("meta"), path, "cpu")
    assert dtypes_of_compressed(loaded) == {BF16}
    assert type(loaded[2].weight) is nn.Parameter
    x = x.detach().to(BF16)
    assert bits(loaded(x)) == bits(plain.to(BF16)(x))
    assert lines(caplog) == [f"{path}: 1 of the tensors are {ROUNDED} them compressed"]
    with pytest.raises(MismatchError, match="dtypes differ"):
        runtime.load_model(layers(F16).to("meta"), path, "cpu")


def test_nothing_is_widened_that_was_rounded(tmp_path: Path) -> None:
    path = converted(layers(F32), tmp_path, cast="bf16")
    with pytest.raises(MismatchError, match=r"dtypes differ.*model\.to\(torch\.bfloat16\)"):
        runtime.load_model(layers(F32).to("meta"), path, "cpu")


def test_joined_weights_may_have_different_records(tmp_path: Path) -> None:
    """Of a tensor in F32 and one that is held as BF16."""
    tensors = {"a": torch.randn(300, 300), "b": rounded(torch.randn(300, 300))}
    save_file(tensors, tmp_path / "x.safetensors")
    df11.convert(tmp_path / "x.safetensors", tmp_path / "x.df11")
    with Container(tmp_path / "x.df11") as container:
        a, b = (runtime.CompressedTensor.load(container, name, "cpu") for name in "ab")
    for stacked in (False, True):
        both = runtime.compressed.joined([a, b.cast(F32)], 1, stacked=stacked)
        assert bits(both.decode()) == bits((torch.stack if stacked else torch.cat)([tensors["a"], tensors["b"]], 1))
    found = runtime.decode_many([a, b.cast(F32), b])
    assert [one.dtype for one in found] == [F32, F32, BF16]
    assert [bits(one) for one in found] == [bits(tensors["a"]), bits(tensors["b"]), bits(tensors["b"].to(BF16))]


def test_a_gpu_decodes_a_model_in_f16(of_f16: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = load(of_f16[0]), load(of_f16[1])
    _, cupy = emulate(monkeypatch)
    assert logits(model) == logits(plain)
    assert {dtype for dtype, _ in cupy.compiled} == {"BF16", "F16"}  # BF16 by the test's own setting.
    assert {kernels.DECODE, kernels.GATHER_ROWS} <= {name for name, _, _ in cupy.launches}
