"""Fronts: what of one metric a method can give for how much of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import PathLike, panel, paper, point_style, save

_FEW = 4  # methods whose legend has room beside the points


def front(points: Sequence[tuple[float, float]], signs: Sequence[int]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, in order of the first; ``signs`` are −1 where higher is better, else 1.

    Examples:
        >>> front([(0.5, 0.5), (0.2, 0.9), (0.4, 0.4), (0.9, 0.1)], (-1, -1))
        [(0.2, 0.9), (0.5, 0.5), (0.9, 0.1)]
    """
    found, best = [], float("inf")
    for x, y in sorted(points, key=lambda point: (signs[0] * point[0], signs[1] * point[1])):
        if signs[1] * y < best:
            best = signs[1] * y
            found.append((x, y))
    return sorted(found)


@paper
def fronts(
    points: Mapping[str, Sequence[tuple[float, float]]],
    titles: Sequence[str],
    signs: Sequence[int],
    path: PathLike,
    title: str = "",
) -> list[Path]:
    """Every setting of every method as a point, and a line through those that no other setting of the method beats in both.

    Args:
        points: by method, x and y of each setting.
        titles: of x and y.
        signs: of x and y, see :func:`front`.
        title: above the plot.
    """
    if not any(points.values()):
        raise ConfigurationError("there is nothing to draw: no method has points")
    below = len(points) > _FEW
    columns = 1 if max(map(len, points)) > 22 else 2
    figure, axis = panel(2.6 + 0.15 * below * -(-len(points) // columns))
    for number, (method, some) in enumerate(points.items()):
        style = {**point_style(number), "ms": 3}
        axis.plot(*zip(*some, strict=True), ls="none", alpha=0.35, **style)
        axis.plot(*zip(*front(some, signs), strict=True), lw=1, label=method, **style)
    axis.set(xlabel=titles[0], ylabel=titles[1])
    axis.set_title(title, loc="left", fontsize=7)
    axis.margins(0.08)
    if below:
        figure.legend(loc="outside lower center", ncols=columns)
    else:
        axis.legend()
    return save(figure, path)
