"""Size, type and colors of all plots, and how they are written."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from calib_guidance.backend.atomic import atomic_path

# Wong's palette, told apart with any color vision (Nature Methods 8, 441, 2011). The last one is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LINE_STYLES = ("-", "--", "-.", ":")  # and without color
_MARKERS = "os^Dv<>P"
COLUMN = 3.3  # inch, of a page with two columns
DOTS_PER_INCH = 300

P, R = ParamSpec("P"), TypeVar("R")
PathLike = str | os.PathLike[str]

_RC = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "image.interpolation": "nearest",
    "savefig.dpi": DOTS_PER_INCH,
    "pdf.fonttype": 42,  # letters that can be searched and edited
}


def paper(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator of plot functions: sets size and type, whatever the caller's settings are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    return drawn


def point_style(number: int) -> dict[str, str]:
    """Color and marker of the ``number``-th series of points: those of two series differ, up to 56 of them."""
    color = number % 7
    return {"color": COLORS[color], "marker": _MARKERS[(color + number // 7) % len(_MARKERS)]}


def blank(height: float, width: float = COLUMN) -> Figure:
    """An empty plot, of the width of a column by default; both in inch."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def panel(height: float, width: float = COLUMN) -> tuple[Figure, Axes]:
    """A plot with one pair of axes, of the width of a column by default; both in inch."""
    figure = blank(height, width)
    return figure, figure.add_subplot()


def save(figure: Figure, path: PathLike) -> list[Path]:
    """Write a plot as PNG and PDF, whose bytes depend on nothing but what is drawn: there is no date in them.

    Args:
        figure: matplotlib's ``Figure``, to be written.
        path: without ending, or with ``.png``; folders are made.
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix == ".png" else stem
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".pdf")]
    for target, metadata in zip(paths, ({}, {"CreationDate": None}), strict=True):
        with atomic_path(target) as temporary:
            figure.savefig(temporary, metadata=metadata, format=target.suffix[1:])
    return paths
