"""What all plots share: colours by role, machine-independent settings, positions in points."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 400.0
"""Points. At this width a plot's text is as large as the page's, so it stays readable on a narrow screen."""

ROLES: Final = ("ink", "muted", "grid", "surface", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
"""What colours stand for. The page defines ``--ROLE`` for each.

The order of c1 to c8 keeps neighbours apart for people with colour blindness.
"""
LIGHT: Final = dict(
    zip(
        ROLES,
        (
            "#1b1f24",
            "#57606a",
            "#d8dee4",
            "#ffffff",
            "#0072b2",
            "#d55e00",
            "#00795a",
            "#a0458a",
            "#946200",
            "#3b8ec2",
            "#57606a",
            "#1b1f24",
        ),
        strict=True,
    )
)
DARK: Final = dict(
    zip(
        ROLES,
        (
            "#e6edf3",
            "#9da7b3",
            "#30363d",
            "#0d1117",
            "#56b4e9",
            "#ff9a52",
            "#3ecf9e",
            "#e59ac5",
            "#e6b84c",
            "#a9d8f5",
            "#9da7b3",
            "#e6edf3",
        ),
        strict=True,
    )
)
SENTINELS: Final = {role: f"#fe01{index:02x}" for index, role in enumerate(ROLES)}
"""Placeholder colours of the SVG, replaced afterwards; nothing else in it has these values."""

Palette = Mapping[str, str]


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib's defaults, whatever this machine's settings are, and ours on top."""
    import matplotlib

    ours: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "font.family": "DejaVu Sans",  # It comes with matplotlib.
        "font.size": 10.0,
        "hatch.linewidth": 1.2,
        "svg.fonttype": "none",
        "svg.hashsalt": "df11",
        "text.parse_math": False,  # A name may hold a dollar sign.
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def new_figure(height: float, colours: Palette) -> Figure:
    """A figure WIDTH wide, with a height in points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72), facecolor=colours["surface"])


def new_axes(figure: Figure, colours: Palette, left: float, top: float, right: float, height: float) -> Axes:
    """Axes placed by their distances from the left, top and right edge, and their height, all in points."""
    whole = figure.get_figheight() * 72
    axes = figure.add_axes(
        (left / WIDTH, 1 - (top + height) / whole, (WIDTH - left - right) / WIDTH, height / whole), facecolor="none"
    )
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["muted"])
    axes.tick_params(colors=colours["muted"], labelcolor=colours["ink"], labelsize=9.5, length=3)
    axes.grid(color=colours["grid"], linewidth=0.8)
    return axes


def write(figure: Figure, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """Text at (x, y), in points from the left and top edge. y is its top unless ``va`` says otherwise."""
    whole = figure.get_figheight() * 72
    figure.text(x / WIDTH, 1 - y / whole, drawable(text), color=colour, **{"va": "top", **options})


def heading(figure: Figure, y: float, text: str, colours: Palette) -> None:
    """The title of a part of a figure."""
    write(figure, 8, y, text, colours["ink"], fontsize=10.5, fontweight="bold")


def drawable(text: str) -> str:
    """The text with each character that the font lacks replaced by U+FFFD."""
    if text.isascii():
        return text
    known = _characters()
    return "".join(character if ord(character) in known else "\N{REPLACEMENT CHARACTER}" for character in text)


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in ("DejaVu Sans", "DejaVu Sans:bold")]
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def legend(axes: Axes, colours: Palette, **options: Any) -> None:
    """A legend without a frame."""
    made = axes.legend(
        frameon=False, fontsize=9.5, handlelength=2.2, columnspacing=1.2, labelcolor=colours["ink"], **options
    )
    made.set_in_layout(False)


# Numbers on axes


def few_numbers(axes: Axes, *, whole: bool) -> None:
    """Few enough numbers on the x axis that they do not touch."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=whole, nbins=8 if whole else 4))


_RAISED: Final = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def powers_of_ten(axes: Axes) -> None:
    """Labels for the y axis: matplotlib's own for powers are formulas, which are switched off."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    def label(value: float, _: object) -> str:
        power = round(math.log10(value))
        return "1" if power == 0 else f"10{str(power).translate(_RAISED)}"

    axes.yaxis.set_major_locator(LogLocator(10.0, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(label))


def counts(axes: Axes) -> None:
    """Labels such as ``10k`` on the x axis."""
    from matplotlib.ticker import FuncFormatter

    def label(value: float, _: object) -> str:
        for power, letter in ((9, "G"), (6, "M"), (3, "k")):
            if value >= 10**power:
                return f"{value / 10**power:g}{letter}"
        return f"{value:g}"

    axes.xaxis.set_major_formatter(FuncFormatter(label))
