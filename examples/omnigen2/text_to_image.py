"""An image from a text."""

from __future__ import annotations

from shared import ask, load, parse, save


def main() -> None:
    """Make it, save it."""
    args = parse(__doc__, text_guidance_scale=4.0)
    save(ask(load(args), args, None).images, args.output_image_path)


if __name__ == "__main__":
    main()
