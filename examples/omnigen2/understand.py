"""Describe images. The model may also answer with an image, which is saved."""

from __future__ import annotations

import sys

import torch
from shared import ask, load, parse, read_images, save


def main() -> None:
    """Read, ask, print."""
    args = parse(__doc__, instruction="Please describe this image briefly.")
    images = read_images(args.input_image_path)
    if not images:
        sys.exit("understand.py takes one or more images: --input_image_path")
    pipeline = load(args, chat=True)
    torch.manual_seed(args.seed)
    answer = ask(pipeline, args, images)
    if answer.images is not None:
        save(answer.images, args.output_image_path)
    print(answer.text)  # noqa: T201


if __name__ == "__main__":
    main()
