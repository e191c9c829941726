"""transformers: ``from_pretrained`` loads a converted folder, equal to the bit; what does not fit raises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

import df11
from df11 import runtime
from df11.formats import errors
from df11.runtime import cpu, for_transformers, modules
from df11.runtime.compressed import CompressedTensor
from df11.runtime.model import MismatchError
from df11.runtime.weight import CompressedWeight

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft requires it
]
BF16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def randomized(model: nn.Module, std: float = 0.06) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.to(BF16)


def pair(model: Any, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The model as transformers writes it, and converted."""
    plain, converted = folder / "plain", folder / "converted"
    randomized(model).save_pretrained(plain, **options)  # type: ignore[operator]
    df11.convert(plain, converted)
    return plain, converted


def qwen(**options: Any) -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | options,
        vision_config={
            "depth": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 4,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 256,
        },
        image_token_id=310,
        video_token_id=311,
        vision_start_token_id=312,
        vision_end_token_id=313,
        tie_word_embeddings=True,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(qwen(), tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def original(folders: tuple[Path, Path]) -> Any:
    return load(folders[0])


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Any:
    return load(folders[1])


def load(path: Path | str, **options: Any) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(path, **{"dtype": BF16} | options)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 2, 312, 310, 310, 310, 310, 313, 5, 6]])
    torch.manual_seed(1)
    pixels = torch.randn(16, 3 * 2 * 14 * 14).to(BF16)
    grid = torch.tensor([[1, 4, 4]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 310).int(),
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**inputs()).logits
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


# Loading.


def test_text_and_image(model: Any, original: Any) -> None:
    assert torch.equal(logits(model), logits(original))
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    for arguments in (ids, inputs()):
        found, expected = (one.generate(**arguments, max_new_tokens=6, do_sample=False) for one in (model, original))
        assert torch.equal(found, expected)
    assert len([name for name, _ in modules.compressed_modules(model)]) == 25
    assert 0.6 < runtime.memory_report(model).compressed / runtime.memory_report(model).bf16 < 0.7
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert {
        name: value for name, value in model.named_buffers() if value.dtype == torch.float32
    }  # the rotary frequencies
    for (name, found), (_, expected) in zip(model.named_buffers(), original.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert (model.dtype, model.device, model.training) == (BF16, CPU, False)
    assert model.num_parameters() == original.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    assert model.generation_config.to_dict() == original.generation_config.to_dict()


def test_dtypes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert load(folders[1], dtype="auto").dtype == BF16
    for dtype in (torch.float16, torch.float32):
        model, plain = load(folders[1], dtype=dtype), load(folders[0], dtype=dtype)
        assert model.dtype == plain.dtype == dtype
        assert len(list(modules.compressed_modules(model))) == 25
        assert torch.equal(logits(model), logits(plain))
    for path in folders[1].iterdir():  # A config that does not state the dtype.
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, dtype="auto").dtype == BF16


def test_casts(model: Any, folders: tuple[Path, Path]) -> None:
    plain = load(folders[0])
    for dtype in (torch.float16, torch.float32, BF16):
        assert torch.equal(logits(model.to(dtype)), logits(plain.to(dtype)))
    assert len(list(modules.compressed_modules(model))) == 25


@pytest.mark.parametrize("options", [{"max_shard_size": "2MB"}, {"variant": "x"}], ids=["shards", "variant"])
def test_shards_and_variants(options: dict[str, str], original: Any, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path / "plain", **options)
    df11.convert(tmp_path / "plain", tmp_path / "converted" / "part")
    assert any((tmp_path / "converted" / "part" / name).is_file() for name in ("model.df11.index.json", "model.x.df11"))
    model = load(tmp_path / "converted", subfolder="part", variant=options.get("variant"))
    assert torch.equal(logits(model), logits(original))
    model.save_pretrained(tmp_path / "saved", **options)
    assert files(tmp_path / "saved") == files(tmp_path / "plain")


def test_a_repository(
    folders: tuple[Path, Path], original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the Hub's client stores it in its cache.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--small"
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for path in folders[1].iterdir():
        (repository / "snapshots" / revision / path.name).write_bytes(path.read_bytes())
    model = load("me/small", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(model), logits(original))
    with pytest.raises(OSError):
        load("me/other", cache_dir=tmp_path, local_files_only=True)


def test_weights_that_transformers_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    plain, converted = pair(transformers.Qwen3MoeForCausalLM(config), tmp_path)
    original, model = (transformers.AutoModelForCausalLM.from_pretrained(p, dtype=BF16) for p in (plain, converted))
    ids = torch.tensor([[5, 6, 7]])
    decoded: list[int] = []
    decode = cpu.Cpu.decode

    def counting(self: Any, ranges: Any, **options: Any) -> None:
        decoded.extend(part.last - part.first for part in ranges)
        decode(self, ranges, **options)

    monkeypatch.setattr(cpu.Cpu, "decode", counting)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, CompressedWeight)
    assert runtime.memory_report(model).compressed > 0.9 * (converted / "model.df11").stat().st_size
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        for one in (model, original):
            one.config._experts_implementation = implementation
        with torch.no_grad():
            assert torch.equal(model(ids).logits, original(ids).logits), implementation
        # One of the two experts per token; each that is used is decoded once.
        decoded.clear()
        with torch.no_grad():
            experts(torch.ones(3, 256, dtype=BF16), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=BF16))
        assert sum(decoded) == 3 * 256 * 256, implementation
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(plain)


def test_a_look_at_a_dtype_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # T5 asks for the dtype of wo.weight three times per layer.
    config = transformers.T5Config(vocab_size=300, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
    plain, converted = pair(transformers.T5EncoderModel(config), tmp_path)
    original, model = (transformers.T5EncoderModel.from_pretrained(path, dtype=BF16) for path in (plain, converted))
    decode, calls = CompressedTensor.decode, []
    monkeypatch.setattr(CompressedTensor, "decode", lambda self: calls.append(self) or decode(self))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids)[0], original(ids)[0])
        count = len(calls)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids)[0], original(ids)[0])
    linear = [held for _, held in modules.compressed_modules(model) if isinstance(held.module, nn.Linear)]
    assert count == len(linear) == 12


# What does not fit.


CHANGES: dict[str, Any] = {
    "more layers": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "fewer layers": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "other sizes": {"intermediate_size": 384},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_config(change: str, folders: tuple[Path, Path]) -> None:
    """Missing tensors are initialized, unexpected ones are left out: what transformers does with the original."""
    found = []
    for folder in folders:
        config = transformers.AutoConfig.from_pretrained(folder)
        for name, value in CHANGES[change].items():
            setattr(config.text_config, name, value)
        options = {"config": config, "output_loading_info": True}
        if change == "other sizes":
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                load(folder, **options)
            options["ignore_mismatched_sizes"] = True
        torch.manual_seed(0)
        found.append(load(folder, **options))
    (plain, expected), (model, info) = found
    assert {name: sorted(map(str, keys)) for name, keys in info.items()} == {
        name: sorted(map(str, keys)) for name, keys in expected.items()
    }
    assert any(info.values())
    assert torch.equal(logits(model), logits(plain))


def test_damage_and_missing_shards(folders: tuple[Path, Path], original: Any, tmp_path: Path) -> None:
    data = bytearray((folders[1] / "model.df11").read_bytes())
    data[-70_000] ^= 1
    (tmp_path / "model.df11").write_bytes(data)
    (tmp_path / "config.json").write_bytes((folders[1] / "config.json").read_bytes())
    for options in (
        {},
        {"device_map": SPLIT, "offload_folder": str(tmp_path / "offload")},
    ):  # Even if records stay in their file.
        with pytest.raises(errors.ChecksumError, match=r"model\.df11, tensor "):
            load(tmp_path, **options)
    original.save_pretrained(tmp_path / "plain", max_shard_size="2MB")
    df11.convert(tmp_path / "plain", tmp_path / "shards")
    next((tmp_path / "shards").glob("*-00002-of-*.df11")).unlink()
    with pytest.raises(errors.MissingError, match="-00002-of-"):
        load(tmp_path / "shards")


def test_shards_that_do_not_belong_together(folders: tuple[Path, Path], original: Any, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path / "plain", max_shard_size="2MB")
    df11.convert(tmp_path / "plain", tmp_path / "shards")
    shard = next((tmp_path / "shards").glob("*-00002-of-*.df11"))
    shard.write_bytes((folders[1] / "model.df11").read_bytes())
    with pytest.raises(MismatchError, match="two shards hold this tensor"):
        load(tmp_path / "shards")
    index = tmp_path / "shards" / "model.df11.index.json"
    for text, what in (
        ("[", "not JSON"),
        ('{"weight_map": {}}', "not a shard index"),
        ('{"weight_map": {"a": "../x.df11"}}', "another folder"),
    ):
        index.write_text(text)
        with pytest.raises(errors.FormatError, match=what):
            load(tmp_path / "shards")


def test_quantizing_is_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.QuantoConfig(weights="int8")
    quantizer = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["quanto"]
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(quantizer, "preprocess_model", lambda *_, **__: None)
    with pytest.raises(errors.UsageError, match="cannot be quantized"):
        load(folders[1], quantization_config=config)


def test_a_transformers_that_is_too_old(folders: tuple[Path, Path]) -> None:
    class Library:
        PreTrainedModel = object

        @staticmethod
        def _get_resolved_checkpoint_files(pretrained_model_name_or_path: str, subfolder: str = "") -> str:
            return pretrained_model_name_or_path + subfolder

    for_transformers.install(Library)
    with pytest.raises(errors.UsageError, match=r"needs transformers 5\.20"):
        Library._get_resolved_checkpoint_files(pretrained_model_name_or_path=str(folders[1]))
    assert Library._get_resolved_checkpoint_files(pretrained_model_name_or_path=str(folders[0])) == str(folders[0])


UNREGISTERED = """
import sys, torch, transformers, diffusers
transformers.logging.set_verbosity_error()
load = lambda: transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
try:
    load()
except OSError as error:
    assert "model.safetensors" in str(error), error
else:
    raise AssertionError("loaded")
import df11.runtime
print(type(load().lm_head.weight).__name__)
"""
LIGHT = """
import sys, df11.runtime
assert not {"torch", "transformers", "diffusers", "numpy"} & set(sys.modules)
import transformers.modeling_utils, diffusers.models.modeling_utils
assert hasattr(transformers.modeling_utils._get_resolved_checkpoint_files, "__wrapped__")
assert hasattr(diffusers.models.modeling_utils.load_state_dict, "__wrapped__")
assert transformers.modeling_utils.__spec__.loader.get_source("transformers.modeling_utils")
print("CompressedWeight")
"""


@pytest.mark.parametrize("script", [UNREGISTERED, LIGHT], ids=["imported later", "imported before"])
def test_registration(script: str, folders: tuple[Path, Path]) -> None:
    run = subprocess.run([sys.executable, "-c", script, str(folders[1])], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1:]) == (0, ["CompressedWeight"]), run.stderr


# Placing.

TEXT = "model.language_model"
SPLIT = {
    "model.visual": "cpu",
    f"{TEXT}.embed_tokens": "cpu",
    f"{TEXT}.layers.0": "cpu",
    f"{TEXT}.layers.1": "disk",
    f"{TEXT}.norm": "disk",
    f"{TEXT}.rotary_emb": "cpu",
    "lm_head": "cpu",
}
MAPS: dict[str, dict[str, Any]] = {
    "cpu": {"device_map": "cpu"},
    "one device": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto"},
    "auto, disk": {"device_map": "auto", "max_memory": {"cpu": 4_000_000}},
    "disk": {"device_map": {"": "disk"}},
    "split": {"device_map": SPLIT},
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_device_maps(name: str, folders: tuple[Path, Path], original: Any, tmp_path: Path) -> None:
    model = load(folders[1], offload_folder=str(tmp_path / "offload"), **MAPS[name])
    assert torch.equal(logits(model), logits(original))
    on_disk = name in ("auto, disk", "disk", "split")
    assert any(parameter.is_meta for parameter in model.parameters()) == on_disk
    if on_disk:  # What is compressed stays in the container.
        written = sum(path.stat().st_size for path in (tmp_path / "offload").iterdir())
        assert written < 0.2 * (folders[1] / "model.df11").stat().st_size
    if name == "split":  # What is not on disk has been copied from the file to memory.
        held = [value.record for part, value in model.named_parameters() if "layers.0.mlp" in part]
        assert held and all(
            record.data_ptr() % 64 == 0 and record.untyped_storage().nbytes() == record.numel() for record in held
        )
    model.save_pretrained(tmp_path / "saved")
    plain = load(folders[0], offload_folder=str(tmp_path / "offload2"), **MAPS[name])
    logits(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert files(tmp_path / "saved") == files(tmp_path / "plain")


def test_disk_without_a_folder(folders: tuple[Path, Path]) -> None:
    with pytest.raises(errors.UsageError, match="pass offload_folder"):
        load(folders[1], device_map=SPLIT)


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder / "offload", execution_device=CPU),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, SPLIT, offload_dir=folder / "offload", main_device="cpu"
    ),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_accelerate(name: str, model: Any, original: Any, tmp_path: Path) -> None:
    OFFLOADS[name](model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(original))


# Saving.


def test_saving_gives_the_original_checkpoint(
    model: Any, original: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(folders[0])
    assert torch.equal(logits(load(tmp_path / "saved")), logits(original))
    df11.convert(tmp_path / "saved", tmp_path / "again")
    assert (tmp_path / "again" / "model.df11").read_bytes() == (folders[1] / "model.df11").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert files(tmp_path / "given") == files(folders[0])
    assert isinstance(model.lm_head.weight, CompressedWeight)  # which is as before


# LoRA.


@pytest.mark.parametrize("how", ["peft", "add_adapter"])
def test_lora(how: str, model: Any, folders: tuple[Path, Path], original: Any, tmp_path: Path) -> None:
    before = logits(original)
    other = load(folders[0])
    adapted = []
    for one in (model, other):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False)
        torch.manual_seed(3)
        if how == "peft":
            adapted.append(peft.get_peft_model(one, config))
        else:
            one.add_adapter(config)
            adapted.append(one)
    assert torch.equal(logits(adapted[0]), logits(adapted[1]))
    assert not torch.equal(logits(adapted[0]), before)
    for one, folder in zip(adapted, ("a", "b"), strict=True):
        one.save_pretrained(tmp_path / folder)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    if how == "peft":
        with pytest.warns(UserWarning, match="that an adapter changes are decoded"):
            merged = adapted[0].merge_and_unload()
        assert modules.is_compressed(merged)
        assert torch.equal(logits(merged), logits(adapted[1].merge_and_unload()))


def test_training_a_lora(model: Any, folders: tuple[Path, Path]) -> None:
    gradients = []
    for one in (model, load(folders[0])):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(
            one, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
        adapted(**inputs()).logits.float().pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in adapted.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
