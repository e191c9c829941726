"""What libraries do with weights beside loading them: compressed ones give what BF16 gives, or one clear error."""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import df11
from df11 import runtime
from df11.runtime import for_others
from df11.runtime.modules import compressed_modules, is_compressed
from df11.runtime.weight import CompressedWeight, FrozenWeightError
from tests.runtime.test_weight import coded, random

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft requires it
]
BF16 = torch.bfloat16
IDS = torch.tensor([[1, 5, 7, 300]])


class Layers(nn.Module):
    """A layer of each kind that peft knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(400, 256)
        self.linear = nn.Linear(256, 256)
        self.convolution = nn.Conv1d(256, 256, 3, padding=1)
        self.image = nn.Conv2d(256, 256, 1)
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.head = nn.Linear(256, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.embedding(ids)).relu()
        x = self.image(self.convolution(x.transpose(1, 2))[..., None])[..., 0].transpose(1, 2)
        return self.head(self.attention(x, x, x)[0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Layers().to(BF16).eval()


@pytest.fixture(scope="module")
def loaded(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return through_df11(plain, Layers, tmp_path_factory.mktemp("layers"))


def through_df11(model: nn.Module, make: Callable[[], nn.Module], folder: Path) -> nn.Module:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "m.safetensors")
    df11.convert(folder / "m.safetensors", folder / "m.df11")
    return runtime.load_model(make().to(BF16).eval(), folder / "m.df11", "cpu")


# Training beside it.

Lora: Any = peft.LoraConfig
ADAPTERS: dict[str, Any] = {
    **{
        f"LoRA, {name}": Lora(r=4, target_modules=[name], init_lora_weights=False)
        for name, _ in Layers().named_children()
    },
    **{
        f"DoRA, {name}": Lora(r=4, target_modules=[name], init_lora_weights=False, use_dora=True)
        for name in ("embedding", "linear", "convolution", "image")
    },
    "GLoRA": peft.GloraConfig(r=4, target_modules=["linear"]),
    "OFT": peft.OFTConfig(oft_block_size=32, r=0, target_modules=["linear"], init_weights=False),
    "tokens": Lora(r=4, target_modules=["linear"], trainable_token_indices={"embedding": [1, 5]}),
    "parameters": Lora(r=4, target_modules=[], target_parameters=["linear.weight"], init_lora_weights=False),
    "a whole layer": Lora(r=4, target_modules=["linear"], modules_to_save=["head"]),
    "biases": Lora(r=4, target_modules=["linear"], bias="all"),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore:modules_to_save. the copy:UserWarning")
def test_adapters(name: str, plain: nn.Module, loaded: nn.Module) -> None:
    """Outputs, gradients, and a step of training, to the bit; and the number of weights that peft shows."""
    found: list[Any] = []
    for base in (plain, loaded):
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(ADAPTERS[name])).eval()
        before = model(IDS)
        before.float().pow(2).mean().backward()
        gradients = {part: value.grad for part, value in model.named_parameters() if value.grad is not None}
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        found.append((before, model(IDS), gradients, model.get_nb_trainable_parameters()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2].keys() == found[1][2].keys() != set()
    assert all(torch.equal(value, found[1][2][part]) for part, value in found[0][2].items())
    assert found[0][3] == found[1][3]
    assert any(value.any() for value in found[1][2].values())


def test_a_layer_that_peft_trains_as_a_whole_is_decoded(loaded: nn.Module) -> None:
    base = copy.deepcopy(loaded)
    with pytest.warns(UserWarning, match="modules_to_save: the copy for 'default' is decoded"):
        model: Any = peft.get_peft_model(base, copy.deepcopy(ADAPTERS["a whole layer"]))
    wrapper = model.base_model.model.head
    assert isinstance(wrapper.original_module.weight, CompressedWeight)
    assert type(wrapper.modules_to_save["default"].weight) is nn.Parameter
    assert wrapper.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_is_initialized_from_weights(how: str, plain: nn.Module, loaded: nn.Module) -> None:
    outputs = []
    for one in (copy.deepcopy(plain), copy.deepcopy(loaded)):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = peft.get_peft_model(one, Lora(r=4, target_modules=["linear"], init_lora_weights=how))
        outputs.append(adapted(IDS))
    assert "that an adapter changes are decoded" in str([str(one.message) for one in caught])
    assert is_compressed(adapted)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["LoRA, linear", "LoRA, embedding", "OFT", "parameters"])
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_merged(name: str, safe: bool, plain: nn.Module, loaded: nn.Module) -> None:
    results = []
    for one in (copy.deepcopy(plain), copy.deepcopy(loaded)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(one, copy.deepcopy(ADAPTERS[name]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted.merge_adapter(safe_merge=safe)
        merged = adapted(IDS)
        adapted.unmerge_adapter()
        results.append((merged, adapted(IDS)))
    assert "that an adapter changes are decoded" in str([str(one.message) for one in caught])
    assert is_compressed(adapted)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(results[0][0], plain(IDS))


def test_what_peft_prepares_for_training(plain: nn.Module, loaded: nn.Module) -> None:
    outputs = []
    for one in (copy.deepcopy(plain), copy.deepcopy(loaded)):
        model: Any = peft.prepare_model_for_kbit_training(one, use_gradient_checkpointing=False)
        outputs.append(model.head(model.linear(model.embedding(IDS))))
    assert torch.equal(*outputs)
    assert outputs[0].dtype == model.head.weight.dtype == torch.float32
    assert is_compressed(model)


@pytest.fixture
def group() -> Iterator[Any]:
    """One process as a group."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()


class Lowrank(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.base = nn.Linear(256, 300, bias=False, dtype=BF16)
        self.base.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        torch.manual_seed(0)
        self.lora = nn.Linear(256, 300, bias=False, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_ddp_and_fsdp(group: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def trained(model: nn.Module) -> list[torch.Tensor]:
        out = model(random(4, 256))
        out.float().pow(2).sum().backward()
        gradients: list[Any] = [value.grad for value in model.parameters() if value.grad is not None]
        return [out, *(value.full_tensor() if hasattr(value, "full_tensor") else value for value in gradients)]

    expected = trained(Lowrank(random(300, 256)))
    model = Lowrank(coded(random(300, 256)))
    keeping = fully_shard(model, mesh=group, ignored_params={model.base.weight})
    assert isinstance(model.base.weight, CompressedWeight)
    with pytest.warns(UserWarning, match="sharded decoded; pass them as ignored_params"):
        sharding = fully_shard(Lowrank(coded(random(300, 256))), mesh=group)
    for one in (DistributedDataParallel(Lowrank(coded(random(300, 256)))), keeping, sharding):
        assert all(torch.equal(found, right) for found, right in zip(trained(one), expected, strict=True))
    with pytest.raises(FrozenWeightError, match="ignored_states"):
        FullyShardedDataParallel(Lowrank(coded(random(300, 256))), device_id=torch.device("cpu"))


def test_replicas(plain: nn.Module, loaded: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those of DataParallel, with copies in place of the broadcast to GPUs.
    module = sys.modules["torch.nn.parallel.replicate"]
    copies = lambda tensors, devices, detach=False: [[t.detach().clone() for t in tensors] for _ in devices]  # noqa: ARG005, E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_, **__: device)
    for replica in module.replicate(loaded, [0, 1]):
        assert torch.equal(replica(IDS), plain(IDS))


@torch.no_grad()
def test_averages(plain: nn.Module, loaded: nn.Module) -> None:
    other = copy.deepcopy(plain).requires_grad_(False)
    for value in other.parameters():
        value.mul_(1.1)
    for options in ({"multi_avg_fn": get_ema_multi_avg_fn(0.99)}, {}):
        average = AveragedModel(copy.deepcopy(loaded), **options)  # type: ignore[arg-type]
        with pytest.raises(FrozenWeightError, match="materialize"):
            average.update_parameters(other)
        assert torch.equal(average(IDS), plain(IDS))
    kept = copy.deepcopy(loaded)
    for ours, theirs in zip(kept.state_dict().values(), loaded.state_dict().values(), strict=True):
        ours.copy_(0.5 * ours + 0.5 * theirs)  # These do not.
    assert torch.equal(kept(IDS), plain(IDS))


# Modules that are changed.

REWRITTEN: dict[str, Callable[[], nn.Module]] = {
    "weight_norm, old": lambda: nn.utils.weight_norm(nn.Linear(512, 512)),
    "weight_norm, convolution": lambda: nn.utils.weight_norm(nn.Conv1d(512, 256, 3, padding=1)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(512, 512)),
    "spectral_norm, old": lambda: nn.utils.spectral_norm(nn.Linear(512, 512)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(512, 512)),
    "prune": lambda: prune.l1_unstructured(nn.Linear(512, 512), "weight", amount=0.3),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_that_compute_their_weight(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(REWRITTEN[name]()).to(BF16).eval()
    found = through_df11(layer, lambda: nn.Sequential(REWRITTEN[name]()), tmp_path)
    assert is_compressed(found)
    x = random(512, 20) if "convolution" in name else random(3, 512)
    with torch.no_grad():
        assert torch.equal(found(x), layer(x))


def test_changing_a_layer_that_is_loaded(plain: nn.Module, loaded: nn.Module) -> None:
    for change in (
        parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),  # type: ignore[no-untyped-call]
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones_like(layer.weight))),
    ):
        outputs = []
        for model in (copy.deepcopy(plain), copy.deepcopy(loaded)):
            change(model.linear)
            outputs.append(model(IDS))
        assert torch.equal(*outputs)


def test_recurrent_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(256, 256, num_layers=2, batch_first=True).to(BF16).eval()
    found = through_df11(layer, lambda: nn.LSTM(256, 256, num_layers=2, batch_first=True), tmp_path)
    assert is_compressed(found)
    for model in (found, copy.deepcopy(found), runtime.materialize(found)):
        assert torch.equal(model(random(2, 5, 256))[0], layer(random(2, 5, 256))[0])


# Loading.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(BF16).save_pretrained(folder / "plain")
    df11.convert(folder / "plain", folder / "df11")
    return folder / "plain", folder / "df11"


def causal(folder: Path, **options: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=BF16, **options).eval()


def test_device_maps_count_compressed_bytes(llama: tuple[Path, Path], tmp_path: Path) -> None:
    report = runtime.memory_report(causal(llama[1]))
    limit = {"cpu": int(0.9 * report.bf16)}
    assert report.compressed + report.verbatim + report.scratch < limit["cpu"]
    found = causal(llama[1], device_map="auto", max_memory=limit, offload_folder=tmp_path)
    assert set(found.hf_device_map.values()) == {"cpu"}
    plain = causal(llama[0], device_map="auto", max_memory=limit, offload_folder=tmp_path)
    assert "disk" in plain.hf_device_map.values()
    import accelerate

    assert set(accelerate.infer_auto_device_map(causal(llama[1]), max_memory=limit).values()) == {"cpu"}


@torch.no_grad()
def test_a_head_of_ones_own_and_no_head(llama: tuple[Path, Path]) -> None:
    found = []
    for folder in llama:
        body = transformers.AutoModel.from_pretrained(folder, dtype=BF16)
        torch.manual_seed(0)
        classes = transformers.LlamaForSequenceClassification.from_pretrained(folder, dtype=BF16, num_labels=3)
        classes.config.pad_token_id = 0
        found.append((body(IDS)[0], classes(IDS).logits))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert is_compressed(body) and is_compressed(classes)


@torch.no_grad()
def test_resizing_and_tying(llama: tuple[Path, Path]) -> None:
    plain, model = causal(llama[0]), causal(llama[1])
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain.resize_token_embeddings(1010, mean_resizing=False)
    with pytest.warns(UserWarning, match="embeddings are decoded"):
        model.resize_token_embeddings(1010, mean_resizing=False)
    assert type(model.lm_head.weight) is nn.Parameter
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert is_compressed(model)
    assert torch.equal(model(IDS).logits[..., :1000], plain(IDS).logits[..., :1000])


def test_loading_in_inference_mode(llama: tuple[Path, Path]) -> None:
    gradients = []
    for folder in llama:
        with torch.inference_mode(folder is llama[1]):
            model = causal(folder)
        embeddings = random(1, 4, 256).requires_grad_()
        model.requires_grad_(False)
        model(inputs_embeds=embeddings).logits.float().pow(2).sum().backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)


def test_values_of_ones_own(llama: tuple[Path, Path]) -> None:
    model = causal(llama[1])
    with pytest.raises(RuntimeError, match="materialize"):
        model.load_state_dict({"model.layers.0.mlp.up_proj.weight": random(512, 256)}, strict=False)
    assert torch.equal(model(IDS).logits, causal(llama[0])(IDS).logits)
    with pytest.raises(RuntimeError, match="materialize"):
        model.load_state_dict({name: value + 1 for name, value in causal(llama[0]).state_dict().items()})
    with pytest.raises(runtime.model.MismatchError, match=r"LlamaForCausalLM\.from_pretrained"):
        with torch.device("meta"):
            empty = transformers.LlamaForCausalLM(model.config).to(BF16)
        runtime.load_model(empty, llama[1], "cpu", rename=lambda name: f"old.{name}")


def test_reading_from_outside_decodes_one_weight(llama: tuple[Path, Path]) -> None:
    plain, model = causal(llama[0]), causal(llama[1])
    assert (model.dtype, model.num_parameters()) == (plain.dtype, plain.num_parameters())
    head = nn.Linear(256, 1000, bias=False, dtype=BF16)
    head.load_state_dict({"weight": model.lm_head.weight})
    assert torch.equal(head.weight, plain.lm_head.weight)
    taken = nn.Embedding.from_pretrained(model.get_input_embeddings().weight[:10].float())
    assert torch.equal(taken.weight, plain.get_input_embeddings().weight[:10].float())


def test_parts_that_diffusers_copies_into_other_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=256, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    unet.to(BF16).save_pretrained(tmp_path / "plain")
    df11.convert(tmp_path / "plain", tmp_path / "df11")
    found = []
    for folder in (tmp_path / "plain", tmp_path / "df11"):
        torch.manual_seed(1)
        model = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=BF16)
        found.append(diffusers.ControlNetModel.from_unet(model).state_dict())
    assert is_compressed(model)
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_single_file(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 96), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    vae.to(BF16).save_pretrained(tmp_path / "plain")
    df11.convert(tmp_path / "plain", tmp_path / "df11")
    file = next((tmp_path / "df11").glob("*.df11"))
    found = diffusers.AutoencoderKL.from_single_file(str(file), config=str(tmp_path / "plain"), torch_dtype=BF16)
    assert is_compressed(found)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in vae.state_dict().items())


class Module:
    """``Module`` of sentence-transformers, as far as it reads files."""

    @classmethod
    def load_file_path(cls, model_name_or_path: str, filename: str, subfolder: str = "", token: Any = None) -> Any:  # noqa: ARG003
        path = Path(model_name_or_path, subfolder, filename)
        return str(path) if path.is_file() else None

    @classmethod
    def load_torch_weights(
        cls, model_name_or_path: str, subfolder: str = "", token: Any = None, model: Any = None
    ) -> Any:
        path = cls.load_file_path(model_name_or_path, "model.safetensors", subfolder, token)
        if path is None:
            raise ValueError("Could not find 'model.safetensors'")
        return "the original's" if model is None else model


def test_layers_of_sentence_transformers(tmp_path: Path) -> None:
    dense = nn.Linear(256, 768).to(BF16)
    (tmp_path / "2_Dense").mkdir()
    through_df11(dense, lambda: nn.Linear(256, 768), tmp_path / "2_Dense")
    (tmp_path / "2_Dense" / "m.df11").rename(tmp_path / "2_Dense" / "model.df11")
    library = ModuleType("library")
    library.Module = type("Module", (Module,), {"load_torch_weights": Module.__dict__["load_torch_weights"]})  # type: ignore[attr-defined]
    for_others.install_sentence_transformers(library)
    load: Any = library.Module.load_torch_weights
    found = load(str(tmp_path), subfolder="2_Dense", model=nn.Linear(256, 768).to(BF16))
    assert torch.equal(found.weight, dense.weight)
    assert torch.equal(load(str(tmp_path), "2_Dense")["bias"], dense.bias)
    with pytest.raises(ValueError, match="Could not find"):
        load(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert load(str(tmp_path)) == "the original's"


def test_lora_on_experts(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_local_experts=4, num_experts_per_tok=2, vocab_size=1000, layer_types=["full_attention"],
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).to(BF16).save_pretrained(tmp_path / "plain")
    df11.convert(tmp_path / "plain", tmp_path / "df11")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = []
    for folder in (tmp_path / "plain", tmp_path / "df11"):
        base = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=BF16)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config_ = Lora(r=4, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
            model = peft.get_peft_model(base, config_).eval()
        loss = model(IDS).logits.float().pow(2).mean()
        loss.backward()
        gradients = [value.grad for value in model.parameters() if value.requires_grad]
        found.append((model.get_nb_trainable_parameters(), loss, gradients))
    held = {name for name, _ in compressed_modules(model)}
    assert any("experts" in name for name in held)
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(one, other) for one, other in zip(found[0][2], found[1][2], strict=True))


def test_a_library_that_has_changed() -> None:
    with pytest.warns(UserWarning, match=r"does not know this version of peft: .*ModulesToSaveWrapper"):
        runtime._extend(ModuleType("peft.utils.other"))


def test_a_safetensors_that_reads_in_another_way() -> None:
    """Where it is not known how a library reads bytes, its questions for addresses get those of decoded values."""
    library = SimpleNamespace(__name__="unknown.torch")
    for_others.install_safetensors(library)
    assert "unknown.torch" not in for_others.weight.COMPARING
