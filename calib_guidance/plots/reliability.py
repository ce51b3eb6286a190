"""Reliability diagrams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import COLORS, COLUMN, PathLike, blank, paper, save

_COLUMNS = 2
_FEW = 10  # samples: the accuracy of so many is known to 0.16 at best
_ACCURACY = {"facecolor": COLORS[5], "edgecolor": "white", "lw": 0.4}
_GAP = {"facecolor": "none", "edgecolor": COLORS[1], "hatch": "//////", "lw": 0.4}
_NEARLY_EMPTY = {"facecolor": "none", "edgecolor": "0.5", "hatch": "", "ls": ":", "lw": 0.8}


@paper
def reliability(bins: Sequence, titles: Sequence[str], path: PathLike) -> list[Path]:
    """Reliability diagrams with their confidence histograms, one panel each, of a noise level or a classifier.

    Bars are the accuracy of each bin of confidence, the hatched part the gap to its mean confidence; a calibrated classifier's
    bars end on the diagonal. Bins of fewer than 10 samples are drawn as dotted outlines. Below, the fraction of samples in each
    bin.

    Args:
        bins: ``(panels, num_bins, 3)`` count, summed confidence and number correct of equal-width bins.
        titles: of the panels; a panel without samples is skipped.
    """
    bins = np.asarray(bins, np.float64)
    panels = [(title, sums) for title, sums in zip(titles, bins, strict=True) if sums[:, 0].sum()]
    if not panels:
        raise ConfigurationError("there is no reliability diagram to draw: the classifier has seen no samples")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    side = (COLUMN - 0.45) / _COLUMNS
    is_room = len(panels) % columns > 0  # for the legend, in the last cell
    figure = blank(
        0.4 * (not is_room) + (0.5 + 1.3 * side) * rows, COLUMN if columns == _COLUMNS else 0.5 + 1.3 * columns
    )
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
        bars = axis.bar(left, accuracy, width, align="edge", **_ACCURACY)
        gaps = axis.bar(left, mean - accuracy, width, bottom=accuracy, align="edge", **_GAP)
        for pair, n in zip(zip(bars, gaps, strict=True), count[used], strict=True):
            for bar in pair if n < _FEW else ():
                bar.set(**_NEARLY_EMPTY)
        axis.plot([0, 1], [0, 1], color=COLORS[6], lw=0.7, ls="--")
        ece = np.abs(correct - confidence).sum() / count.sum()
        axis.set_title(f"{title}\nECE {ece:.3f}", fontsize=7, pad=3)
        fraction = count / count.sum()
        histogram.bar(edges[:-1], fraction, width, align="edge", color=COLORS[0], edgecolor="white", lw=0.4)
        for part in (axis, histogram):
            part.set(xlim=(0, 1), ylim=(0, 1 if part is axis else fraction.max()))
            part.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            part.tick_params(labelsize=6.5, length=2, pad=2)
            part.tick_params(labelbottom=part is histogram, labelleft=column == 0 or part is histogram)
        axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        histogram.set_yticks([0, fraction.max()], ["0", f"{fraction.max():.2g}"])
        if number + columns >= len(panels):
            histogram.set_xlabel("confidence", fontsize=7, labelpad=2)
        if column == 0:
            axis.set_ylabel("accuracy", fontsize=7)
            histogram.set_ylabel("fraction", fontsize=7)
    from matplotlib.patches import Patch

    entries = [Patch(label="accuracy", **_ACCURACY), Patch(label="gap to confidence", **_GAP)]
    if any(((sums[:, 0] > 0) & (sums[:, 0] < _FEW)).any() for _, sums in panels):
        entries.append(Patch(label=f"below {_FEW} samples", **_NEARLY_EMPTY))
    short = {"handlelength": 1.4, "columnspacing": 1, "handletextpad": 0.5}
    if is_room:
        cell = figure.add_subplot(grid[2 * rows - 2 :, columns - 1])
        cell.set_axis_off()
        cell.legend(handles=entries, loc="center", **short)
    else:
        figure.legend(handles=entries, loc="outside upper center", ncols=3 if columns > 1 else 1, **short)
    return save(figure, path)
