"""x̂0 and the classifier's gradient along the trajectory (arXiv 2310.11311, Figures 4 and B.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import COLUMN, paper, pixels, save

_GAP = 0.06


def _magnitude(value: float) -> str:
    return f"±{value:.2g}" if 0.01 <= value < 100 else f"±{value:.0e}".replace("e-0", "e−").replace("e+0", "e")


@paper
def strips(
    x0: Sequence,
    gradient: Sequence,
    t: Sequence[float],
    names: Sequence[str],
    path: str | os.PathLike[str],
    per_step: bool = False,
) -> list[Path]:
    """Two rows for each sample: x̂0 and, below it, the gradient that it is given, mean over channels, red up and blue down.

    One scale for all steps of a sample, written on the right, so that a gradient that fades can be seen to; pixels are shown as
    they are, without smoothing.

    Args:
        x0: uint8 ``(samples, steps, C, H, W)``.
        gradient: ``(samples, steps, C', H', W')``, NaN at steps where no classifier ran, and all NaN without guidance, whose
            rows are not drawn.
        t: ``(steps,)`` of the full process.
        names: ``(samples,)``, e.g. of the classes.
        path: see :func:`~calib_guidance.plots.style.save`.
        per_step: a scale for each step instead, under its gradient: where it points, however weak.

    Raises:
        ConfigurationError: there is no sample or no step.
    """
    x0, means = np.asarray(x0), np.asarray(gradient, np.float64).mean(axis=2)
    if 0 in x0.shape[:2]:
        raise ConfigurationError("there is no trajectory to draw: no sample or no step was kept")
    samples, steps, _, h, w = x0.shape
    guided = bool(np.isfinite(means).any())
    rows = 1 + guided  # of a sample
    block = rows + 0.15 + (0.35 if guided and per_step else 0)  # with the room below it
    right = 0.36 if guided and not per_step else 0.04
    cell = (COLUMN - 0.62 - right) / steps
    figure = Figure(figsize=(COLUMN, cell * h / w * samples * block + 0.36))
    axis = figure.add_subplot()
    ticks, tick_names = [], []
    for k, (images, maps, name) in enumerate(zip(x0, means, names, strict=True)):
        top = k * block
        ticks.append(top + (1 - _GAP) / 2)
        tick_names.append(f"{name}\n" + r"$\hat{x}_0$")
        for j, image in enumerate(images):
            axis.imshow(pixels(image), extent=(j, j + 1 - _GAP, top + 1 - _GAP, top), vmin=0, vmax=255)
        if not guided:
            continue
        ticks.append(top + 1 + (1 - _GAP) / 2)
        tick_names.append(r"$\nabla S$")
        sizes = np.array([np.abs(m).max() if np.isfinite(m).all() else np.nan for m in maps])
        largest = np.nanmax(sizes) if np.isfinite(sizes).any() else np.nan
        for j, (one, size) in enumerate(zip(maps, sizes, strict=True)):
            if np.isnan(size):
                continue
            bound = (size if per_step else largest) or 1.0
            where = (j, j + 1 - _GAP, top + 2 - _GAP, top + 1)
            axis.imshow(one, extent=where, vmin=-bound, vmax=bound, cmap="RdBu_r")
            axis.add_patch(Rectangle((j, top + 1), 1 - _GAP, 1 - _GAP, fill=False, ec="0.8", lw=0.4))
            if per_step:
                axis.text(j + 0.47, top + 2, _magnitude(size), fontsize=5, ha="center", va="top")
        if not per_step and np.isfinite(largest):
            axis.text(steps, top + 1.47, _magnitude(largest), fontsize=6, ha="left", va="center")
    axis.set(xlim=(0, steps - _GAP), ylim=(samples * block - 0.15 - _GAP, 0), aspect=h / w)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, pad=2)
    axis.set_yticks(ticks, tick_names)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xticks(np.arange(steps) + (1 - _GAP) / 2, [f"{value:.0f}" for value in t])
    axis.set_xlabel("diffusion step $t$  (noise → image)")
    return save(figure, path)
