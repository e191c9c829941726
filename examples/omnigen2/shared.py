"""What the four scripts share: the flags of OmniGen2's own inference.py, loading, and input and output of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from df11.runtime import omnigen2


def parse(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The flags of a script; ``defaults``: those that differ from inference.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model_path", required=True, help="df11 folder of OmniGen2")
    add("--transformer_path", help="df11 folder of another transformer")
    add("--transformer_lora_path", help="LoRA for the transformer")
    add("--scheduler", choices=["euler", "dpmsolver++"], default="euler")
    add("--num_inference_step", type=int, default=50)
    add("--seed", type=int, default=0)
    add("--height", type=int, default=1024)
    add("--width", type=int, default=1024)
    add("--max_input_image_pixels", type=int, default=1 << 20, help="larger input images are scaled down to this")
    add("--dtype", choices=["bf16"], default="bf16", help="df11 folders are BF16")
    add("--text_guidance_scale", type=float, default=5.0)
    add("--image_guidance_scale", type=float, default=2.0)
    add("--cfg_range_start", type=float, default=0.0)
    add("--cfg_range_end", type=float, default=1.0)
    add("--instruction", default="A dog running in the park")
    add("--negative_prompt", default="", help="inference.py has a long one: pass that too, to get its images")
    add("--input_image_path", nargs="+", default=[], help="images, or a folder of them")
    add("--output_image_path", type=Path, default=Path("output.png"))
    add("--num_images_per_prompt", type=int, default=1)
    add("--enable_model_cpu_offload", action="store_true")
    add("--enable_sequential_cpu_offload", action="store_true")
    add("--enable_group_offload", action="store_true")
    add("--enable_teacache", action="store_true")
    add("--teacache_rel_l1_thresh", type=float, default=0.05)
    add("--enable_taylorseer", action="store_true", help="takes precedence over --enable_teacache")
    add(
        "--omnigen2",
        metavar="CHECKOUT",
        help="folder of OmniGen2's repository, unless its package omnigen2 is installed",
    )
    add("--device", default="cuda")
    parser.set_defaults(**defaults)
    return parser.parse_args()


def load(args: argparse.Namespace, *, chat: bool = False) -> Any:
    """The pipeline that the flags describe."""
    offloads = {
        "sequential": args.enable_sequential_cpu_offload,
        "model": args.enable_model_cpu_offload,
        "group": args.enable_group_offload,
    }
    offload: Any = next((name for name, wanted in offloads.items() if wanted), None)
    other = {"transformer": args.transformer_path} if args.transformer_path else {}
    pipeline = omnigen2.load_pipeline(
        args.model_path, args.device, offload=offload, classes=args.omnigen2, chat=chat, **other
    )
    if args.transformer_lora_path:
        # OmniGen2's load_lora_weights does not work with current diffusers. Given the pipeline, diffusers renews its
        # offloading.
        pipeline.transformer.load_lora_adapter(
            args.transformer_lora_path, prefix="transformer", use_safetensors=True, _pipeline=pipeline
        )
    if args.scheduler == "dpmsolver++":
        from omnigen2.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        pipeline.scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2, prediction_type="flow_prediction"
        )
    if args.enable_taylorseer:
        pipeline.enable_taylorseer = True
    elif args.enable_teacache:
        pipeline.transformer.enable_teacache = True
        pipeline.transformer.teacache_rel_l1_thresh = args.teacache_rel_l1_thresh
    return pipeline


def read_images(paths: list[str]) -> list[Image.Image]:
    """The images at these paths, or in the folder that is the only path, rotated as their cameras recorded."""
    files = (
        sorted(Path(paths[0]).iterdir())
        if len(paths) == 1 and Path(paths[0]).is_dir()
        else [Path(path) for path in paths]
    )
    return [ImageOps.exif_transpose(Image.open(file).convert("RGB")) for file in files]


def ask(pipeline: Any, args: argparse.Namespace, images: list[Image.Image] | None) -> Any:
    """Run the pipeline."""
    return pipeline(
        prompt=args.instruction,
        negative_prompt=args.negative_prompt,
        input_images=images,
        width=args.width,
        height=args.height,
        max_pixels=args.max_input_image_pixels,
        num_inference_steps=args.num_inference_step,
        max_sequence_length=1024,
        text_guidance_scale=args.text_guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
        cfg_range=(args.cfg_range_start, args.cfg_range_end),
        num_images_per_prompt=args.num_images_per_prompt,
        generator=torch.Generator(args.device).manual_seed(args.seed),
        output_type="pil",
    )


def save(images: list[Image.Image], path: Path) -> None:
    """Write an image; or several, numbered, and one with all of them side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(images) > 1:
        for i, image in enumerate(images):
            image.save(path.with_stem(f"{path.stem}_{i}"))
    together = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        together.paste(image, (left, 0))
        left += image.width
    together.save(path)
    print(f"saved {path}")  # noqa: T201
