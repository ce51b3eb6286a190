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
) -> Path:
    """One quantity over the trajectory, from noise on the left to the image on the right.

    Args:
        t: step of the full process at each point, ascending.
        mean: the quantity, ≥ 0; NaN where it was not measured.
        path: PNG to write.
        label: of the quantity, for the axis.
        spread: half-width of a band around it.
        average: drawn as a horizontal line.
    """
    t, mean = np.asarray(t), np.asarray(mean)
    figure, axis = plt.subplots(figsize=(3.6, 2.5))
    axis.plot(t, mean, color=COLOURS[0], lw=1.4)
    if spread is not None:
        low, high = np.maximum(mean - np.asarray(spread), 0), mean + np.asarray(spread)
        axis.fill_between(t, low, high, color=COLOURS[0], alpha=0.2, lw=0)
    if average is not None:
        axis.axhline(average, color=COLOURS[1], lw=1, ls="--", label=f"mean {average:.3f}")
        axis.legend(frameon=False, fontsize=8)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("diffusion step t  (noise → image)")
    axis.set_ylabel(label)
    axis.invert_xaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)
