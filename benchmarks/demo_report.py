"""Makes docs/demo: the report and the model card of a stand-in for OmniGen2. ``python -m benchmarks.demo_report``.

The folder has every tensor of OmniGen2's checkpoint, but smaller, in F32 as on the Hub, and with **synthetic** random
weights. It is converted with ``cast="bf16"``. The report and the model card say so. Takes about a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Final

import df11
from benchmarks import synthetic
from df11.pipelines import card, report

SCALE: Final = 0.02
"""Of the stand-in: 0.6 GB in F32 instead of 31.2 GB."""
FOLDER: Final = Path(__file__).parents[1] / "docs" / "demo"


def main(arguments: list[str] | None = None) -> int:
    """Write report.html, card.md and the pictures, and print their sizes.

    The same scale gives the same bytes on one machine.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_report",
        description="Make the report and the model card of an OmniGen2-shaped folder.",
    )
    parser.add_argument(
        "--scale", type=float, default=SCALE, help="size of the folder, 1 being the real one (default: %(default)s)"
    )
    parser.add_argument("--dir", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: docs/demo")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="df11-demo-", dir=options.dir) as work:
        source, tree = Path(work) / "OmniGen2", Path(work) / "OmniGen2-df11"
        synthetic.write_omnigen2(source, options.scale)
        df11.convert(source, tree, cast="bf16")
        written = [
            *report.write_report(
                tree, options.out, title=f"Synthetic stand-in of the shape of OmniGen2, scale {options.scale:g}"
            )
        ]
        written.append(options.out / "card.md")
        written[-1].write_text(make_card(tree, options.scale), encoding="utf-8")
    for path in written:
        print(f"{path.stat().st_size:>9,} {path}")
    return 0


def make_card(tree: Path, scale: float) -> str:
    """The model card of the converted folder, for a file beside the pictures."""
    manifest, _ = report.find_manifest(tree)
    fields = card.CardFields(
        title="Synthetic stand-in of the shape of OmniGen2",
        notes="**These are not OmniGen2's weights.** The folder has a tensor for each one in OmniGen2's checkpoint, "
        f"with the same name, file and dtype, but {scale:g} times as many weights: random numbers with the statistics "
        "that were published of the real ones. It makes no images; it shows what a model card looks like.",
        license="apache-2.0",
        pipeline_tag="any-to-any",
        library_name="diffusers",
        tags=("synthetic",),
    )
    configs = {name: (tree / name).read_text(encoding="utf-8") for name in card.CONFIGS if (tree / name).exists()}
    pictures = {name: f"{name}.png" for name in card.plot_paths(manifest)}
    return card.render_card(manifest, fields, None, repository=None, plots=pictures, configs=configs)


if __name__ == "__main__":
    raise SystemExit(main())
