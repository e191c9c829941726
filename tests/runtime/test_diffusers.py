"""diffusers: ``from_pretrained`` loads a converted model or pipeline, equal to the bit; LoRA, offloading, saving."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
import transformers
from torch import nn

import df11
from df11 import runtime
from df11.formats import errors
from df11.runtime import modules

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.usefixtures("quiet_libraries"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft requires it
    pytest.mark.filterwarnings("ignore:.*multiple adapters in the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning"),  # diffusers passes it
]
BF16 = torch.bfloat16
CPU = torch.device("cpu")
NAME = "diffusion_pytorch_model"


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.to(BF16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Flux pipeline with both of its text encoders, as diffusers writes it, and converted."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(8, 12, 12),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 96),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    sizes = {
        "vocab_size": 300,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
    }
    clip = transformers.CLIPTextConfig(
        **sizes, max_position_embeddings=32, projection_dim=256, bos_token_id=0, eos_token_id=1
    )
    t5 = transformers.T5Config(vocab_size=300, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=randomized(vae),
        text_encoder=randomized(transformers.CLIPTextModel(clip)),
        tokenizer=None,
        text_encoder_2=randomized(transformers.T5EncoderModel(t5)),
        tokenizer_2=None,
        transformer=randomized(transformer),
    )
    folder = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(folder / "plain")
    df11.convert(folder / "plain", folder / "converted")
    return folder / "plain", folder / "converted"


def load(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=BF16, tokenizer=None, tokenizer_2=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformer(folder: Path, **options: Any) -> Any:
    return diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", **{"dtype": BF16} | options)


@torch.no_grad()
def image(pipeline: Any) -> torch.Tensor:
    ids = torch.arange(10)[None]
    pooled, prompt = pipeline.text_encoder(ids).pooler_output, pipeline.text_encoder_2(ids)[0]
    options = {
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    found: torch.Tensor = pipeline(prompt_embeds=prompt, pooled_prompt_embeds=pooled, **options).images
    return found


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> torch.Tensor:
    return image(load(folders[0]))


@pytest.fixture
def pipeline(folders: tuple[Path, Path]) -> Any:
    return load(folders[1])


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors*")}


# Loading.


def test_a_pipeline(pipeline: Any, expected: torch.Tensor, folders: tuple[Path, Path]) -> None:
    assert torch.equal(image(pipeline), expected)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        component = getattr(pipeline, name)
        report = runtime.memory_report(component)
        assert report.compressed
        assert report.compressed + report.verbatim < 0.8 * report.bf16, name
        assert component.dtype == BF16
    assert pipeline.transformer.num_parameters() == transformer(folders[0]).num_parameters()


def test_a_model(folders: tuple[Path, Path]) -> None:
    latents = torch.randn(1, 4, 8, 8).to(BF16)
    decoded = []
    for folder, options in (
        (folders[0] / "vae", {}),
        (folders[1] / "vae", {}),
        (folders[1], {"subfolder": "vae", "device_map": "cpu"}),
    ):
        vae = diffusers.AutoencoderKL.from_pretrained(folder, dtype=BF16, **options)
        with torch.no_grad():
            decoded.append(vae.decode(latents).sample)
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[0], decoded[2])
    assert any(isinstance(held.module, nn.Conv2d) for _, held in modules.compressed_modules(vae))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}])  # {} is F32.
def test_dtypes(options: dict[str, Any], folders: tuple[Path, Path], pipeline: Any) -> None:
    plain, found = (diffusers.AutoencoderKL.from_pretrained(folder / "vae", **options) for folder in folders)
    assert_same(found, plain)
    assert found.dtype == options.get("dtype", torch.float32)
    assert_same(pipeline.to(torch.float16).transformer, transformer(folders[0]).half())


def assert_same(model: Any, plain: Any) -> None:
    assert modules.is_compressed(model)
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value)


@pytest.mark.parametrize("options", [{"max_shard_size": "1MB"}, {"variant": "x"}], ids=["shards", "variant"])
def test_shards_and_variants(
    options: dict[str, str], folders: tuple[Path, Path], pipeline: Any, expected: torch.Tensor, tmp_path: Path
) -> None:
    transformer(folders[0]).save_pretrained(tmp_path / "plain" / "transformer", **options)
    df11.convert(tmp_path / "plain", tmp_path / "converted")
    assert any(
        (tmp_path / "converted" / "transformer" / name).is_file()
        for name in (f"{NAME}.df11.index.json", f"{NAME}.x.df11")
    )
    pipeline.transformer = transformer(tmp_path / "converted", variant=options.get("variant"))
    assert torch.equal(image(pipeline), expected)
    pipeline.transformer.save_pretrained(tmp_path / "saved" / "transformer", **options)
    assert weights(tmp_path / "saved") == weights(tmp_path / "plain")


def test_a_repository(
    folders: tuple[Path, Path], expected: torch.Tensor, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the Hub's client stores it in its cache.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for path in folders[1].rglob("*.*"):
        target = repository / "snapshots" / revision / path.relative_to(folders[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    found = diffusers.FluxTransformer2DModel.from_pretrained(
        "me/small", subfolder="transformer", cache_dir=tmp_path, local_files_only=True, dtype=BF16
    )
    pipeline.transformer = found
    assert torch.equal(image(pipeline), expected)
    with pytest.raises(OSError):
        diffusers.FluxTransformer2DModel.from_pretrained(
            "me/other", subfolder="transformer", cache_dir=tmp_path, local_files_only=True
        )


# What does not fit.


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"num_single_layers": 0}, {"joint_attention_dim": 128}])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}], ids=str)
def test_another_config(change: dict[str, int], options: dict[str, bool], folders: tuple[Path, Path]) -> None:
    """Missing tensors are initialized, unexpected ones are left out: what diffusers does with the original."""
    found: list[Any] = []
    for folder in folders:
        torch.manual_seed(0)
        try:
            model, info = transformer(folder, output_loading_info=True, **change, **options)
        except ValueError as error:
            found.append(str(error).replace(str(folder), ""))
        else:
            state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
            found.append(({name: sorted(map(str, keys)) for name, keys in info.items()}, state))
    if isinstance(found[0], str):
        assert "ignore_mismatched_sizes" in found[0]
        assert found[1] == found[0]
        return
    (expected, plain), (info, state) = found
    assert info == expected
    assert any(info.values())
    assert state.keys() == plain.keys()
    made = {name for key in ("missing_keys", "mismatched_keys") for name in re.findall(r"[\w.]{4,}", str(info[key]))}
    assert all(torch.equal(state[name], value) for name, value in plain.items() if name not in made)


def test_without_low_cpu_mem_usage(folders: tuple[Path, Path], pipeline: Any, expected: torch.Tensor) -> None:
    pipeline.transformer = transformer(folders[1], low_cpu_mem_usage=False)
    assert torch.equal(image(pipeline), expected)
    assert modules.is_compressed(pipeline.transformer)


def test_a_missing_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_bytes((folders[1] / "transformer" / "config.json").read_bytes())
    with pytest.raises(OSError, match=NAME):
        transformer(tmp_path)
    (tmp_path / "transformer" / f"{NAME}.df11").write_bytes(b"x" * 100)
    with pytest.raises(errors.SafetensorsError, match=NAME):
        transformer(tmp_path)


# Offloading, with the CPU as the device to load onto.


def group(how: str, **options: Any) -> Callable[[Any, Path], None]:
    def apply(pipeline: Any, folder: Path) -> None:
        if how == "disk":
            options.update(offload_to_disk_path=str(folder))
        for name in ("transformer",) if how == "disk" else ("transformer", "vae", "text_encoder_2"):
            diffusers.hooks.apply_group_offloading(
                getattr(pipeline, name), onload_device=CPU, offload_device=CPU, **options
            )

    return apply


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "groups, leaves": group("", offload_type="leaf_level"),
    "groups, blocks": group("", offload_type="block_level", num_blocks_per_group=1),
    "groups, disk": group("disk", offload_type="leaf_level"),
    "models": lambda pipeline, _: pipeline.enable_model_cpu_offload(device="cpu"),
    "accelerate, cpu": lambda pipeline, _: accelerate.cpu_offload(pipeline.transformer, execution_device=CPU),
    "accelerate, disk": lambda pipeline, folder: accelerate.disk_offload(
        pipeline.transformer, folder, execution_device=CPU
    ),
    "tiling": lambda pipeline, _: pipeline.vae.enable_tiling(),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_offloading(name: str, pipeline: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    OFFLOADS[name](pipeline, tmp_path)
    for _ in range(2):
        assert torch.equal(image(pipeline), expected)


@pytest.mark.parametrize("where", ["cpu", "auto", "disk", "split"])
def test_device_maps(
    where: str, folders: tuple[Path, Path], pipeline: Any, expected: torch.Tensor, tmp_path: Path
) -> None:
    parts = {
        name: "disk" if name == "single_transformer_blocks" else "cpu"
        for name, _ in pipeline.transformer.named_children()
    }
    device_map = {"disk": {"": "disk"}, "split": parts}.get(where, where)
    pipeline.transformer = transformer(folders[1], device_map=device_map, offload_folder=str(tmp_path))
    assert torch.equal(image(pipeline), expected)
    on_disk = where in ("disk", "split")
    assert any(parameter.is_meta for parameter in pipeline.transformer.parameters()) == on_disk
    assert (
        sum(path.stat().st_size for path in tmp_path.iterdir())
        < 0.05 * (folders[1] / "transformer" / f"{NAME}.df11").stat().st_size
    )


# LoRA and saving.


def test_lora(folders: tuple[Path, Path], pipeline: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    plain = load(folders[0])
    for number in (1, 2):
        torch.manual_seed(number)
        adapted = transformer(folders[0])
        adapted.add_adapter(
            peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0", "proj_out", "proj_mlp"], init_lora_weights=False)
        )
        layers = {
            name: 0.1 * torch.randn_like(value) for name, value in peft.get_peft_model_state_dict(adapted).items()
        }
        diffusers.FluxPipeline.save_lora_weights(tmp_path / str(number), transformer_lora_layers=layers)
        images = []
        for one in (pipeline, plain):
            one.load_lora_weights(tmp_path / str(number), adapter_name=f"a{number}")
            images.append(image(one))
        assert torch.equal(*images)
        assert not torch.equal(images[0], expected)
    for one in (pipeline, plain):
        one.set_adapters(["a1", "a2"], [0.5, 0.7])
    together = image(plain)
    assert torch.equal(image(pipeline), together)
    pipeline.unload_lora_weights()
    assert torch.equal(image(pipeline), expected)


def test_a_lora_is_fused(folders: tuple[Path, Path], pipeline: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
    plain = load(folders[0])
    for one in (pipeline, plain):
        torch.manual_seed(0)
        one.transformer.add_adapter(config)
    plain.transformer.fuse_lora()
    with pytest.warns(UserWarning, match="that an adapter changes are decoded"):
        pipeline.transformer.fuse_lora()
    assert modules.is_compressed(pipeline.transformer)
    assert torch.equal(image(pipeline), image(plain))


def test_saving_gives_the_original_checkpoint(
    pipeline: Any, folders: tuple[Path, Path], expected: torch.Tensor, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    assert weights(tmp_path / "saved") == weights(folders[0])
    assert torch.equal(image(load(tmp_path / "saved")), expected)
    df11.convert(tmp_path / "saved", tmp_path / "again")
    assert torch.equal(image(load(tmp_path / "again")), expected)
    pipeline.transformer.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    state = torch.load(tmp_path / "pickled" / f"{NAME}.bin")
    assert all(torch.equal(state[name], value) for name, value in transformer(folders[0]).state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "transformer" / "config.json").read_text())
