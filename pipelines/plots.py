"""The plots of a manifest.

Each plot is drawn once, as a PNG (light, at twice the size) and as an SVG that takes its colours from the page.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from df11.formats import errors
from df11.pipelines import canvas, summary, svg, wording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from df11.converter.manifest import Manifest, TensorRow

FOLDER: Final = "df11-plots"
"""Folder of the pictures in a repository."""
NAMES: Final = ("sizes", "layers", "exponents", "outliers")
SHOWN_KINDS: Final = 8
SHOWN_STACKS: Final = 3
SHOWN_OUTSIDE: Final = 8
NAMED_OUTLIERS: Final = 8
_PNG_SCALE: Final = 2
_PNG_COLOURS: Final = 128
"""Enough colours for these plots, at a third of the bytes."""

_MARKERS: Final = "osD^vPX*"
_DASHES: Final = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), "-", (0, (5, 1.5)), (0, (1.5, 1)), "-")


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot. ``name`` is for files and identifiers, ``description`` for readers who cannot see it."""

    name: str
    title: str
    description: str
    draw: Callable[[canvas.Palette], Figure]

    def png(self) -> bytes:
        """A PNG with a white background."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        with canvas.settings():
            figure = self.draw(canvas.LIGHT)
            figure.set_dpi(72 * _PNG_SCALE)
            drawn: Any = FigureCanvasAgg(figure)
            drawn.draw()
        image = Image.fromarray(np.asarray(drawn.buffer_rgba())[:, :, :3])
        buffer = io.BytesIO()
        made_by = PngInfo()
        made_by.add_text("Software", "df11")
        image.quantize(_PNG_COLOURS, dither=Image.Dither.NONE).save(buffer, "png", optimize=True, pnginfo=made_by)
        return buffer.getvalue()

    def svg(self) -> str:
        """An ``svg`` element for an HTML page.

        It has no style and no script. Colours are ``var(--ROLE)``, and identifiers begin with ``name``.
        """
        with canvas.settings():
            buffer = io.BytesIO()
            self.draw(canvas.SENTINELS).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return svg.for_page(
            buffer.getvalue(),
            self.name,
            self.title,
            self.description,
            {colour: role for role, colour in canvas.SENTINELS.items()},
        )


def plan(manifest: Manifest) -> list[Plot]:
    """The plots that have something to show, in the order of NAMES.

    Nothing is drawn yet, and matplotlib is not needed.
    """
    found = (_sizes(manifest), _layers(manifest), _exponents(manifest), _outliers(manifest))
    return [plot for plot in found if plot is not None]


def path(name: str) -> str:
    """Path of a plot's picture in a repository."""
    return f"{FOLDER}/{name}.png"


def draw_plots(manifest: Manifest) -> dict[str, bytes]:
    """The pictures for a repository: PNG by path. Needs matplotlib."""
    return {path(plot.name): plot.png() for plot in plots(manifest)}


def plots(manifest: Manifest) -> list[Plot]:
    """The plots of :func:`plan`, ready to draw. Raises a MissingExtraError without matplotlib."""
    try:
        # Matplotlib reads a file of this name in the current folder, which may be a stranger's model.
        with contextlib.chdir(Path(__file__).parent) if os.path.lexists("matplotlibrc") else contextlib.nullcontext():
            import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise errors.missing_extra("matplotlib", "report") from None
    return plan(manifest)


# Sizes


def _sizes(manifest: Manifest) -> Plot | None:
    parts = [sizes for sizes, _ in summary.parts(manifest)]
    if not parts:
        return None
    total = summary.total(manifest)
    rows = [total, *parts] if len(parts) > 1 else [total]
    cast = any(row.cast for row in rows)
    description = "Bars for " + "; ".join(
        f"{wording.fitted(row.name, 40)}: df11 {wording.size(row.container_bytes)}, BF16 {wording.size(row.bf16_bytes)}"
        + (f", source {wording.size(row.source_bytes)}" if row.cast else "")
        for row in rows
    )

    def draw(colours: canvas.Palette) -> Figure:
        step = 54.0 if cast else 45.0
        figure = canvas.new_figure(62 + step * len(rows), colours)
        axes = canvas.new_axes(figure, colours, 12, 30, 16, step * len(rows))
        largest = max(max(row.source_bytes if row.cast else 0, row.bf16_bytes, row.container_bytes) for row in rows)
        power = min(3 * int(math.log10(max(largest, 1)) / 3), 12)
        unit, name = 10.0**power, {0: "bytes", 3: "kB", 6: "MB", 9: "GB", 12: "TB"}[power]
        labelled: set[str] = set()

        def bar(y: float, start: float, width: float, label: str, **style: Any) -> None:
            known = label in labelled
            labelled.add(label)
            axes.barh(y, width / unit, left=start / unit, height=8, label=None if known else label, **style)

        for index, row in enumerate(rows):
            y = index * step + 22
            if cast:
                if row.cast:
                    bar(
                        y,
                        0,
                        row.source_bytes,
                        "source, F32",
                        facecolor="none",
                        edgecolor=colours["muted"],
                        linewidth=1,
                        linestyle=(0, (2, 1.5)),
                    )
                y += 9.5
            bar(y, 0, row.bf16_bytes, "in BF16", facecolor=colours["grid"], edgecolor=colours["muted"], linewidth=1)
            y += 9.5
            other = max(0, row.container_bytes - row.coded_bytes)
            bar(y, 0, row.coded_bytes, "df11, coded", facecolor=colours["c1"], edgecolor=colours["c1"], linewidth=1)
            bar(
                y,
                row.coded_bytes,
                other,
                "df11, verbatim",
                facecolor=colours["surface"],
                edgecolor=colours["c2"],
                linewidth=1,
                hatch="/////",
            )
            top = 30 + index * step + 1
            canvas.write(
                figure,
                14,
                top,
                "all" if row is total else wording.fitted(row.name, 34),
                colours["ink"],
                fontsize=10.5,
                fontweight="bold",
            )
            text = f"{wording.size(row.container_bytes)}, {wording.percent(row.ratio)} of BF16"
            canvas.write(figure, canvas.WIDTH - 16, top, text, colours["ink"], ha="right", fontsize=10)
        axes.set_ylim(step * len(rows), 0)
        axes.set_xlim(0, max(largest / unit, 1e-9) * 1.02)
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(name, color=colours["ink"], labelpad=1)
        axes.spines["left"].set_visible(False)
        canvas.legend(
            axes, colours, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4 if cast else 3, borderpad=0.2
        )
        return figure

    return Plot("sizes", "Sizes against BF16", description, draw)


# Bits per weight by layer


def _layers(manifest: Manifest) -> Plot | None:
    stacks, rest = summary.stacks(manifest)
    outside = summary.alike([*rest, *(row for stack in stacks[SHOWN_STACKS:] for row in stack.rows)])[:SHOWN_OUTSIDE]
    stacks = stacks[:SHOWN_STACKS]
    if not stacks and not outside:
        return None
    described = []
    for stack in stacks:
        values = stack.by_layer(summary.average_bits)
        described.append(
            f"{wording.fitted(stack.name, 40)}, {len(values)} layers: "
            f"{min(values.values()):.2f} to {max(values.values()):.2f}"
        )
    described += [f"{wording.fitted(name, 40)}: {wording.bits(summary.average_bits(rows))}" for name, rows in outside]

    def draw(colours: canvas.Palette) -> Figure:
        legends = [16.0 * math.ceil((min(len(stack.kinds), SHOWN_KINDS) + 1) / 2) for stack in stacks]
        side = 60 + 19.0 * len(outside) if outside else 0.0
        figure = canvas.new_figure(sum(24 + 150 + 38 + height for height in legends) + side, colours)
        top = 0.0
        for stack, height in zip(stacks, legends, strict=True):
            canvas.heading(figure, top + 5, f"{wording.fitted(stack.name, 40)}, bits per weight", colours)
            _draw_stack(canvas.new_axes(figure, colours, 44, top + 24, 12, 150), stack, colours)
            top += 24 + 150 + 38 + height
        if outside:
            canvas.heading(
                figure, top + 5, "Other matrices, bits per weight" if stacks else "Matrices, bits per weight", colours
            )
            _draw_outside(
                figure,
                canvas.new_axes(figure, colours, 246, top + 24, 16, 19.0 * len(outside)),
                outside,
                top + 24,
                colours,
            )
        return figure

    return Plot("layers", "Bits per weight by layer", "Bits per weight. " + "; ".join(described), draw)


def _draw_stack(axes: Axes, stack: summary.Stack, colours: canvas.Palette) -> None:
    kinds = list(stack.kinds.items())
    first = SHOWN_KINDS if len(kinds) <= SHOWN_KINDS else SHOWN_KINDS - 1
    lines = [(wording.fitted(kind, 27), layers) for kind, layers in kinds[:first]]
    rest = kinds[first:]
    if rest:
        together: dict[int, list[TensorRow]] = {}
        for _, layers in rest:
            for layer, rows in layers.items():
                together.setdefault(layer, []).extend(rows)
        lines.append((f"{len(rest)} smaller kinds", together))
    values: list[float] = []
    for index, (label, layers) in enumerate(lines):
        known = sorted(layers)
        bits = [summary.average_bits(layers[layer]) or 0.0 for layer in known]
        values += bits
        axes.plot(
            known,
            bits,
            color=colours[f"c{index + 1}"],
            linestyle=_DASHES[index],
            linewidth=1.4,
            marker=_MARKERS[index],
            markersize=3.6,
            markevery=max(1, len(known) // 12),
            label=canvas.drawable(label),
        )
    bound = stack.by_layer(summary.entropy_bound)
    axes.plot(list(bound), list(bound.values()), color=colours["muted"], linewidth=0.9, label="entropy bound")
    low, high = min(values + list(bound.values())), max(values + list(bound.values()))
    margin = max(0.08 * (high - low), 0.05)
    axes.set_ylim(low - margin, high + margin)
    canvas.few_numbers(axes, whole=True)
    axes.set_xlabel("layer", color=colours["ink"], labelpad=1)
    canvas.legend(
        axes, colours, loc="upper left", bbox_to_anchor=(-0.11, -32 / 150), ncols=2, labelspacing=0.35, borderpad=0
    )


def _draw_outside(
    figure: Figure, axes: Axes, groups: Sequence[tuple[str, list[TensorRow]]], top: float, colours: canvas.Palette
) -> None:
    values = [summary.average_bits(rows) or 0.0 for _, rows in groups]
    bounds = [summary.entropy_bound(rows) for _, rows in groups]
    axes.plot(values, range(len(groups)), linestyle="none", marker="o", markersize=6, color=colours["c1"])
    for y, bound in enumerate(bounds):
        if bound is not None:
            axes.plot(
                [bound], [y], linestyle="none", marker="|", markersize=11, markeredgewidth=1.6, color=colours["muted"]
            )
    for index, (name, _) in enumerate(groups):
        canvas.write(
            figure, 8, top + 19.0 * (index + 0.5), wording.fitted(name, 42), colours["ink"], fontsize=9, va="center"
        )
    known = values + [bound for bound in bounds if bound is not None]
    margin = max(0.08 * (max(known) - min(known)), 0.1)
    axes.set_xlim(min(known) - margin, max(known) + margin)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks([])
    canvas.few_numbers(axes, whole=False)
    axes.set_xlabel("● stored   | entropy bound", color=colours["ink"], labelpad=1)


# Exponents

_SPREAD: Final = (0.001, 0.25, 0.5, 0.75, 0.999)


def _exponents(manifest: Manifest) -> Plot | None:
    counts, weights = summary.exponents(manifest.tensors)
    if not counts[1:].any():
        return None
    spreads = []
    parts = summary.parts(manifest)
    for sizes, rows in parts if len(parts) > 1 else []:
        part_counts, _ = summary.exponents(rows)
        if part_counts.any():
            spreads.append((sizes.name, [value - 127 for value in summary.quantiles(part_counts, _SPREAD)]))
    present = np.flatnonzero(counts[1:]) + 1
    shares = counts / weights
    most = int(np.argmax(counts))
    description = (
        f"Histogram of {len(present)} exponents from {present[0] - 127} to {present[-1] - 127}. "
        f"The most frequent, {most - 127}, has {100 * shares[most]:.1f} % of the weights. "
        + "; ".join(
            f"{wording.fitted(name, 40)}: half of the weights from {values[1]} to {values[3]}"
            for name, values in spreads
        )
    )

    def draw(colours: canvas.Palette) -> Figure:
        side = 66 + 19.0 * len(spreads) if spreads else 0.0
        figure = canvas.new_figure(242 + side, colours)
        canvas.heading(figure, 5, "Share of the weights", colours)
        axes = canvas.new_axes(figure, colours, 44, 26, 12, 176)
        axes.bar(present - 127, shares[present], width=0.86, color=colours["c1"])
        axes.set_yscale("log")
        axes.set_ylim(shares[present].min() / 2, min(1.0, shares[present].max() * 2))
        limits = (present[0] - 128.0, present[-1] - 126.0)
        axes.set_xlim(*limits)
        canvas.few_numbers(axes, whole=True)
        axes.minorticks_off()
        axes.grid(visible=False, axis="x")
        canvas.powers_of_ten(axes)
        axes.set_xlabel("exponent e: weights from 2ᵉ up to 2ᵉ⁺¹", color=colours["ink"], labelpad=2)
        if spreads:
            canvas.heading(figure, 248, "Spread: median, half, 99.8 % of the weights", colours)
            below = canvas.new_axes(figure, colours, 130, 268, 12, 19.0 * len(spreads))
            for index, (name, values) in enumerate(spreads):
                canvas.write(
                    figure,
                    8,
                    268 + 19.0 * (index + 0.5),
                    wording.fitted(name.removesuffix(".df11"), 20),
                    colours["ink"],
                    fontsize=9.5,
                    va="center",
                )
                clipped = [min(max(value, limits[0]), limits[1]) for value in values]
                below.plot([clipped[0], clipped[4]], [index, index], color=colours["muted"], linewidth=1.2)
                below.plot(
                    [clipped[1] - 0.45, clipped[3] + 0.45],
                    [index, index],
                    color=colours["c1"],
                    linewidth=7,
                    solid_capstyle="butt",
                )
                below.plot(
                    [clipped[2]],
                    [index],
                    marker="o",
                    markersize=5,
                    color=colours["surface"],
                    markeredgecolor=colours["ink"],
                )
            below.set_ylim(len(spreads) - 0.5, -0.5)
            below.set_yticks([])
            below.set_xlim(*limits)
            canvas.few_numbers(below, whole=True)
            below.set_xlabel("exponent", color=colours["ink"], labelpad=1)
        return figure

    return Plot("exponents", "Exponents", description, draw)


# Outliers


def _outliers(manifest: Manifest) -> Plot | None:
    rows = [row for row in manifest.tensors if summary.is_bf16(row) and row.elements]
    if not rows:
        return None
    found = summary.outliers(manifest)
    named = found.tensors[:NAMED_OUTLIERS]
    far = {id(outlier.row) for outlier in found.tensors}
    description = f"{len(rows)} tensors, bits per weight against number of weights. " + (
        f"Median of the large ones: {found.usual:.2f}; {len(far)} outliers. " if found.usual is not None else ""
    )
    description += "; ".join(f"{wording.fitted(outlier.row.name, 60)}: {outlier.bits:.2f}" for outlier in named)

    def draw(colours: canvas.Palette) -> Figure:
        figure = canvas.new_figure(252 + (8 + 15.0 * len(named) if named else 0), colours)
        axes = canvas.new_axes(figure, colours, 36, 42, 14, 166)
        canvas.heading(figure, 5, "Bits per weight of each tensor", colours)
        if found.usual is not None:
            axes.axhline(
                found.usual,
                color=colours["muted"],
                linewidth=1,
                linestyle=(0, (4, 2)),
                label=f"median {found.usual:.2f}",
            )
        groups = (
            ("coded", "o", "c1", [row for row in rows if row.encoding == "df11" and id(row) not in far]),
            ("verbatim", "s", "c2", [row for row in rows if row.encoding != "df11" and id(row) not in far]),
            ("outlier", "D", "c4", [outlier.row for outlier in found.tensors]),
        )
        for label, marker, colour, group in groups:
            points = sorted(
                {(round(math.log10(row.elements), 2), round(row.bits_per_weight or 0.0, 2)) for row in group}
            )
            if points:
                axes.plot(
                    [10**x for x, _ in points],
                    [y for _, y in points],
                    linestyle="none",
                    marker=marker,
                    markersize=3.6 if label == "coded" else 5,
                    markerfacecolor=colours[colour] if label == "coded" else "none",
                    markeredgecolor=colours[colour],
                    markeredgewidth=1.0,
                    label=label,
                )
        axes.set_xscale("log")
        axes.minorticks_off()
        canvas.counts(axes)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.1, high + 0.08 * (high - low) + 0.1)
        _number(axes, named, colours)
        axes.set_xlabel("weights in the tensor", color=colours["ink"], labelpad=2)
        canvas.legend(
            axes, colours, loc="lower left", bbox_to_anchor=(-0.09, 1.0), ncols=4, borderpad=0.2, handletextpad=0.4
        )
        for number, outlier in enumerate(named, 1):
            text = f"{number}  {wording.fitted(outlier.row.name, 56)}  {outlier.bits:.2f}"
            canvas.write(figure, 10, 252 + 15.0 * (number - 1) + 4, text, colours["ink"], fontsize=9.5)
        return figure

    return Plot("outliers", "Outlier tensors", description, draw)


def _number(axes: Axes, named: Sequence[summary.Outlier], colours: canvas.Palette) -> None:
    # Overlapping points share one label, on their right if there is space.
    if not named:
        return
    axes.autoscale_view()
    places = (
        axes.transData.transform([(outlier.row.elements, outlier.bits) for outlier in named]) * 72 / axes.figure.dpi
    )
    together: list[list[int]] = []
    for index in sorted(range(len(named)), key=lambda index: (places[index][0], -places[index][1])):
        if together and max(abs(places[index] - places[together[-1][0]])) < 10:
            together[-1].append(index)
        else:
            together.append([index])
    edge = axes.transAxes.transform((0.8, 0))[0] * 72 / axes.figure.dpi
    for group in together:
        left = places[group[0]][0] > edge
        axes.annotate(
            ", ".join(str(index + 1) for index in sorted(group)),
            (named[group[0]].row.elements, named[group[0]].bits),
            (-6 if left else 6, 0),
            textcoords="offset points",
            fontsize=9,
            color=colours["ink"],
            ha="right" if left else "left",
            va="center",
        )
