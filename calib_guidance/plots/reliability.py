"""Reliability diagrams."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from calib_guidance.errors import ConfigurationError
from calib_guidance.metrics import calibration_error_from_bins
from calib_guidance.plots.style import COLOURS, COLUMN, paper, save

_COLUMNS = 3


@paper
def reliability(bins: Sequence, titles: Sequence[str], path: str | os.PathLike[str]) -> list[Path]:
    """Reliability diagrams with their confidence histograms, one panel each, of a noise level or a classifier.

    Bars are the accuracy of each bin of confidence, the hatched part the gap to its mean confidence; a calibrated classifier's
    bars end on the diagonal. Below, the fraction of samples in each bin.

    Args:
        bins: ``(panels, num_bins, 3)`` count, summed confidence and number correct of equal-width bins.
        titles: of the panels; a panel without samples is skipped.
        path: see :func:`~calib_guidance.plots.style.save`.
    """
    bins = np.asarray(bins, np.float64)
    panels = [(title, sums) for title, sums in zip(titles, bins, strict=True) if sums[:, 0].sum()]
    if not panels:
        raise ConfigurationError("there is no reliability diagram to draw: the classifier has seen no samples")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    side = (COLUMN - 0.45) / _COLUMNS
    figure = Figure(figsize=(COLUMN if columns == _COLUMNS else 0.5 + 1.3 * columns, 0.4 + (0.5 + 1.3 * side) * rows))
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(3, 1) * rows)
    figure.get_layout_engine().set(h_pad=0.01, hspace=0.02, w_pad=0.02, wspace=0.02)
    edges = np.linspace(0, 1, bins.shape[1] + 1)
    width = edges[1]
    for number, (title, sums) in enumerate(panels):
        row, column = divmod(number, columns)
        axis, histogram = figure.add_subplot(grid[2 * row, column]), figure.add_subplot(grid[2 * row + 1, column])
        count, confidence, correct = sums.T
        used = count > 0
        accuracy, mean, left = correct[used] / count[used], confidence[used] / count[used], edges[:-1][used]
        gap = {"color": "none", "edgecolor": COLOURS[1], "hatch": "//////", "lw": 0.4}
        bars = axis.bar(left, accuracy, width, align="edge", color=COLOURS[5], edgecolor="white", lw=0.4)
        gaps = axis.bar(left, mean - accuracy, width, bottom=accuracy, align="edge", **gap)
        axis.plot([0, 1], [0, 1], color=COLOURS[6], lw=0.7, ls="--")
        ece = float(calibration_error_from_bins(torch.from_numpy(sums)))
        axis.set_title(f"{title}\nECE {ece:.3f}", fontsize=7, pad=3)
        histogram.bar(edges[:-1], count / count.sum(), width, align="edge", color=COLOURS[0], edgecolor="white", lw=0.4)
        for part in (axis, histogram):
            part.set(xlim=(0, 1), ylim=(0, 1))
            part.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            part.tick_params(labelsize=6.5, length=2, pad=2)
            part.tick_params(labelbottom=part is histogram, labelleft=column == 0)
        axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        histogram.set_yticks([0, 1], ["0", "1"])
        if number + columns >= len(panels):
            histogram.set_xlabel("confidence", fontsize=7, labelpad=2)
        if column == 0:
            axis.set_ylabel("accuracy", fontsize=7)
            histogram.set_ylabel("fraction", fontsize=7)
    names = ["accuracy", "gap to confidence"]
    figure.legend([bars[0], gaps[0]], names, loc="outside upper center", ncols=2 if columns > 1 else 1)
    return save(figure, path)
