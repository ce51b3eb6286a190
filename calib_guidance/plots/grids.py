"""Grids of samples."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import COLUMN, paper, pixels, save

_GAP = 0.06  # between images, of their size
_LETTER = 0.062  # inch, of the names of rows


def _tiles(axis: Axes, rows: Sequence[Sequence[np.ndarray]], columns: int) -> None:
    """Images ``(C, H, W)`` of one size, in rows that begin on the left; one unit of the axes each."""
    _, height, width = rows[0][0].shape
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            axis.imshow(pixels(image), extent=(c, c + 1 - _GAP, r + 1 - _GAP, r), vmin=0, vmax=255)
    axis.set(xlim=(0, columns - _GAP), ylim=(len(rows) - _GAP, 0), aspect=height / width)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, pad=2)


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
    figure = Figure(figsize=(COLUMN, (COLUMN - 0.3) / width * len(labels) * h / w + 0.08))
    axis = figure.add_subplot()
    _tiles(axis, [chosen[label] for label in labels], width)
    axis.set_xticks([])
    axis.set_yticks(np.arange(len(labels)) + (1 - _GAP) / 2, [str(label) for label in labels])
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

    Raises:
        ConfigurationError: there is no run, a run lacks a sample that was asked for, the runs have none in common, or other
            classes, seeds or image sizes.
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
    figure = Figure(figsize=(COLUMN, (COLUMN - left) / len(indices) * len(names) * h / w + 0.36))
    axis = figure.add_subplot()
    _tiles(axis, list(images.values()), len(indices))
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    labels = [str(int(runs[first]["label"][rows[first][index]])) for index in indices]
    axis.set_xticks(np.arange(len(indices)) + (1 - _GAP) / 2, labels)
    axis.set_xlabel("class, the same noise in a column")
    axis.set_yticks(np.arange(len(names)) + (1 - _GAP) / 2, names)
    return save(figure, path)
