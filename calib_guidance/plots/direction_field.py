"""Where guidance leads in the plane: joint against conditional direction (arXiv 2310.11311, Proposition 4.2, Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calib_guidance.plots.style import COLORS, COLUMN, PathLike, blank, paper, save

_TOWARDS, _AWAY = COLORS[0], COLORS[1]


class Contours(NamedTuple):
    """Lines of a density in the plane.

    Examples:
        >>> x = np.linspace(-2, 2, 5)
        >>> unit = Contours(x, x, np.exp(-(x[:, None] ** 2 + x**2) / 2), levels=[0.5])
        >>> float(unit.density.max())
        1.0
    """

    x: Sequence[float]  # (W,)
    y: Sequence[float]  # (H,)
    density: np.ndarray  # (H, W)
    levels: Sequence[float]  # of the lines, ascending


@paper
def direction_field(
    points: Sequence,
    gradients: Mapping[str, Sequence],
    mode: Sequence[float],
    path: PathLike,
    own: Contours | None = None,
    others: Sequence[Contours] = (),
    names: Mapping[str, Sequence[float]] | None = None,
    limits: tuple[float, float, float, float] | None = None,
) -> list[Path]:
    """Gradients at points of the plane, one panel for each kind, arrows of length ∝ √|∇|.

    Arrows that lead away from the mode of the class, ∇·(μ − x) < 0, have another color.

    Args:
        points: ``(n, 2)``.
        gradients: by title, ``(n, 2)`` each; where one is not finite there is no arrow.
        mode: μ of the class, ``(2,)``, a star.
        own: density of the class, drawn black.
        others: of the other classes, drawn gray.
        names: what to write at which place, ``(2,)`` each.
        limits: of both axes, left, right, bottom, top; those of the points by default.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    points, mode = np.asarray(points, np.float64), np.asarray(mode, np.float64)
    panels = len(gradients)
    left, right, bottom, top = limits or (*points[:, 0][[0, -1]], points[:, 1].min(), points[:, 1].max())
    side = (COLUMN - 0.1) / panels
    figure = blank(side * (top - bottom) / (right - left) + 0.5)
    for number, (title, field) in enumerate(gradients.items()):
        axis = figure.add_subplot(1, panels, number + 1)
        g = np.asarray(field, np.float64)
        size = np.linalg.norm(g, axis=1)
        drawn = np.isfinite(size) & (size > 0)
        at, g = points[drawn], g[drawn] / np.sqrt(size[drawn])[:, None]
        longest = np.linalg.norm(g, axis=1).max(initial=1e-12)
        away = (g * (mode - at)).sum(axis=1) < 0
        spacing = (right - left) / max(2, round(np.sqrt(len(points))))
        if own is not None:
            axis.contour(own.x, own.y, own.density, levels=own.levels, colors="black", linewidths=0.8)
        for x, y, density, levels in others:
            axis.contour(x, y, density, levels=levels, colors="0.6", linewidths=0.9)
        scaled = {"angles": "xy", "scale_units": "xy", "scale": longest / (1.6 * spacing)}
        color = np.where(away, _AWAY, _TOWARDS)
        axis.quiver(*at.T, *g.T, color=color, width=0.009, headwidth=3.5, zorder=3, **scaled)
        axis.plot(*mode, marker="*", color="white", mec="black", mew=0.7, ms=9, ls="", zorder=5)
        for name, (x, y) in (names or {}).items():
            halo = [withStroke(linewidth=2, foreground="white")]
            axis.text(x, y, name, fontsize=7, color="0.25", ha="center", va="center", zorder=4, path_effects=halo)
        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        axis.set_xlabel("$x_1$", labelpad=2)
        axis.set_ylabel("$x_2$" if number == 0 else "", labelpad=2)
        axis.set_title(title, pad=3)
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("0.7")
    arrow = {"marker": r"$\rightarrow$", "ms": 8, "ls": "", "mew": 0}
    entries = {
        "towards μ": Line2D([], [], color=_TOWARDS, **arrow),
        "away from μ": Line2D([], [], color=_AWAY, **arrow),
        "mode μ of the class": Line2D([], [], color="white", marker="*", mec="black", mew=0.7, ms=8, ls=""),
    }
    columns = {"ncols": 3, "columnspacing": 1.0, "handletextpad": 0.4}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", **columns)
    return save(figure, path)
