"""Checkpoints of DFloat11: refused with the command that imports them, and models like any other afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

import df11
from df11 import runtime
from df11.converter.export import export
from df11.formats import errors

BF16 = torch.bfloat16


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def transformer() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


@pytest.fixture(params=[llama, transformer])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().to(BF16).eval()


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    """The model as a checkpoint of DFloat11, a file for each unit."""
    model.save_pretrained(tmp_path / "plain")
    df11.convert(tmp_path / "plain", tmp_path / "first")
    assert export(tmp_path / "first", tmp_path / "checkpoint", "dfloat11", file_per_unit=True).units > 1
    return tmp_path / "checkpoint"


def test_from_pretrained_says_how_to_import_it(model, checkpoint):
    for path in (checkpoint, str(checkpoint)):
        with pytest.raises(errors.UsageError, match=f"df11-convert {checkpoint} checkpoint-df11$") as caught:
            type(model).from_pretrained(path)
        assert len(str(caught.value).splitlines()) == 1
    for file in checkpoint.glob("*model.safetensors"):  # What is in no unit: transformers then finds no file.
        file.unlink()
    with pytest.raises((errors.UsageError, OSError), match=r"df11-convert|no file named diffusion"):
        type(model).from_pretrained(checkpoint)


def test_load_model_says_how_to_import_it(model, checkpoint):
    with pytest.raises(errors.UsageError, match="df11-convert"):
        runtime.load_model(model, checkpoint, device="cpu")


def test_a_pipeline_says_how_to_import_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": {}}))
    with pytest.raises(errors.UsageError, match="df11-convert"):
        runtime.omnigen2.load_pipeline(tmp_path, device="cpu")


def test_imported_it_is_the_same_model(model, checkpoint, tmp_path):
    df11.convert(checkpoint, tmp_path / "imported")
    loaded = type(model).from_pretrained(tmp_path / "imported", torch_dtype=BF16)
    mine, theirs = model.state_dict(), loaded.state_dict()
    for name, tensor in mine.items():
        found = theirs[name] if name in theirs else loaded.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(tensor.view(torch.int16), torch.as_tensor(found).view(torch.int16)), name


def test_exported_as_plain_files_any_loader_reads_it(model, checkpoint, tmp_path):
    df11.convert(checkpoint, tmp_path / "imported")
    export(tmp_path / "imported", tmp_path / "exported", "safetensors")
    assert not list((tmp_path / "exported").glob("*df11*"))
    loaded = type(model).from_pretrained(tmp_path / "exported", torch_dtype=BF16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
