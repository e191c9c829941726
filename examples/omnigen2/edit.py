"""Change an image as a text says. The result has the size of the image."""

from __future__ import annotations

import sys

import torch
from shared import ask, load, parse, read_images, save


def main() -> None:
    """Read, change, save."""
    args = parse(__doc__, instruction="Change the background to a beach.")
    images = read_images(args.input_image_path)
    if len(images) != 1:
        sys.exit(f"edit.py changes one image, but --input_image_path gives {len(images)}; in_context.py takes several")
    pipeline = load(args)
    torch.manual_seed(args.seed)  # The vae's sample of the image is not drawn from the pipeline's generator.
    save(ask(pipeline, args, images).images, args.output_image_path)


if __name__ == "__main__":
    main()
