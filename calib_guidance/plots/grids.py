"""Grids of samples, and x̂0 and the classifier's gradient along the trajectory (arXiv 2310.11311, Figures 4 and B.1)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from calib_guidance.errors import ConfigurationError
from calib_guidance.plots.style import COLUMN, PathLike, panel, paper, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 0.06  # between images, of their size
_APART = 0.3  # between the strip and the real image beside it, of an image
_LETTER = 0.062  # inch, of names


def _tile(axis: Axes, image: np.ndarray, column: float, top: float, **style: Any) -> None:
    axis.imshow(image, extent=(column, column + 1 - _GAP, top + 1 - _GAP, top), **style)


def _sample(axis: Axes, image: np.ndarray, column: float, top: float) -> None:
    """A uint8 image ``(C, H, W)``, gray or RGB."""
    rgb = np.broadcast_to(np.asarray(image).transpose(1, 2, 0), (*image.shape[1:], 3))
    _tile(axis, rgb, column, top, vmin=0, vmax=255)


def _finish(axis: Axes, columns: int, bottom: float, aspect: float) -> None:
    """Axes around tiles, one unit of the axes each."""
    # Constrained layout does not know the aspect: what is to spare goes to the names, on the left and at the top.
    axis.set(xlim=(0, columns - _GAP), ylim=(bottom - _GAP, 0), aspect=aspect, anchor="SE")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, pad=2)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")


def _centers(count: int) -> np.ndarray:
    return np.arange(count) + (1 - _GAP) / 2


def _named_rows(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    path: PathLike,
    top: Sequence[str] = (),
    turn: bool = True,
    width: float = COLUMN,
    **labels: str,
) -> list[Path]:
    """Images ``(C, H, W)`` of one size, in rows that begin on the left, with the names of rows and, at the top, of columns."""
    names = [textwrap.fill(name, 14, max_lines=2, placeholder=" …") for name, _ in rows]
    columns = max(len(images) for _, images in rows)
    longest = max(len(line) for name in names for line in name.splitlines())
    tile = (width - 0.24 - longest * _LETTER) / columns
    turned = turn and max(map(len, top), default=0) * 0.9 * _LETTER > tile
    _, h, w = rows[0][1][0].shape
    above = 0.08 if not top else 0.42 + turned * _LETTER * max(map(len, top))
    figure, axis = panel(tile * len(rows) * h / w + above, width)
    for r, (_, images) in enumerate(rows):
        for c, image in enumerate(images):
            _sample(axis, image, c, r)
    _finish(axis, columns, len(rows), h / w)
    axis.set_xticks(_centers(len(top)), top, rotation=90 if turned else 0)
    axis.set_yticks(_centers(len(names)), names, fontsize=5.5 if any("\n" in name for name in names) else 7)
    axis.set(**labels)
    return save(figure, path)


@paper
def sample_grid(
    batches: Iterable[Mapping[str, Any]],
    path: PathLike,
    rows: int = 10,
    columns: int = 10,
    names: Mapping[int, str] = MappingProxyType({}),
) -> list[Path]:
    """Sample grid, one class per row, the first samples of each by index.

    Args:
        batches: ``label`` ``(N,)`` and uint8 ``image`` ``(N, C, H, W)``, read until the grid is full.
        rows: classes, the first ones that occur in order of their number.
        columns: samples per class.
        names: of classes, by number.
    """
    chosen: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        for label, image in zip(batch["label"].tolist(), np.asarray(batch["image"]), strict=True):
            if (label in chosen or len(chosen) < rows) and len(images := chosen.setdefault(label, [])) < columns:
                images.append(image)
        if len(chosen) == rows and all(len(images) == columns for images in chosen.values()):
            break
    if not chosen:
        raise ConfigurationError("there are no samples to draw: the run has none, or all failed")
    return _named_rows([(names.get(c, str(c)), chosen[c]) for c in sorted(chosen)], path, ylabel="class")


@paper
def side_by_side(
    runs: Mapping[str, Sequence[np.ndarray]], classes: Sequence[str], path: PathLike, width: float = COLUMN
) -> list[Path]:
    """Several runs from the same noise: a row for each run, a column for each sample, with its class above.

    Args:
        runs: by name, uint8 ``(N, C, H, W)`` samples of the same indices, seeds and labels.
        classes: ``(N,)`` of the samples.
        path: without ending.
        width: inch, that of a column by default.
    """
    shapes = {name: np.shape(images) for name, images in runs.items()}
    if len(set(shapes.values())) != 1 or not len(classes):
        raise ConfigurationError(f"side by side go samples of one size, as many of each run as classes, got {shapes}")
    top = [textwrap.shorten(name, 12, placeholder="…") for name in classes]
    return _named_rows([*runs.items()], path, top, width=width, xlabel="class, the same noise in a column")


def real_of_classes(
    labels: Sequence[int], shape: Sequence[int], real: Mapping[str, np.ndarray] | None
) -> list[np.ndarray | None]:
    """A real image for each label, of ``label`` ``(N,)`` and ``image`` ``(N, C, H, W)``, each once; None where there is none."""
    found: list[np.ndarray | None] = []
    of_class = {} if real is None else {label: iter(real["image"][real["label"] == label]) for label in set(labels)}
    for label in labels:
        image = next(of_class.get(label, iter(())), None)
        found.append(image if image is not None and image.shape[1:] == tuple(shape)[1:] else None)
    return found


@paper
def guidance_grid(
    images: Sequence, scores: Sequence[str], scales: Sequence[float], path: PathLike, title: str = ""
) -> list[Path]:
    """One noise under each score and scale: a row for each score, a column for each scale.

    Args:
        images: uint8 ``(scores, scales, C, H, W)``.
        scores: names of the rows.
        scales: s of the columns.
        title: said below the scale, such as the class.
    """
    images = np.asarray(images)
    if images.shape[:2] != (len(scores), len(scales)) or 0 in images.shape[:2]:
        raise ConfigurationError(f"a grid of scores and scales needs an image for each, got {images.shape[:2]}")
    label = "scale $s$" + (f"  ({title})" if title else "")
    rows = list(zip(scores, images, strict=True))
    return _named_rows(rows, path, [f"{scale:g}" for scale in scales], xlabel=label, turn=False)


@paper
def strips(
    x0: Sequence,
    gradient: Sequence,
    t: Sequence[float],
    names: Sequence[str],
    path: PathLike,
    real: Sequence[np.ndarray | None] = (),
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
        real: for each sample a real image of its class, uint8 ``(C, H, W)``, to show beside it, or None.
    """
    x0, means = np.asarray(x0), np.asarray(gradient, np.float64).mean(axis=2)
    if 0 in x0.shape[:2]:
        raise ConfigurationError("there is no trajectory to draw: no sample or no step was kept")
    from matplotlib.patches import Rectangle

    samples, steps, _, h, w = x0.shape
    guided = bool(np.isfinite(means).any())
    block = 1 + guided + 0.15  # rows of a sample, with the room below them
    beside = any(image is not None for image in real)
    cell = (COLUMN - 0.62 - (0.36 if guided and not beside else 0.04)) / (steps + beside * (1 + _APART))
    figure, axis = panel(cell * h / w * samples * block + 0.36)
    ticks = {}
    for k, (images, maps, name) in enumerate(zip(x0, means, names, strict=True)):
        top = k * block
        ticks[top + (1 - _GAP) / 2] = f"{name}\n" + r"$\hat{x}_0$"
        for j, image in enumerate(images):
            _sample(axis, image, j, top)
        if beside and real[k] is not None:
            _sample(axis, real[k], steps + _APART, top)
        if not guided:
            continue
        ticks[top + 1 + (1 - _GAP) / 2] = r"$\nabla S$"
        there = np.isfinite(maps).all(axis=(1, 2))
        bound = np.abs(maps[there]).max(initial=0)
        for j in np.flatnonzero(there):
            _tile(axis, maps[j], j, top + 1, vmin=-(bound or 1), vmax=bound or 1, cmap="RdBu_r")
            axis.add_patch(Rectangle((j, top + 1), 1 - _GAP, 1 - _GAP, fill=False, ec="0.8", lw=0.4))
        if there.any():
            text = f"±{bound:.2g}" if 0.01 <= bound < 100 else f"±{bound:.0e}".replace("e-0", "e−").replace("e+0", "e")
            axis.text(steps, top + 1.47, text, fontsize=6, ha="left", va="center")
    _finish(axis, steps + beside * (1 + _APART), samples * block - 0.15, h / w)
    axis.set_yticks([*ticks], [*ticks.values()])
    places, labels = [*_centers(steps)], [f"{value:.0f}" for value in t]
    if beside:
        places, labels = [*places, places[-1] + 1 + _APART], [*labels, "real"]
    axis.set_xticks(places, labels)
    axis.set_xlabel("diffusion step $t$  (noise → image)")
    return save(figure, path)
