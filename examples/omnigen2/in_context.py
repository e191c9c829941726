"""Make an image with elements of up to five others, which the text calls image 1, image 2 and so on."""

from __future__ import annotations

import sys

import torch
from shared import ask, load, parse, read_images, save


def main() -> None:
    """Read, make, save."""
    args = parse(__doc__, instruction="Let the person in image 2 hold the toy of image 1.")
    images = read_images(args.input_image_path)
    if not 2 <= len(images) <= 5:
        sys.exit(f"in_context.py takes 2 to 5 images, but --input_image_path gives {len(images)}; edit.py takes one")
    pipeline = load(args)
    torch.manual_seed(args.seed)  # The vae's samples of the images are not drawn from the pipeline's generator.
    save(ask(pipeline, args, images).images, args.output_image_path)


if __name__ == "__main__":
    main()
