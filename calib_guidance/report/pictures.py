"""Pictures that a page carries in itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from calib_guidance.plots import Series, curves, guidance_schedule, reliability, sample_grid, side_by_side, strips
from calib_guidance.plots.curves import numbers
from calib_guidance.report.runs import Run, read_arrays

LARGEST = 160  # pixels of a sample that is shown by itself; larger ones are reduced


class Picture(NamedTuple):
    """A picture of a page: a PNG as ``data:`` address, its size in pixels, what it shows, and what is said below it."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str = ""


def _picture(png: bytes, alt: str, caption: str = "") -> Picture:
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
    return Picture(f"data:image/png;base64,{base64.b64encode(png).decode()}", width, height, alt, caption)


def sample(image: np.ndarray, alt: str) -> Picture:
    """One sample, uint8 ``(C, H, W)`` grey or RGB."""
    pixels = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    pixels.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG", optimize=True)
    return _picture(buffer.getvalue(), alt)


def _drawn(folder: Path, name: str, alt: str, caption: str, draw: Callable[..., list[Path]]) -> Picture:
    """What one of the functions of calib_guidance.plots draws, given its ``path``."""
    png, _ = draw(path=folder / re.sub(r"[^\w.-]+", "_", name))
    return _picture(png.read_bytes(), alt, caption)


def _plain(name: str) -> str:
    """A name in which matplotlib sees no formula."""
    return name.replace("$", r"\$")


def _range(series: Series) -> str:
    """In words, what a line does."""
    values = numbers(series.mean)
    there = np.flatnonzero(np.isfinite(values))
    if not len(there):
        return f"{series.name} was not measured"
    order = there[np.argsort(np.asarray(series.t, np.float64)[there])]
    first, last = order[-1], order[0]
    return (
        f"{series.name} from {values[first]:.3g} at t = {series.t[first]:g} to {values[last]:.3g} at t = {series.t[last]:g}, "
        f"between {values[there].min():.3g} and {values[there].max():.3g}"
    )


def _curves(
    folder: Path, file: str, series: Sequence[Series], name: str, label: str, caption: str, **options: Any
) -> Picture | None:
    if not series:
        return None
    alt = f"{name} over the diffusion step t: {'; '.join(map(_range, series))}."
    plain = [each._replace(name=_plain(each.name)) for each in series]
    return _drawn(folder, file, alt, caption, partial(curves, plain, label=label, **options))


def ece_over_t(runs: Sequence[Run], folder: Path) -> Picture | None:
    """ECE_t of the guiding classifier of all runs that measured it."""
    found = [(run.name, run.metrics["ece_t"]) for run in runs if run.metrics.get("ece_t")]
    series = [Series(name, each["t"], each["ece"], each.get("std")) for name, each in found]
    caption = "Calibration error of the guiding classifier on what it was shown at each step, and its mean over steps."
    if any(each.std for each in series):
        caption += " The band is one standard deviation over samples."
    return _curves(folder, "ece_t", series, "ECE_t", r"ECE$_t$ of the classifier", caption, averages=True)


def gradient_norm_over_t(runs: Sequence[Run], folder: Path) -> Picture | None:
    """‖∇S‖ of all runs that measured it."""
    found = [(run.name, run.metrics["gradient_norm_t"]) for run in runs if run.metrics.get("gradient_norm_t")]
    series = [Series(name, each["t"], each["mean"], each.get("std")) for name, each in found]
    caption = "Norm of the gradient that guides, mean over samples; the band is one standard deviation of samples."
    return _curves(folder, "gradient_norm", series, "Gradient norm", r"$\|\nabla S\|$", caption)


def guidance_schedules(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Strength of guidance over the steps, in one plot for all runs of the same steps and unit.

    Of one run with and without the sine factor; of several what each was guided with.
    """
    several = len(runs) > 1
    groups: dict[tuple[str, tuple[float, ...]], dict[str, list[float]]] = {}
    for run in runs:
        if kept := run.metrics.get("guidance_schedule"):
            strengths = dict(kept["strength"])
            named = {run.name: list(strengths.values())[-1]} if several else strengths
            groups.setdefault((kept["unit"], tuple(kept["t"])), {}).update(named)
    pictures = []
    for (unit, t), strengths in groups.items():
        lines = [_range(Series(name.replace("$\\gamma$", "γ"), t, values)) for name, values in strengths.items()]
        alt = f"Strength of guidance over the diffusion step t: {'; '.join(lines)}."
        of = f" of {', '.join(strengths)}" if several else ""
        caption = f"Guidance schedule{of}, the scale included."
        values = {_plain(name): each for name, each in strengths.items()} if several else strengths
        name = f"guidance_schedule_{len(pictures) + 1}" if len(groups) > 1 else "guidance_schedule"
        pictures.append(_drawn(folder, name, alt, caption, partial(guidance_schedule, t, values, unit=unit)))
    return pictures


def reliability_by_level(run: Run, folder: Path) -> Picture | None:
    """Reliability diagrams of the guiding classifier by noise level."""
    found = run.metrics.get("reliability")
    if not found:
        return None
    bins = np.asarray(found["bins"], np.float64)
    count, confidence, correct = np.moveaxis(bins, -1, 0).sum(-1)
    said = [
        f"{level}: mean confidence {c / n:.3f}, accuracy {k / n:.3f}"
        for level, n, c, k in zip(found["levels"], count, confidence, correct, strict=True)
        if n
    ]
    alt = f"Reliability diagrams of {run.name} by noise level. {'; '.join(said)}."
    caption = f"{run.name}: accuracy over confidence of the guiding classifier, by noise level."
    draw = partial(reliability, bins, [_plain(level) for level in found["levels"]])
    return _drawn(folder, f"reliability_{run.name}", alt, caption, draw)


def trajectory_strips(run: Run, folder: Path) -> Picture | None:
    """x̂0 and the classifier's gradient over the steps of a few samples, where they were kept."""
    path = run.path / "trajectory.npz"
    if not path.is_file():
        return None
    kept = read_arrays(path, ("index", "label", "t", "x0", "gradient"))
    t, labels = kept["t"], kept["label"].tolist()
    alt = (
        f"{run.name}: x̂0 and the classifier's gradient at {len(t)} steps from t = {max(t):g} to {min(t):g}, of samples "
        f"{', '.join(map(str, kept['index'].tolist()))} of the classes {', '.join(map(str, labels))}."
    )
    caption = f"{run.name}: what the denoiser predicts, and below it the gradient that guides it, red up and blue down."
    draw = partial(strips, kept["x0"], kept["gradient"], t, [f"class {label}" for label in labels])
    return _drawn(folder, f"trajectory_{run.name}", alt, caption, draw)


def grid(run: Run, folder: Path, rows: int = 10, columns: int = 10) -> Picture | None:
    """The first samples by index, a class a row. Only what is drawn is decoded."""
    labels, index = run.columns["label"], run.columns["index"]
    _, first = np.unique(labels, return_index=True)
    chosen = labels[np.sort(first)][:rows]
    images = run.images([i for label in chosen for i in index[labels == label][:columns].tolist()])
    if not images:
        return None
    batch = {"label": np.array([run.requests[i][1] for i in images]), "image": list(images.values())}
    shown = ", ".join(map(str, np.unique(batch["label"])))
    alt = f"{run.name}: the first samples of the classes {shown}, a row each."
    caption = f"{run.name}: the first samples by index of each class, not chosen."
    return _drawn(
        folder, f"samples_{run.name}", alt, caption, partial(sample_grid, [batch], rows=rows, columns=columns)
    )


def same_noise(columns: dict[str, dict[str, Any]], folder: Path) -> Picture:
    """A row for each run, a column for each sample.

    Args:
        columns: by run, ``index``, ``label``, ``seed`` ``(N,)`` and ``image`` ``(N, C, H, W)`` of the same samples.
        folder: to draw in.
    """
    first = next(iter(columns.values()))
    alt = (
        f"Samples {', '.join(map(str, first['index'].tolist()))} of the classes {', '.join(map(str, first['label'].tolist()))}, "
        f"from the same noise, a row for each of {', '.join(columns)}."
    )
    caption = "The first sample of each class, from the same noise in a column: a row for each run."
    named = {_plain(name): each for name, each in columns.items()}
    draw = partial(side_by_side, named, indices=first["index"].tolist())
    return _drawn(folder, "side_by_side", alt, caption, draw)
