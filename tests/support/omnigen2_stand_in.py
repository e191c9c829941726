"""A small OmniGen2 for tests: its transformer's structure and parameter names, and pipelines with the same interface.

This is not its code: samples are processed one by one, without padding, and no kernel is fused. What matters here is
the same: the submodules of a block and their callers, caches that reach into blocks (TeaCache) or skip them
(TaylorSeer), three predictions per step, the mllm's last hidden states.
"""
# ruff: noqa: ARG002 - arguments of the real ones

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import Timesteps
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from benchmarks.gpu.omnigen2_blocks import Block

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ModuleNotFoundError:  # transformers 5.1
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

Tensor = torch.Tensor
IMAGE_TOKEN = "<|image_pad|>"
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(x)))


class TimeCaptionEmbed(nn.Module):
    def __init__(self, width: int, text_width: int, eps: float, scale: float) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0.0, scale=scale)
        self.timestep_embedder = TimestepEmbedder(min(width, 1024))
        self.caption_embedder = nn.Sequential(nn.RMSNorm(text_width, eps=eps), nn.Linear(text_width, width))


class NormOut(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(min(width, 1024), width)
        self.norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.linear_2 = nn.Linear(width, out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear_2(self.norm(x) * (1 + self.linear_1(functional.silu(time)))[:, None])


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Text, reference images and noise are refined separately, joined into a sequence, and go through the layers.

    ``cache``: what TeaCache or TaylorSeer keep from earlier steps of the same prediction, set by the pipeline.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, int, int] = (40, 40, 40),
        axes_lens: tuple[int, int, int] = (1024, 1664, 1664),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ) -> None:
        super().__init__()

        def blocks(count: int, *, modulated: bool = True) -> nn.ModuleList:
            sizes = (hidden_size, num_attention_heads, num_kv_heads, multiple_of, norm_eps)
            return nn.ModuleList([Block(*sizes, modulated=modulated) for _ in range(count)])

        patch = patch_size**2 * in_channels
        self.x_embedder = nn.Linear(patch, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch, hidden_size)
        self.time_caption_embed = TimeCaptionEmbed(hidden_size, text_feat_dim, norm_eps, timestep_scale)
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.context_refiner = blocks(num_refiner_layers, modulated=False)
        self.layers = blocks(num_layers)
        self.norm_out = NormOut(hidden_size, patch_size**2 * (out_channels or in_channels))
        self.image_index_embedding = nn.Parameter(torch.randn(5, hidden_size) * 0.02)
        self.enable_teacache = self.enable_taylorseer = False
        self.teacache_rel_l1_thresh = 0.05
        self.cache = SimpleNamespace()

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, references: list[Any] | None = None
    ) -> Tensor:
        """Latents [batch, channels, height, width], text states [batch, tokens, width], mask -> latents by sample."""
        samples = [
            self._sample(
                latents[i : i + 1],
                timestep[i : i + 1],
                text[i : i + 1, : int(mask[i].sum())],
                (references or {i: None})[i] or [],
            )
            for i in range(len(latents))
        ]
        return torch.cat(samples)

    def _sample(self, latents: Tensor, timestep: Tensor, text: Tensor, references: list[Tensor]) -> Tensor:
        embed = self.time_caption_embed
        time = embed.timestep_embedder(embed.time_proj(timestep).to(latents.dtype))
        text = embed.caption_embedder(text)
        position = text.shape[1]
        text_rotary = self._rotary(torch.arange(position)[:, None].expand(-1, 3))
        for block in self.context_refiner:
            text = block(text, text_rotary)
        parts, rotaries = [text], [text_rotary]
        for i, image in enumerate([*references, latents[0]]):
            is_noise = i == len(references)
            height, width = (side // self.config.patch_size for side in image.shape[-2:])
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            rotary = self._rotary(torch.stack([torch.full_like(rows, position), rows, columns], dim=-1).flatten(0, 1))
            patches = self._patches(image[None])
            x = (
                self.x_embedder(patches)
                if is_noise
                else self.ref_image_patch_embedder(patches) + self.image_index_embedding[i]
            )
            for block in self.noise_refiner if is_noise else self.ref_image_refiner:
                x = block(x, rotary, time)
            parts.append(x)
            rotaries.append(rotary)
            position += max(height, width)
        x = self._layers(torch.cat(parts, dim=1), torch.cat(rotaries), time)
        x = self.norm_out(x, time)[:, -height * width :]
        size = self.config.patch_size
        return (
            x.view(1, height, width, size, size, -1)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(1, -1, height * size, width * size)
        )

    def _layers(self, x: Tensor, rotary: Tensor, time: Tensor) -> Tensor:
        if self.enable_teacache:
            return self._teacache(x, rotary, time)
        for i, layer in enumerate(self.layers):
            x = self._taylor(i, layer, x, rotary, time) if self.enable_taylorseer else layer(x, rotary, time)
        return x

    def _teacache(self, x: Tensor, rotary: Tensor, time: Tensor) -> Tensor:
        # The first layer's norm, called on its own, tells whether the input has changed enough since the layers last
        # ran.
        modulated, cache = self.layers[0].norm1(x.clone(), time.clone())[0], self.cache
        if cache.edge:
            cache.distance, run = 0.0, True
        else:
            cache.distance += ((modulated - cache.modulated).abs().mean() / cache.modulated.abs().mean()).item()
            run = cache.distance >= self.teacache_rel_l1_thresh
        cache.modulated = modulated
        if run:
            cache.distance, before = 0.0, x
            for layer in self.layers:
                x = layer(x, rotary, time)
            cache.residual = x - before
            return x
        return x + cache.residual

    def _taylor(self, i: int, layer: nn.Module, x: Tensor, rotary: Tensor, time: Tensor) -> Tensor:
        # Every second step is extrapolated from the previous two.
        history = self.cache.__dict__.setdefault("history", {}).setdefault(i, [])
        if self.cache.step < 3 or self.cache.step % 2:
            history.append(layer(x, rotary, time))
            return history[-1]
        return history[-1] + (history[-1] - history[-2])

    def _patches(self, images: Tensor) -> Tensor:
        size = self.config.patch_size
        batch, channels, height, width = images.shape
        cut = images.reshape(batch, channels, height // size, size, width // size, size)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _rotary(self, positions: Tensor) -> Tensor:
        angles = []
        for axis, size in enumerate(self.config.axes_dim_rope):
            frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles.append(positions[:, axis, None].double() * frequencies)
        together = torch.cat(angles, dim=-1)
        return torch.polar(torch.ones_like(together), together).to(torch.complex64)


class FlowMatchEulerDiscreteScheduler(SchedulerMixin, ConfigMixin):
    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, dynamic_time_shift: bool = True) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, steps: int, device: Any, num_tokens: int) -> None:
        times = np.linspace(0, 1, steps + 1, dtype=np.float32)[:-1]
        if self.config.dynamic_time_shift:
            shift = math.sqrt(num_tokens) / 40
            times = times / (shift - shift * times + times)
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self.i = 0

    def step(self, prediction: Tensor, sample: Tensor) -> Tensor:
        following = self.timesteps[self.i + 1] if self.i + 1 < len(self.timesteps) else 1.0
        stepped = sample.float() + (following - self.timesteps[self.i]) * prediction
        self.i += 1
        return stepped.to(prediction.dtype)


class OmniGen2Processor:
    """A tokenizer, and an image processor that does not need torchvision."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    @classmethod
    def from_pretrained(cls, folder: Path) -> OmniGen2Processor:
        return cls(AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder))

    def __call__(self, text: str, images: list[Image.Image] | None) -> dict[str, Tensor]:
        if not images:
            return dict(self.tokenizer([text], return_tensors="pt"))
        seen = self.image_processor(images, return_tensors="pt")
        for grid in seen["image_grid_thw"]:
            text = text.replace(IMAGE_TOKEN, "<|>" * (int(grid.prod()) // self.image_processor.merge_size**2), 1)
        found = dict(self.tokenizer([text.replace("<|>", IMAGE_TOKEN)], return_tensors="pt"))
        is_image = found["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return {**found, **seen, "mm_token_type_ids": is_image.int()}


class OmniGen2Pipeline(DiffusionPipeline):
    model_cpu_offload_seq = "mllm->transformer->vae"

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, mllm: Any, processor: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, mllm=mllm, processor=processor)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * self.factor)
        self.enable_taylorseer = False

    def embed(self, prompt: str, count: int) -> tuple[Tensor, Tensor]:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        text = self.processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        found = self.processor.tokenizer([text], return_tensors="pt").to(self._execution_device)
        states = self.mllm(
            found.input_ids, attention_mask=found.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        return states.to(self.mllm.dtype).expand(count, -1, -1), found.attention_mask.expand(count, -1)

    def encode(self, image: Image.Image) -> Tensor:
        pixels = self.image_processor.preprocess(image).to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample()
        return ((latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor)[0]

    def predict(self, cache: SimpleNamespace, latents: Tensor, text: tuple[Tensor, Tensor], references: Any) -> Tensor:
        self.transformer.cache = cache
        time = self.scheduler.timesteps[cache.step]
        return self.transformer(latents, time.expand(len(latents)).to(latents.dtype), *text, references)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        input_images: list[Image.Image] | None = None,
        num_images_per_prompt: int = 1,
        height: int = 1024,
        width: int = 1024,
        max_pixels: int = 1 << 20,
        max_sequence_length: int | None = None,
        num_inference_steps: int = 28,
        text_guidance_scale: float = 4.0,
        image_guidance_scale: float = 1.0,
        cfg_range: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> Any:
        texts = [self.embed(text, num_images_per_prompt) for text in (prompt, negative_prompt)]
        images = [self.encode(image) for image in input_images or []]
        if len(images) == 1:
            height, width = (self.factor * side for side in images[0].shape[-2:])
        references = [images] * num_images_per_prompt if images else None
        shape = (
            num_images_per_prompt,
            self.transformer.config.in_channels,
            height // self.factor,
            width // self.factor,
        )
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.mllm.dtype)
        self.scheduler.set_timesteps(num_inference_steps, latents.device, num_tokens=shape[-1] * shape[-2])
        self.transformer.enable_taylorseer = self.enable_taylorseer
        caches = [SimpleNamespace() for _ in range(3)]
        for step in range(num_inference_steps):
            for cache in caches:
                cache.edge, cache.step = step in (0, num_inference_steps - 1), step
            prediction = self.predict(caches[0], latents, texts[0], references)
            if cfg_range[0] <= step / num_inference_steps <= cfg_range[1] and text_guidance_scale > 1:
                without = self.predict(caches[1], latents, texts[1], None)
                if references and image_guidance_scale > 1:
                    only_images = self.predict(caches[2], latents, texts[1], references)
                    guided = image_guidance_scale * (only_images - without) + text_guidance_scale * (
                        prediction - only_images
                    )
                else:
                    guided = text_guidance_scale * (prediction - without)
                prediction = without + guided
            latents = self.scheduler.step(prediction, latents).to(self.vae.dtype)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        decoded = self.vae.decode(latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return SimpleNamespace(images=self.image_processor.postprocess(decoded, output_type=output_type))


class OmniGen2ChatPipeline(OmniGen2Pipeline):
    """Answers in words. The real one continues with an image if the answer begins with ``<|img|>``."""

    @torch.no_grad()
    def __call__(self, prompt: str, input_images: list[Image.Image] | None = None, **_: Any) -> Any:
        seen = "".join(
            f"<img{i + 1}>: <|vision_start|>{IMAGE_TOKEN}<|vision_end|>" for i in range(len(input_images or []))
        )
        text = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{seen}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        inputs = {name: value.to(self.mllm.device) for name, value in self.processor(text, input_images).items()}
        made = self.mllm.generate(**inputs, max_new_tokens=8, do_sample=False)
        return SimpleNamespace(
            text=self.processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :]), images=None
        )
