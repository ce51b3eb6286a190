"""Grids of samples, and x̂0 and the classifier's gradient along the trajectory (arXiv 2310.11311, Figures 4 and B.1)."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import COLUMN, panel, paper, save

_GAP = 0.06  # between images, of their size
_LETTER = 0.062  # inch, of the names of rows


def _tile(axis: Axes, image: np.ndarray, column: float, top: float, **style: Any) -> None:
    axis.imshow(image, extent=(column, column + 1 - _GAP, top + 1 - _GAP, top), **style)


def _sample(axis: Axes, image: np.ndarray, column: float, top: float) -> None:
    """A uint8 image ``(C, H, W)``, grey or RGB."""
    rgb = np.broadcast_to(np.asarray(image).transpose(1, 2, 0), (*image.shape[1:], 3))
    _tile(axis, rgb, column, top, vmin=0, vmax=255)


def _finish(axis: Axes, columns: int, bottom: float, aspect: float) -> None:
    """Axes around tiles, one unit of the axes each."""
    axis.set(xlim=(0, columns - _GAP), ylim=(bottom - _GAP, 0), aspect=aspect)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, pad=2)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")


def _centers(count: int) -> np.ndarray:
    return np.arange(count) + (1 - _GAP) / 2


def _grid(axis: Axes, rows: Sequence[Sequence[np.ndarray]], columns: int) -> None:
    """Images ``(C, H, W)`` of one size, in rows that begin on the left."""
    _, height, width = rows[0][0].shape
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            _sample(axis, image, c, r)
    _finish(axis, columns, len(rows), height / width)


@paper
def sample_grid(
    batches: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], rows: int = 10, columns: int = 10
) -> list[Path]:
    """Sample grid, one class per row, the first samples of each by index.

    Args:
        batches: ``label`` ``(N,)`` and uint8 ``image`` ``(N, C, H, W)``, read until the grid is full.
        path: see :func:`~calib_guidance.plots.style.save`.
        rows: classes, the first ones that occur in order of their number.
        columns: samples per class.
    """
    chosen: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        for label, image in zip(batch["label"].tolist(), np.asarray(batch["image"]), strict=True):
            if label in chosen or len(chosen) < rows:
                images = chosen.setdefault(label, [])
                if len(images) < columns:
                    images.append(image)
        if len(chosen) == rows and all(len(images) == columns for images in chosen.values()):
            break
    if not chosen:
        raise ConfigurationError("there are no samples to draw: the run has none, or all failed")
    labels = sorted(chosen)
    width = max(map(len, chosen.values()))
    _, h, w = chosen[labels[0]][0].shape
    figure, axis = panel((COLUMN - 0.3) / width * len(labels) * h / w + 0.08)
    _grid(axis, [chosen[label] for label in labels], width)
    axis.set_xticks([])
    axis.set_yticks(_centers(len(labels)), [str(label) for label in labels])
    axis.set_ylabel("class")
    return save(figure, path)


@paper
def side_by_side(
    runs: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
    samples: int = 8,
) -> list[Path]:
    """What several runs make of the same noise: a row for each run, a column for each sample, with its class above.

    Args:
        runs: by name, ``index``, ``label``, where known ``seed``, ``(N,)`` each, and uint8 ``image`` ``(N, C, H, W)``.
        path: see :func:`~calib_guidance.plots.style.save`.
        indices: of the samples to draw; by default the first that all runs have.
        samples: how many those are.
    """
    if not runs:
        raise ConfigurationError("there are no runs to set side by side: name at least one")
    rows = {name: {index: row for row, index in enumerate(run["index"].tolist())} for name, run in runs.items()}
    common = set.intersection(*(set(found) for found in rows.values()))
    if indices is None:
        indices = sorted(common)[:samples]
    if missing := [index for index in indices if index not in common]:
        raise ConfigurationError(f"not all runs have the samples {missing}: choose indices among those that they share")
    if not indices:
        raise ConfigurationError(f"the runs {', '.join(runs)} have no sample in common: sample the same indices in all")
    first, *others = runs
    for name in others:
        for column in ("label", "seed"):
            if column not in runs[first] or column not in runs[name]:
                continue
            for index in indices:
                a, b = (int(runs[run][column][rows[run][index]]) for run in (first, name))
                if a != b:
                    raise ConfigurationError(
                        f"sample {index} has {column} {a} in {first} and {b} in {name}: side by side they would show other "
                        "noise or another class. Compare runs of one seed and one label policy"
                    )
    images = {name: [np.asarray(run["image"][rows[name][index]]) for index in indices] for name, run in runs.items()}
    shapes = {name: chosen[0].shape[1:] for name, chosen in images.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigurationError(
            f"the runs have images of other sizes: {', '.join(f'{n} {h}×{w}' for n, (h, w) in shapes.items())}"
        )
    names = [textwrap.fill(name, 14) for name in images]
    letters = max(len(line) for name in names for line in name.splitlines())
    (h, w), left = shapes[first], 0.12 + letters * _LETTER
    figure, axis = panel((COLUMN - left) / len(indices) * len(names) * h / w + 0.36)
    _grid(axis, list(images.values()), len(indices))
    labels = [str(int(runs[first]["label"][rows[first][index]])) for index in indices]
    axis.set_xticks(_centers(len(indices)), labels)
    axis.set_xlabel("class, the same noise in a column")
    axis.set_yticks(_centers(len(names)), names)
    return save(figure, path)


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
    figure, axis = panel(cell * h / w * samples * block + 0.36)
    ticks, tick_names = [], []
    for k, (images, maps, name) in enumerate(zip(x0, means, names, strict=True)):
        top = k * block
        ticks.append(top + (1 - _GAP) / 2)
        tick_names.append(f"{name}\n" + r"$\hat{x}_0$")
        for j, image in enumerate(images):
            _sample(axis, image, j, top)
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
            _tile(axis, one, j, top + 1, vmin=-bound, vmax=bound, cmap="RdBu_r")
            axis.add_patch(Rectangle((j, top + 1), 1 - _GAP, 1 - _GAP, fill=False, ec="0.8", lw=0.4))
            if per_step:
                axis.text(j + 0.47, top + 2, _magnitude(size), fontsize=5, ha="center", va="top")
        if not per_step and np.isfinite(largest):
            axis.text(steps, top + 1.47, _magnitude(largest), fontsize=6, ha="left", va="center")
    _finish(axis, steps, samples * block - 0.15, h / w)
    axis.set_yticks(ticks, tick_names)
    axis.set_xticks(_centers(steps), [f"{value:.0f}" for value in t])
    axis.set_xlabel("diffusion step $t$  (noise → image)")
    return save(figure, path)
