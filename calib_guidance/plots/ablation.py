"""What a setting does: the ablation tables of arXiv 2310.11311 and arXiv 2511.05844 as plots."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import COLORS, PathLike, blank, panel, paper, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float | str, Mapping[str, tuple[float | None, float | None]]]


def _measured(points: Sequence[Point], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean of a metric at each point, and half the length of its error bar; NaN where there is none."""
    mean, std = np.array([metrics.get(metric, (None, None)) for _, metrics in points], np.float64).T
    return mean, np.where(std > 0, std, np.nan)


def _sorted(points: Sequence[Point], name: str) -> tuple[list[Point], list[str], bool]:
    """The points in order, their values as texts, and whether these are numbers."""
    if not points:
        raise ConfigurationError(f"there is nothing to draw over {name}: no value of it has been measured")
    numeric = not any(isinstance(value, str) for value, _ in points)
    ordered = sorted(points, key=lambda point: point[0]) if numeric else list(points)
    return ordered, [f"{value:g}" if numeric else str(value) for value, _ in ordered], numeric


@paper
def ablation(
    points: Sequence[Point], name: str, path: PathLike, held: str = "", labels: Mapping[str, str] = MappingProxyType({})
) -> list[Path]:
    """A panel for each metric over the values of a setting, with error bars.

    Args:
        points: the value, and of each metric mean and standard deviation (None where there is none). Numbers are drawn in
            order, at their distance and joined by a line, words one after the other.
        name: of the setting: α, scale, τ2, γ …
        held: what other settings are, said above the plot.
        labels: of the metrics, by key; a key without one is its own label.
    """
    points, texts, numeric = _sorted(points, name)
    metrics = list(dict.fromkeys(m for _, measured in points for m in measured))
    metrics = [metric for metric in metrics if np.isfinite(_measured(points, metric)[0]).any()]
    if not metrics:
        raise ConfigurationError(f"there is nothing to draw over {name}: no metric has a number")
    x = np.array([value for value, _ in points], float) if numeric else np.arange(len(points), dtype=float)
    slanted = not numeric and max(map(len, texts)) * len(texts) > 40
    figure = blank(0.45 + 0.3 * slanted + 1.1 * len(metrics))
    axes = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axis, metric) in enumerate(zip(axes, metrics, strict=True)):
        style = {"color": COLORS[number % 7], "marker": "os^Dv<>"[number % 7], "ms": 3.5, "lw": 1}
        style |= {} if numeric else {"ls": "none"}  # nothing lies between two words
        axis.errorbar(x, *_measured(points, metric), capsize=2, elinewidth=0.8, **style)
        axis.set_ylabel(textwrap.fill(labels.get(metric, metric.replace("_", " ")), 20), fontsize=7)
        axis.margins(y=0.12)
    axes[0].set_title(held, loc="left", fontsize=7)
    figure.align_ylabels()
    if not numeric or len(points) <= 6:
        axes[-1].set_xticks(x, texts, **({"rotation": 30, "ha": "right"} if slanted else {}))
        axes[-1].minorticks_off()
    axes[-1].set_xlabel(name)
    return save(figure, path)


def _annotate(figure: Figure, axis: Axes, x: np.ndarray, y: np.ndarray, texts: Sequence[str]) -> None:
    """Texts beside points, each at the first of eight places where it covers neither another one nor a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # lays out, so that places are known
    figure.set_layout_engine("none")
    dots = axis.transData.transform(np.column_stack([x, y]))
    taken = [Bbox.from_bounds(a - 5, b - 5, 10, 10) for a, b in dots]
    places = [(4, 4), (4, -4), (-4, 4), (-4, -4), (0, 6), (0, -6), (7, 0), (-7, 0)]
    for dot, (a, b, text) in enumerate(zip(x, y, texts, strict=True)):
        others = taken[:dot] + taken[dot + 1 :]
        for right, up in places:
            ha, va = ("left", "center", "right")[1 - np.sign(right)], ("bottom", "center", "top")[1 - np.sign(up)]
            note = axis.annotate(
                text, (a, b), (right, up), textcoords="offset points", ha=ha, va=va, fontsize=6.5, annotation_clip=False
            )
            box = note.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in others) or (right, up) == places[-1]:
                taken.append(box)
                break
            note.remove()


@paper
def precision_recall(points: Sequence[Point], name: str, path: PathLike, held: str = "") -> list[Path]:
    """Precision over recall as a setting changes, each point with its value, mean and standard deviation in both directions.

    Args:
        points: see :func:`ablation`; of the metrics ``precision`` and ``recall`` are drawn. Points without both are skipped.
        name, held: see :func:`ablation`.
    """
    points, texts, numeric = _sorted(points, name)
    (precision, p_std), (recall, r_std) = (_measured(points, metric) for metric in ("precision", "recall"))
    there = np.isfinite(precision) & np.isfinite(recall)
    if not there.any():
        raise ConfigurationError(f"there is nothing to draw over {name}: no value has both precision and recall")
    figure, axis = panel(2.5)
    x, y = recall[there], precision[there]
    style = {"marker": "o", "ms": 3.5, "lw": 0.8, "ls": "-" if numeric else "none"}
    axis.errorbar(x, y, p_std[there], r_std[there], color=COLORS[0], ecolor="0.75", elinewidth=0.8, **style)
    axis.margins(0.1)
    axis.set(xlabel="recall ↑", ylabel="precision ↑")
    named = f"numbers: {name}" if numeric else name
    axis.set_title(f"{named} (at {held})" if held else named, loc="left", fontsize=7)
    _annotate(figure, axis, x, y, np.array(texts)[there])
    return save(figure, path)
