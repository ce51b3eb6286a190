"""Figures, each from saved data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

# Wong's palette, told apart with any colour vision (Nature Methods 8, 441, 2011).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_grid(batches: Iterable[dict[str, Tensor]], path: Path, rows: int = 10, columns: int = 10) -> Path:
    """Sample grid, one class per row, the first samples of each by index.

    Args:
        batches: ``label`` ``(N,)`` and uint8 ``image`` ``(N, C, H, W)``, read until the grid is full.
        path: PNG to write.
        rows: classes, the first ones that occur in order of their number.
        columns: samples per class.
    """
    chosen: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        for label, image in zip(batch["label"].tolist(), batch["image"].numpy(), strict=True):
            if label in chosen or len(chosen) < rows:
                images = chosen.setdefault(label, [])
                if len(images) < columns:
                    images.append(image)
        if len(chosen) == rows and all(len(images) == columns for images in chosen.values()):
            break
    columns = max(len(images) for images in chosen.values())
    figure, axes = plt.subplots(len(chosen), columns, figsize=(0.45 * columns, 0.45 * len(chosen)), squeeze=False)
    for row, (label, images) in zip(axes, sorted(chosen.items()), strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, images, strict=False):
            pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        row[0].text(-0.35, 0.5, str(label), transform=row[0].transAxes, ha="center", va="center", fontsize=9)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    return _save(figure, path)


def draw_curve(
    t: Sequence[int],
    mean: Sequence[float],
    path: Path,
    label: str,
    spread: Sequence[float] | None = None,
    average: float | None = None,
    least: float | None = 0.0,
) -> Path:
    """One quantity over the trajectory, from noise on the left to the image on the right.

    Args:
        t: step of the full process at each point, ascending.
        mean: the quantity; NaN where it was not measured.
        path: PNG to write.
        label: of the quantity, for the axis.
        spread: half-width of a band around it.
        average: drawn as a horizontal line.
        least: that the quantity can be, where the axis begins; None begins it where the data do.
    """
    t, mean = np.asarray(t), np.asarray(mean)
    figure, axis = plt.subplots(figsize=(3.6, 2.5))
    axis.plot(t, mean, color=COLOURS[0], lw=1.4)
    if spread is not None:
        low, high = mean - np.asarray(spread), mean + np.asarray(spread)
        low = low if least is None else np.maximum(low, least)
        axis.fill_between(t, low, high, color=COLOURS[0], alpha=0.2, lw=0)
    if average is not None:
        axis.axhline(average, color=COLOURS[1], lw=1, ls="--", label=f"mean {average:.3f}")
        axis.legend(frameon=False, fontsize=8)
    if least is not None:
        axis.set_ylim(bottom=least)
    axis.set_xlabel("diffusion step t  (noise → image)")
    axis.set_ylabel(label)
    axis.invert_xaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def draw_reliability(bins: Tensor, titles: Sequence[str], path: Path) -> Path:
    """Reliability diagrams with their confidence histograms, one panel each.

    Bars are the accuracy of each bin of confidence at its mean confidence, the hatched part the gap to it; a calibrated
    classifier's bars end on the diagonal. Below, the share of samples in each bin.

    Args:
        bins: ``(panels, num_bins, 3)`` count, summed confidence and number correct of equal-width bins.
        titles: of the panels; a panel without samples is left out.
        path: PNG to write.
    """
    panels = [
        (title, sums) for title, sums in zip(titles, bins.double().cpu().numpy(), strict=True) if sums[:, 0].sum()
    ]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = plt.figure(figsize=(1.8 * columns + 0.4, 2.3 * rows))
    outer = figure.add_gridspec(rows, columns, wspace=0.14, hspace=0.42)
    edges = np.linspace(0, 1, bins.shape[1] + 1)
    width = edges[1]
    for number, (title, sums) in enumerate(panels):
        row, column = divmod(number, columns)
        upper, lower = outer[row, column].subgridspec(2, 1, height_ratios=(3, 1), hspace=0.2)
        axis, histogram = figure.add_subplot(upper), figure.add_subplot(lower)
        count, confidence, correct = sums.T
        used = count > 0
        accuracy, mean, left = correct[used] / count[used], confidence[used] / count[used], edges[:-1][used]
        gap = {"color": "none", "edgecolor": COLOURS[1], "hatch": "//////", "lw": 0.4}
        bars = axis.bar(left, accuracy, width, align="edge", color=COLOURS[5], edgecolor="white", lw=0.4)
        gaps = axis.bar(left, mean - accuracy, width, bottom=accuracy, align="edge", **gap)
        axis.plot([0, 1], [0, 1], color=COLOURS[6], lw=0.8, ls="--")
        ece = np.abs(correct - confidence).sum() / count.sum()
        axis.set_title(f"{title}\nECE {ece:.3f}", fontsize=8, pad=3)
        histogram.bar(edges[:-1], count / count.sum(), width, align="edge", color=COLOURS[0], edgecolor="white", lw=0.4)
        for part in (axis, histogram):
            part.set_xlim(0, 1)
            part.set_ylim(0, 1)
            part.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            part.spines[["top", "right"]].set_visible(False)
            part.tick_params(labelsize=7, labelbottom=part is histogram, labelleft=column == 0)
        axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        histogram.set_yticks([0, 1], ["0", "1"])
        if number + columns >= len(panels):
            histogram.set_xlabel("confidence", fontsize=8)
        if column == 0:
            axis.set_ylabel("accuracy", fontsize=8)
            histogram.set_ylabel("share", fontsize=8)
    names = ["accuracy", "gap to mean confidence"]
    figure.legend(
        [bars[0], gaps[0]], names, loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=2, frameon=False, fontsize=8
    )
    return _save(figure, path)
