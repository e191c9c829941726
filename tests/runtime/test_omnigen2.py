"""OmniGen2 from df11 folders: it makes what the BF16 pipeline makes, to the bit, however its parts are used.

Tested with a small stand-in of its classes, and also with the real ones if OMNIGEN2_SRC names a checkout of OmniGen2's
repository (which needs einops, torchvision and python-dotenv)."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import df11
from df11.formats import errors
from df11.runtime import materialize, model, omnigen2, omnigen2_classes
from df11.runtime.modules import compressed_modules
from df11.runtime.weight import CompressedWeight
from tests.support import omnigen2_stand_in as stand_in
from tests.support.omnigen2 import SOURCE, Family

ROOT = Path(__file__).parents[2]
FAMILIES = ["stand-in", *(["OmniGen2"] if SOURCE else [])]
EXAMPLES = ROOT / "examples" / "omnigen2"
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp("omnigen2"))


@pytest.fixture(scope="module")
def expected(family: Family) -> Any:
    return family.ordinary()


@pytest.fixture(autouse=True)
def compress_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SMALL", 1 << 12)


def picture(seed: int, width: int = 32, height: int = 32) -> Any:
    numbers = np.random.default_rng(seed)
    return Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8))


def run(pipeline: Any, images: list[Any] | None = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)  # Seeds the vae's samples of the input images.
    options = {"num_inference_steps": 2, "image_guidance_scale": 2.0, "num_images_per_prompt": 1} | options
    made = pipeline(
        prompt="A dog in a park",
        negative_prompt="blurry",
        input_images=images,
        height=32,
        width=32,
        max_sequence_length=1024,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).images
    assert made.std() > 0.01
    return made


def compressed_names(module: Any) -> set[str]:
    return {name for name, _ in compressed_modules(module)}


# The tasks.


@pytest.fixture(scope="module")
def loaded(family: Family) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "SMALL", 1 << 12)
        return family.load()


TASKS = {
    "text to image": (None, 2),
    "edit": ([picture(1, 48, 32)], 1),
    "in context": ([picture(1), picture(2, 48, 32)], 1),
}


@pytest.mark.parametrize("task", TASKS)
def test_images_are_the_same(task: str, loaded: Any, expected: Any) -> None:
    images, count = TASKS[task]
    assert torch.equal(
        run(loaded, images, num_images_per_prompt=count), run(expected, images, num_images_per_prompt=count)
    )


def test_weights_are_compressed_in_all_parts(loaded: Any, expected: Any) -> None:
    names = compressed_names(loaded.transformer)
    for block in ("layers.0", "layers.2", "noise_refiner.0", "ref_image_refiner.0", "context_refiner.0"):
        parts = [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "feed_forward.linear_1",
            "feed_forward.linear_2",
            "feed_forward.linear_3",
        ]
        assert {f"{block}.{part}" for part in parts} <= names
        assert (f"{block}.norm1.linear" in names) == (not block.startswith("context"))
    assert {"lm_head", "model.language_model.embed_tokens", "model.visual.blocks.1.attn.qkv"} <= compressed_names(
        loaded.mllm
    )
    assert "decoder.mid_block.resnets.0.conv1" in compressed_names(loaded.vae)
    for name in ("transformer", "mllm", "vae"):
        part, other = getattr(loaded, name), getattr(expected, name)
        assert part.dtype == other.dtype == torch.bfloat16
        assert not part.training
        assert not any(value.is_meta for value in [*part.parameters(), *part.buffers()])
        decoded = materialize(copy.deepcopy(part)).state_dict()
        ordinary = other.state_dict()
        assert decoded.keys() == ordinary.keys()
        assert all(torch.equal(decoded[key], ordinary[key]) for key in ordinary)


def test_understanding(family: Family) -> None:
    found, expected = family.load(chat=True), family.ordinary(chat=True)
    images = [picture(3, 84, 56), picture(4, 56, 56)]
    answers = [
        pipeline(prompt="Describe the images.", input_images=images, height=32, width=32).text
        for pipeline in (found, expected)
    ]
    assert answers[0] == answers[1]
    assert answers[0]


# The mllm.


def test_buffers_that_are_not_stored(loaded: Any, expected: Any) -> None:
    for name in ("transformer", "mllm", "vae"):
        found, ordinary = dict(getattr(loaded, name).named_buffers()), dict(getattr(expected, name).named_buffers())
        assert found.keys() == ordinary.keys()
        for key, buffer in ordinary.items():
            assert found[key].dtype == buffer.dtype
            assert torch.equal(found[key], buffer)
    assert any("inv_freq" in name for name, _ in loaded.mllm.named_buffers())


IDS = torch.tensor([[5, 17, 200, 3, 9]])


@torch.no_grad()
def test_hidden_states_without_logits(loaded: Any, expected: Any) -> None:
    called: list[Any] = []
    handle = loaded.mllm.lm_head.register_forward_pre_hook(lambda *_: called.append(1))
    ours, theirs = (
        pipeline.mllm(IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True)
        for pipeline in (loaded, expected)
    )
    assert ours.logits.shape == (1, 5, 0)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert all(torch.equal(one, other) for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    assert not called
    for options in (
        {},
        {"output_hidden_states": True, "logits_to_keep": 0},
        {"output_hidden_states": True, "labels": IDS},
    ):
        assert torch.equal(loaded.mllm(IDS, **options).logits, expected.mllm(IDS, **options).logits)
    assert len(called) == 3
    handle.remove()


@torch.no_grad()
def test_generation_with_hidden_states(loaded: Any, expected: Any) -> None:
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_hidden_states": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ours, theirs = loaded.mllm.generate(IDS, **options), expected.mllm.generate(IDS, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(one, other) for one, other in zip(ours.logits, theirs.logits, strict=True))
    assert torch.equal(ours.hidden_states[-1][-1], theirs.hidden_states[-1][-1])


def test_the_output_layer_is_tied(loaded: Any) -> None:
    head, embedding = loaded.mllm.lm_head, loaded.mllm.get_input_embeddings()
    assert isinstance(head.weight, CompressedWeight)
    assert head.weight is embedding.weight


def test_names_of_both_versions_of_transformers(family: Family, expected: Any, tmp_path: Path) -> None:
    names: set[str] = set()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((family.plain / "mllm").glob("*.safetensors")):
        tensors |= load_file(file)
    for kind in ("stored", "runtime"):
        folder = tmp_path / kind
        folder.mkdir()
        runtime = {omnigen2._stored_name(name): name for name in expected.mllm.state_dict()}
        renamed = {(runtime if kind == "runtime" else {}).get(name, name): value for name, value in tensors.items()}
        names |= renamed.keys()
        save_file(renamed, folder / "model.safetensors")
        (folder / "config.json").write_text((family.plain / "mllm" / "config.json").read_text())
        df11.convert(folder, tmp_path / f"{kind}-df11", cast="bf16")
        mllm = omnigen2._load_component(type(expected.mllm), tmp_path / f"{kind}-df11", torch.device("cpu"))
        assert torch.equal(mllm(IDS).logits, expected.mllm(IDS).logits)
    assert {"visual.merger.mlp.0.weight", "model.visual.merger.mlp.0.weight"} <= names
    assert {"model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"} <= names


# Caches, and other ways to use the parts.


@pytest.mark.parametrize("cache", ["teacache", "taylorseer"])
def test_caches(cache: str, family: Family) -> None:
    made, calls = [], []
    for pipeline in (family.load(), family.ordinary()):
        counted: list[int] = []
        pipeline.transformer.layers[1].attn.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        if cache == "teacache":
            pipeline.transformer.enable_teacache, pipeline.transformer.teacache_rel_l1_thresh = True, 1e9
        else:
            pipeline.enable_taylorseer = True
        made.append(run(pipeline, num_inference_steps=7))
        calls.append(len(counted))
    assert torch.equal(made[0], made[1])
    assert calls[0] == calls[1] < 2 * 7


@torch.no_grad()
def test_blocks_in_another_order(loaded: Any, expected: Any) -> None:
    states, time = torch.randn(1, 6, 256, dtype=torch.bfloat16), torch.randn(1, 256, dtype=torch.bfloat16)
    for one, other in zip(reversed(loaded.transformer.layers), reversed(expected.transformer.layers), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.norm1(states, time), other.norm1(states, time), strict=True))
        assert torch.equal(one.feed_forward(states), other.feed_forward(states))
        assert torch.equal(one.attn.to_k(states), other.attn.to_k(states))
        states = other.feed_forward(states)


def test_lora(family: Family, tmp_path: Path) -> None:
    pipelines = [family.load(), family.ordinary()]
    plain = run(pipelines[1])
    for pipeline in pipelines:
        config = peft.LoraConfig(
            r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
        pipeline.transformer.add_adapter(config)
    states = [
        {name: value for name, value in one.transformer.state_dict().items() if "lora" in name} for one in pipelines
    ]
    assert states[0].keys() == states[1].keys()
    pipelines[1].transformer.load_state_dict(states[0], strict=False)
    found, expected = run(pipelines[0]), run(pipelines[1])
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    pipelines[1].transformer.save_lora_adapter(tmp_path)
    for pipeline in (family.load(), family.load(offload="group")):
        pipeline.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, _pipeline=pipeline)
        assert torch.equal(run(pipeline), expected)
    pipelines[0].transformer.disable_adapters()
    assert torch.equal(run(pipelines[0]), plain)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading(offload: Any, family: Family, expected: Any) -> None:
    pipeline = family.load(offload=offload)
    assert torch.equal(run(pipeline, [picture(1)]), run(expected, [picture(1)]))


def test_sequential_offloading(family: Family, expected: Any, tmp_path: Path) -> None:
    # accelerate cannot offload from CPU memory to the CPU; from a disk it can, with the same hooks.
    pipeline = family.load(offload="sequential")
    models = [getattr(pipeline, name) for name in omnigen2._MODELS]
    assert all(value.is_meta for part in models for value in part.parameters())
    pipeline = family.load()
    for name in omnigen2._MODELS:
        importlib.import_module("accelerate").disk_offload(
            getattr(pipeline, name), str(tmp_path / name), torch.device("cpu")
        )
    assert torch.equal(run(pipeline, [picture(1)]), run(expected, [picture(1)]))


@torch.no_grad()
def test_an_mllm_that_lies_on_a_disk(family: Family, expected: Any, tmp_path: Path) -> None:
    mllm = family.load().mllm
    importlib.import_module("accelerate").disk_offload(mllm, str(tmp_path), torch.device("cpu"))
    assert all(value.is_meta for value in mllm.parameters())
    hidden = [one(IDS, output_hidden_states=True).hidden_states[-1] for one in (mllm, expected.mllm)]
    assert torch.equal(*hidden)
    text, images = "<|vision_start|><|image_pad|><|vision_end|>Describe it.", [picture(3, 84, 56)]
    inputs = expected.processor(text=text, images=images, **({"return_tensors": "pt"} if family.real else {}))
    assert mllm.device == torch.device("cpu")
    made = [one.generate(**inputs, max_new_tokens=4, do_sample=False) for one in (mllm, expected.mllm)]
    assert torch.equal(*made)
    assert all(value.is_meta for value in mllm.parameters())


def test_copies(family: Family, expected: Any) -> None:
    loaded = family.load()
    pickled = pickle.dumps(
        [loaded.mllm, loaded.transformer]
    )  # Before it runs: transformers then adds hooks that cannot be pickled.
    for mllm, transformer in (copy.deepcopy((loaded.mllm, loaded.transformer)), pickle.loads(pickled)):
        pipeline = type(loaded)(**{**loaded.components, "mllm": mllm, "transformer": transformer})
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.mllm is not loaded.mllm
        assert pipeline.mllm(IDS, output_hidden_states=True).logits.shape == (1, 5, 0)
        assert torch.equal(run(pipeline), run(expected))


def test_components_of_the_user(family: Family, loaded: Any, tmp_path: Path) -> None:
    pipeline = family.load(scheduler=loaded.scheduler, transformer=family.df11 / "transformer", vae=loaded.vae)
    assert pipeline.scheduler is loaded.scheduler
    assert pipeline.vae is loaded.vae
    assert compressed_names(pipeline.transformer) == compressed_names(loaded.transformer)
    with pytest.raises(errors.UsageError, match=r"no such component .*found unet"):
        family.load(unet=None)
    with pytest.raises(errors.MissingError, match=r"no \.df11 file"):
        family.load(transformer=tmp_path)


# Where the classes come from.


@pytest.fixture
def no_omnigen2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if OmniGen2's package had not been imported and were not installed."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "omnigen2"}
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if not SOURCE or Path(entry).resolve() != Path(SOURCE).resolve()]
    )
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "omnigen2"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family("stand-in", tmp_path_factory.mktemp("small"))


def checkout_of_the_stand_in(folder: Path) -> Path:
    homes = {**omnigen2_classes.HOMES, "OmniGen2Processor": "omnigen2.processing"}
    for name, home in homes.items():
        file = folder.joinpath(*home.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"from tests.support.omnigen2_stand_in import {name}\n")
    (folder / "omnigen2" / "__init__.py").touch()
    return folder


def with_processor(folder: Path, library: str) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = [library, "OmniGen2Processor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.usefixtures("no_omnigen2")
def test_without_classes(small: Family, tmp_path: Path) -> None:
    with pytest.raises(
        errors.MissingExtraError, match=r"OmniGen2Pipeline is not installed; git clone .* and pass classes=[^;]*$"
    ):
        omnigen2.load_pipeline(small.df11, "cpu")
    with pytest.raises(errors.MissingError, match="not a checkout of OmniGen2's repository"):
        omnigen2.load_pipeline(small.df11, "cpu", classes=tmp_path)


@pytest.mark.usefixtures("no_omnigen2")
def test_a_checkout(small: Family, tmp_path: Path) -> None:
    folder = with_processor(Path(shutil.copytree(small.df11, tmp_path / "folder")), "omnigen2.processing")
    checkout = checkout_of_the_stand_in(tmp_path / "checkout")
    for classes in (checkout, None):  # The second time, it has already been imported.
        pipeline = omnigen2.load_pipeline(folder, "cpu", classes=classes)
        assert type(pipeline) is stand_in.OmniGen2Pipeline
        assert type(pipeline.processor) is stand_in.OmniGen2Processor
    other = checkout_of_the_stand_in(tmp_path / "other")
    with pytest.raises(errors.UsageError, match="another omnigen2 is already imported"):
        omnigen2.load_pipeline(folder, "cpu", classes=other)


@pytest.mark.usefixtures("no_omnigen2")
def test_remote_code_runs_only_if_it_is_allowed_by_name(small: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small.df11, tmp_path / "folder"))
    ran = tmp_path / "ran"
    note = f"open({str(ran)!r}, 'a').write(__name__.rpartition('.')[2] + ' ')\n"
    code = {
        "transformer/transformer_omnigen2.py": "from .blocks import OmniGen2Transformer2DModel\n",
        "transformer/blocks.py": "from tests.support.omnigen2_stand_in import OmniGen2Transformer2DModel\n",
        "scheduler/scheduling_flow_match_euler_discrete.py": "from tests.support.omnigen2_stand_in"
        " import FlowMatchEulerDiscreteScheduler\n",
        "processor/processing_omnigen2.py": "from tests.support.omnigen2_stand_in import OmniGen2Processor\n",
        "pipeline.py": "from tests.support.omnigen2_stand_in import OmniGen2Pipeline\n",
    }
    for path, text in code.items():
        (folder / path).write_text(note + text)
    allowed = [Path(path).stem for path in code]
    with pytest.raises(
        errors.MissingExtraError,
        match=r"own code \(.*'transformer_omnigen2'.*\) is executed only if trust_remote_code names it",
    ):
        omnigen2.load_pipeline(folder, "cpu")
    with pytest.raises(errors.UsageError, match="remote code is allowed by name"):
        omnigen2.load_pipeline(folder, "cpu", trust_remote_code=True)
    with pytest.raises(errors.MissingExtraError, match="OmniGen2Pipeline is not installed"):
        omnigen2.load_pipeline(folder, "cpu", trust_remote_code="transformer_omnigen2")
    assert not ran.exists()
    with pytest.raises(
        errors.NotAllowedError, match="imports code that is not allowed; add 'blocks' to trust_remote_code"
    ):
        omnigen2.load_pipeline(folder, "cpu", trust_remote_code=[name for name in allowed if name != "blocks"])
    assert "blocks" not in ran.read_text()
    pipeline = omnigen2.load_pipeline(folder, "cpu", trust_remote_code=allowed)
    assert type(pipeline.transformer) is stand_in.OmniGen2Transformer2DModel
    assert sorted(ran.read_text().split()) == sorted(allowed)


def test_without_a_cast_f32_is_rounded_on_loading(
    small: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(small.df11, tmp_path / "folder"))
    shutil.rmtree(folder / "transformer")
    df11.convert(small.plain / "transformer", folder / "transformer")
    found, expected = (omnigen2.load_pipeline(path, "cpu", classes=stand_in) for path in (folder, small.df11))
    for name, value in expected.transformer.state_dict().items():
        assert torch.equal(found.transformer.state_dict()[name], value)
    held = [one for one in found.transformer.parameters() if isinstance(one, CompressedWeight)]
    kept = [one for one in expected.transformer.parameters() if isinstance(one, CompressedWeight)]
    assert (len(held), bool(kept)) == (0, True)
    (line,) = (record.message for record in caplog.records if record.name == "df11")
    assert line.endswith("not compressed in memory; df11-convert --cast bf16 would keep them compressed")


# What cannot be loaded.


def test_folders_that_cannot_be_loaded(small: Family, tmp_path: Path) -> None:
    with pytest.raises(
        errors.MissingError, match="OmniGen2-df11: no such folder; on the Hub it would be hf://owner/name"
    ):
        omnigen2.load_pipeline("OmniGen2-df11", "cpu", classes=stand_in)
    with pytest.raises(errors.MissingError, match=r"model_index\.json"):
        omnigen2.load_pipeline(tmp_path, "cpu", classes=stand_in)
    with pytest.raises(errors.MissingError, match=r"no \.df11 file in this folder; df11-convert --cast bf16"):
        omnigen2.load_pipeline(small.plain, "cpu", classes=stand_in)
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(
        errors.MissingError, match="not an OmniGen2 pipeline: no mllm, processor, scheduler, transformer"
    ):
        omnigen2.load_pipeline(tmp_path, "cpu", classes=stand_in)
    folder = Path(shutil.copytree(small.df11, tmp_path / "folder"))
    (shard,) = (folder / "vae").glob("*.df11")
    shard.unlink()
    save_file({"a": torch.zeros(3, dtype=torch.float16)}, tmp_path / "x.safetensors")
    df11.convert(tmp_path / "x.safetensors", shard, force=True)
    with pytest.raises(errors.UsageError, match=r"the weights are neither BF16 nor F32 .*found F16"):
        omnigen2.load_pipeline(folder, "cpu", classes=stand_in)
    with pytest.raises(errors.UsageError, match="offload"):
        omnigen2.load_pipeline(small.df11, "cpu", classes=stand_in, offload="disk")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises((errors.DeviceError, errors.MissingExtraError)):
            omnigen2.load_pipeline(small.df11, classes=stand_in)


# Scripts.

SCRIPT = """
import sys
import torch
from tests.support.omnigen2_stand_in import OmniGen2Pipeline, OmniGen2Transformer2DModel

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
pipeline = OmniGen2Pipeline.from_pretrained(path, torch_dtype=dtype, trust_remote_code=True)
first = pipeline.transformer
pipeline.transformer = OmniGen2Transformer2DModel.from_pretrained(path, subfolder="transformer", torch_dtype=dtype)
assert pipeline.transformer is first
assert OmniGen2Transformer2DModel.from_pretrained(path + "/transformer", torch_dtype=dtype) is not first
KEPT.append(pipeline.to("cpu"))
"""


def test_a_script_as_it_is(
    small: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    kept: list[Any] = []
    script.write_text(SCRIPT)
    with_processor(small.df11, "tests.support.omnigen2_stand_in")
    monkeypatch.setattr("builtins.KEPT", kept, raising=False)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = diffusers.DiffusionPipeline.__dict__["from_pretrained"]
    assert omnigen2.main([str(script), str(small.df11), "bfloat16"]) == 0
    assert compressed_names(kept[0].transformer)
    assert torch.equal(run(kept[0]), run(small.ordinary()))
    assert omnigen2.main([str(script), str(small.df11), "float16"]) == 2
    assert "df11 folders are BF16" in capsys.readouterr().err
    assert omnigen2.main([str(tmp_path / "nothing.py")]) == 4
    assert diffusers.DiffusionPipeline.__dict__["from_pretrained"] is before
    with omnigen2.loading_df11():
        vae = diffusers.AutoencoderKL.from_pretrained(small.plain, subfolder="vae", torch_dtype=torch.bfloat16)
        assert not compressed_names(vae)
        with pytest.raises(errors.UsageError, match="does not take these options"):
            diffusers.AutoencoderKL.from_pretrained(small.df11, subfolder="vae", device_map="auto")


def flags(family: Family, checkout: Path, *more: str) -> list[str]:
    size = [
        "--num_inference_step",
        "2",
        "--height",
        "32",
        "--width",
        "32",
        "--device",
        "cpu",
        "--omnigen2",
        str(checkout),
    ]
    return ["--model_path", str(family.df11), *size, *more]


def example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("shared", None)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_examples(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = Path(SOURCE) if family.real else checkout_of_the_stand_in(tmp_path / "checkout")
    if not family.real:
        with_processor(family.df11, "omnigen2.processing")
        monkeypatch.setattr(
            sys,
            "modules",
            {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "omnigen2"},
        )
        monkeypatch.setattr(sys, "path", list(sys.path))
    inputs = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(inputs):
        picture(i).save(file)
    out = tmp_path / "out"
    example(
        "text_to_image",
        flags(family, checkout, "--num_images_per_prompt", "2", "--output_image_path", str(out / "t2i.png")),
        monkeypatch,
    )
    assert Image.open(out / "t2i.png").size == (64, 32)
    assert Image.open(out / "t2i_1.png").size == (32, 32)
    edit = [
        "--input_image_path",
        inputs[0],
        "--output_image_path",
        str(out / "edit.png"),
        "--enable_teacache",
        "--enable_model_cpu_offload",
    ]
    example("edit", flags(family, checkout, *edit), monkeypatch)
    assert Image.open(out / "edit.png").size == (32, 32)
    peft = importlib.import_module("peft")
    transformer = family.load().transformer
    transformer.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_k", "to_q"]))
    lora = {f"transformer.{name}": value for name, value in peft.utils.get_peft_model_state_dict(transformer).items()}
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    both = [
        "--transformer_lora_path",
        str(tmp_path / "lora"),
        "--input_image_path",
        *inputs,
        "--output_image_path",
        str(out / "both.png"),
        "--transformer_path",
        str(family.df11 / "transformer"),
    ]
    if family.real:
        both += ["--scheduler", "dpmsolver++"]
    example("in_context", flags(family, checkout, *both), monkeypatch)
    assert Image.open(out / "both.png").size == (32, 32)
    capsys.readouterr()
    example("understand", flags(family, checkout, "--input_image_path", *inputs), monkeypatch)
    assert capsys.readouterr().out.strip()
    with pytest.raises(SystemExit, match=r"in_context\.py takes several"):
        example("edit", flags(family, checkout, "--input_image_path", *inputs), monkeypatch)


@pytest.mark.skipif(not SOURCE, reason="OMNIGEN2_SRC names no checkout of OmniGen2's repository")
@pytest.mark.parametrize("more", [[], ["--enable_taylorseer"]])
def test_omnigen2s_own_script(more: list[str], family: Family, expected: Any, tmp_path: Path) -> None:
    if not family.real:
        pytest.skip("its own classes only")
    size = ["--num_inference_step", "2", "--height", "32", "--width", "32", "--num_images_per_prompt", "2"]
    script = [
        "inference.py",
        "--model_path",
        str(family.df11),
        "--output_image_path",
        str(tmp_path / "out.png"),
        *size,
        *more,
    ]
    command = [
        sys.executable,
        "-m",
        "df11.runtime.omnigen2",
        *script,
        "--instruction",
        "A dog",
        "--negative_prompt",
        "blurry",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SOURCE, env=environment)
    assert done.returncode == 0, done.stderr
    options = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "text_guidance_scale": 5.0,
        "image_guidance_scale": 2.0,
    }
    generator = torch.Generator().manual_seed(0)
    images = expected(
        "A dog", "blurry", num_images_per_prompt=2, generator=generator, max_sequence_length=1024, **options
    ).images
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"out_{i}.png")), np.asarray(image))
