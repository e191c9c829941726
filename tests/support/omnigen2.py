"""A small OmniGen2 checkpoint, made of the stand-in's classes or the real ones, and its df11 folder."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import df11
from df11.runtime import omnigen2
from tests.support import omnigen2_stand_in as stand_in

SOURCE = os.environ.get("OMNIGEN2_SRC", "")
"""A checkout of OmniGen2's repository, for the real classes."""

TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 256,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 256,
    "axes_dim_rope": (16, 24, 24),
    "axes_lens": (1024, 1024, 1024),
    "text_feat_dim": 256,
    "timestep_scale": 1000.0,
}
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|img|>",
]
MLLM = {
    "text_config": {
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_heads": 4,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 256,
    },
    "image_token_id": 261,
    "video_token_id": 262,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "tie_word_embeddings": True,
}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TEMPLATE = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"


class Family:
    """A set of classes, the checkpoint made for them, and its df11 folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.real = name == "OmniGen2"
        self.classes: Any = SOURCE if self.real else stand_in
        if self.real:
            omnigen2._use_checkout(Path(SOURCE))
        self.plain, self.df11 = folder / "OmniGen2", folder / "OmniGen2-df11"
        make_tree(self)
        df11.convert(self.plain, self.df11, cast="bf16")

    def find(self, name: str) -> Any:
        return getattr(importlib.import_module(omnigen2._HOMES[name]) if self.real else stand_in, name)

    @property
    def processor(self) -> Any:
        return transformers.Qwen2_5_VLProcessor if self.real else stand_in.OmniGen2Processor

    def load(self, **options: Any) -> Any:
        pipeline = omnigen2.load_pipeline(self.df11, "cpu", classes=self.classes, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def ordinary(self, *, chat: bool = False) -> Any:
        def load(cls: Any, folder: str) -> Any:
            return cls.from_pretrained(self.plain / folder, torch_dtype=torch.bfloat16)

        pipeline = self.find("OmniGen2ChatPipeline" if chat else "OmniGen2Pipeline")(
            transformer=load(self.find("OmniGen2Transformer2DModel"), "transformer"),
            vae=load(diffusers.AutoencoderKL, "vae"),
            scheduler=self.find("FlowMatchEulerDiscreteScheduler").from_pretrained(self.plain / "scheduler"),
            mllm=load(transformers.Qwen2_5_VLForConditionalGeneration, "mllm"),
            processor=self.processor.from_pretrained(self.plain / "processor"),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def make_tree(family: Family) -> None:
    torch.manual_seed(0)
    plain = family.plain
    transformer = randomized(family.find("OmniGen2Transformer2DModel")(**TRANSFORMER))
    transformer.save_pretrained(plain / "transformer", max_shard_size="8MB")
    mllm = randomized(transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**MLLM)))
    mllm.save_pretrained(plain / "mllm", max_shard_size="4MB")
    randomized(diffusers.AutoencoderKL(**VAE)).save_pretrained(plain / "vae")
    family.find("FlowMatchEulerDiscreteScheduler")().save_pretrained(plain / "scheduler")
    make_processor(family, plain / "processor")
    processor = ["transformers", "Qwen2_5_VLProcessor"] if family.real else ["processing_omnigen2", "OmniGen2Processor"]
    index = {
        "_class_name": "OmniGen2Pipeline",
        "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "processor": processor,
        "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (plain / "model_index.json").write_text(json.dumps(index))


def randomized(module: Any) -> Any:
    # Some weights start as zeros, which would hide errors in what they are multiplied with.
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(
            parameter,
            mean=1.0 if "norm" in name and parameter.dim() == 1 and name.endswith("weight") else 0.0,
            std=0.05,
        )
    return module.eval()


def make_processor(family: Family, folder: Path) -> None:
    alphabet = sorted(importlib.import_module("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = TEMPLATE
    pixels = {"min_pixels": 56 * 56, "max_pixels": 56 * 84}
    if family.real:
        images = importlib.import_module(
            "transformers.models.qwen2_vl.image_processing_qwen2_vl"
        ).Qwen2VLImageProcessor(**pixels)
        videos = importlib.import_module(
            "transformers.models.qwen2_vl.video_processing_qwen2_vl"
        ).Qwen2VLVideoProcessor()
        transformers.Qwen2_5_VLProcessor(images, tokenizer, videos).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        stand_in.Qwen2VLImageProcessorPil(**pixels).save_pretrained(folder)
