"""Pictures that a page carries in itself."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from calib_guidance.plots import Series, curves, guidance_schedule, reliability, sample_grid, side_by_side, strips
from calib_guidance.report.runs import Run, read_arrays

LARGEST = 160  # pixels of a sample that is shown by itself; larger ones are reduced


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        uri: a PNG as ``data:`` address.
        width, height: in its own pixels.
        alt: what it shows, for those who do not see it.
        caption: below it.
    """

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


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """While inside, plots are kept in a folder, as PNG and PDF; with None only the page has them."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def _drawn(
    name: str, alt: str, caption: str, draw: Callable[..., list[Path]], *arguments: Any, **options: Any
) -> Picture:
    """What one of the functions of calib_guidance.plots draws, given a path for the place of ``path``."""
    name = re.sub(r"[^\w.-]+", "_", name)
    with contextlib.ExitStack() as stack:
        folder = _FOLDER.get() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = draw(*(folder / name if each is _PATH else each for each in arguments), **options)
        (png,) = (path for path in paths if path.suffix == ".png")
        return _picture(png.read_bytes(), alt, caption)


_PATH = object()
_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


def _plain(name: str) -> str:
    """A name in which matplotlib sees no formula."""
    return name.replace("$", r"\$")


def _range(series: Series) -> str:
    """In words, what a line does."""
    values = np.array([math.nan if value is None else value for value in series.mean], np.float64)
    there = np.flatnonzero(np.isfinite(values))
    if not len(there):
        return f"{series.name} was not measured"
    order = there[np.argsort(np.asarray(series.t, np.float64)[there])]
    first, last = order[-1], order[0]
    return (
        f"{series.name} from {values[first]:.3g} at t = {series.t[first]:g} to {values[last]:.3g} at t = {series.t[last]:g}, "
        f"between {values[there].min():.3g} and {values[there].max():.3g}"
    )


def _curves(file: str, series: Sequence[Series], name: str, label: str, caption: str, **options: Any) -> Picture:
    alt = f"{name} over the diffusion step t: {'; '.join(map(_range, series))}."
    plain = [each._replace(name=_plain(each.name)) for each in series]
    return _drawn(file, alt, caption, curves, plain, _PATH, label, **options)


def ece_over_t(runs: Sequence[Run]) -> Picture | None:
    """ECE_t of the guiding classifier of all runs that measured it."""
    found = [(run, run.metrics["ece_t"]) for run in runs if run.metrics.get("ece_t")]
    series = [Series(run.name, each["t"], each["ece"], each.get("std")) for run, each in found]
    caption = "Calibration error of the guiding classifier on what it was shown at each step, and its mean over steps."
    if any(each.get("std") for _, each in found):
        caption += " The band is one standard deviation over samples."
    return _curves("ece_t", series, "ECE_t", r"ECE$_t$ of the classifier", caption, averages=True) if series else None


def gradient_norm_over_t(runs: Sequence[Run]) -> Picture | None:
    """‖∇S‖ of all runs that measured it."""
    found = [(run, run.metrics["gradient_norm_t"]) for run in runs if run.metrics.get("gradient_norm_t")]
    series = [Series(run.name, each["t"], each["mean"], each.get("std")) for run, each in found]
    caption = "Norm of the gradient that guides, mean over samples; the band is one standard deviation of samples."
    return _curves("gradient_norm", series, "Gradient norm", r"$\|\nabla S\|$", caption) if series else None


def reliability_by_level(run: Run) -> Picture | None:
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
    return _drawn(
        f"reliability_{run.name}", alt, caption, reliability, bins, [_plain(level) for level in found["levels"]], _PATH
    )


def trajectory_strips(run: Run) -> Picture | None:
    """x̂0 and the classifier's gradient over the steps of a few samples, where they were kept."""
    path = run.path / "trajectory.npz"
    if not path.is_file():
        return None
    kept = read_arrays(path, ("index", "label", "t", "x0", "gradient"))
    alt = (
        f"{run.name}: x̂0 and the classifier's gradient at {len(kept['t'])} steps from t = {max(kept['t']):g} to "
        f"{min(kept['t']):g}, of samples {', '.join(map(str, kept['index'].tolist()))} of the classes "
        f"{', '.join(map(str, kept['label'].tolist()))}."
    )
    caption = f"{run.name}: what the denoiser predicts, and below it the gradient that guides it, red up and blue down."
    names = [f"class {label}" for label in kept["label"].tolist()]
    return _drawn(f"trajectory_{run.name}", alt, caption, strips, kept["x0"], kept["gradient"], kept["t"], names, _PATH)


def guidance_schedules(runs: Sequence[Run]) -> list[Picture]:
    """Strength of guidance over the steps, in one plot for all runs of the same steps and unit.

    Of one run with and without the sine factor; of several what each was guided with.
    """
    groups: dict[tuple[str, tuple[float, ...]], dict[str, list[float]]] = {}
    for run in runs:
        if kept := run.metrics.get("guidance_schedule"):
            strengths = list(kept["strength"].items())
            named = {run.name: strengths[-1][1]} if len(runs) > 1 else dict(strengths)
            groups.setdefault((kept["unit"], tuple(kept["t"])), {}).update(named)
    pictures = []
    for (unit, t), strengths in groups.items():
        said = "; ".join(
            _range(Series(name.replace("$\\gamma$", "γ"), t, values)) for name, values in strengths.items()
        )
        of = f" of {', '.join(strengths)}" if len(runs) > 1 else ""
        caption = f"Guidance schedule{of}, the scale included."
        alt = f"Strength of guidance over the diffusion step t: {said}."
        values = {_plain(name): each for name, each in strengths.items()} if len(runs) > 1 else strengths
        name = f"guidance_schedule_{len(pictures) + 1}" if len(groups) > 1 else "guidance_schedule"
        pictures.append(_drawn(name, alt, caption, guidance_schedule, t, values, _PATH, unit))
    return pictures


def grid(run: Run, rows: int = 10, columns: int = 10) -> Picture | None:
    """The first samples by index, a class a row. Only what is drawn is decoded."""
    labels, index = run.columns["label"], run.columns["index"]
    _, first = np.unique(labels, return_index=True)
    chosen = labels[np.sort(first)][:rows]
    images = run.images([i for label in chosen for i in index[labels == label][:columns].tolist()])
    if not images:
        return None
    known = dict(zip(index.tolist(), labels.tolist(), strict=True))
    batch = {"label": np.array([known[i] for i in images]), "image": list(images.values())}
    shown = sorted(set(batch["label"].tolist()))
    alt = f"{run.name}: the first samples of the classes {', '.join(map(str, shown))}, a row each."
    caption = f"{run.name}: the first samples by index of each class, not chosen."
    return _drawn(f"samples_{run.name}", alt, caption, sample_grid, [batch], _PATH, rows, columns)


def same_noise(columns: dict[str, dict[str, Any]]) -> Picture:
    """A row for each run, a column for each sample.

    Args:
        columns: by run, ``index``, ``label``, ``seed`` ``(N,)`` and ``image`` ``(N, C, H, W)`` of the same samples.
    """
    first = next(iter(columns.values()))
    alt = (
        f"Samples {', '.join(map(str, first['index'].tolist()))} of the classes {', '.join(map(str, first['label'].tolist()))}, "
        f"from the same noise, a row for each of {', '.join(columns)}."
    )
    caption = "The first sample of each class, from the same noise in a column: a row for each run."
    named = {_plain(name): each for name, each in columns.items()}
    return _drawn("side_by_side", alt, caption, side_by_side, named, _PATH, first["index"].tolist())
