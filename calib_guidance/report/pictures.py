"""Pictures that a page carries in itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from calib_guidance.plots import Series, curves, guidance_schedule, reliability, sample_grid, side_by_side, strips
from calib_guidance.report.runs import Run, read_arrays

LARGEST = 160  # pixels of a sample that is shown by itself; larger ones are reduced


class Picture(NamedTuple):
    """A PNG as ``data:`` address, its size in pixels, what it shows, and what is said below it."""

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
    """One sample, uint8 ``(C, H, W)`` gray or RGB."""
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


def _ends(series: Series) -> str:
    """In words, where a line begins and ends."""
    there = sorted((t, value) for t, value in zip(series.t, series.mean, strict=True) if np.isfinite(value))
    (end, last), (begin, first) = there[0], there[-1]
    return f"{series.name} from {first:.3g} at t = {begin:g} to {last:.3g} at t = {end:g}"


def _numbers(values: Sequence[float | None], t: Sequence[float]) -> list[float]:
    """Values at each t, None as NaN; ValueError where they are none."""
    if (found := np.array(values, np.float64)).shape != np.shape(t) or found.ndim != 1:
        raise ValueError(f"{found.shape} values at {np.shape(t)} steps")
    return found.tolist()


def _series(run: Run, key: str, values: str) -> Series | None:
    """A line of a run; None where it was not measured."""
    if not (kept := run.metrics.get(key)):
        return None
    t, std = kept["t"], kept.get("std")
    return Series(run.name, _numbers(t, t), _numbers(kept[values], t), None if std is None else _numbers(std, t))


# Of each curve over the steps: its name, key in metrics.json, key of its values, label of the axis, and caption.
_CURVES = (
    (
        "ECE_t",
        "ece_t",
        "ece",
        r"ECE$_t$ of the classifier",
        "Calibration error of the guiding classifier on what it was shown at each step, and its mean over steps; the band is one "
        "standard deviation over samples.",
    ),
    (
        "The gradient norm",
        "gradient_norm_t",
        "mean",
        r"$\|\nabla S\|$",
        "Norm of the gradient that guides, mean over samples; the band is one standard deviation of samples.",
    ),
)


def over_steps(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Curves of all runs in one plot each, and schedules in one for all runs of the same steps and unit."""
    found = []
    for name, key, values, label, caption in _CURVES:
        tried = [run.attempt(name, lambda run=run, args=(key, values): _series(run, *args)) for run in runs]
        if lines := [line for line in tried if line is not None and np.isfinite(line.mean).any()]:
            alt = f"{name} over the diffusion step t: {'; '.join(map(_ends, lines))}."
            plain = [line._replace(name=_plain(line.name)) for line in lines]
            draw = partial(curves, plain, label=label, averages=key == "ece_t")
            found.append(_drawn(folder, key.removesuffix("_t") if key != "ece_t" else key, alt, caption, draw))
    return found + _schedules(runs, folder)


def _schedule(run: Run, several: bool) -> tuple[str, tuple[float, ...], dict[str, list[float]]] | None:
    """Unit, steps and strengths by name: of one run with and without the sine factor; of several what each was guided with."""
    if not (kept := run.metrics.get("guidance_schedule")):
        return None
    strengths = {name: _numbers(values, kept["t"]) for name, values in kept["strength"].items()}
    return kept["unit"], tuple(kept["t"]), {_plain(run.name): list(strengths.values())[-1]} if several else strengths


def _schedules(runs: Sequence[Run], folder: Path) -> list[Picture]:
    groups: dict[tuple[str, tuple[float, ...]], dict[str, list[float]]] = {}
    for run in runs:
        if kept := run.attempt("The guidance schedule", lambda run=run: _schedule(run, len(runs) > 1)):
            groups.setdefault(kept[:2], {}).update(kept[2])
    found = []
    for number, ((unit, t), strengths) in enumerate(groups.items(), 1):
        lines = [_ends(Series(name.replace("$\\gamma$", "γ"), t, values)) for name, values in strengths.items()]
        alt = f"Strength of guidance over the diffusion step t: {'; '.join(lines)}."
        name = f"guidance_schedule_{number}" if len(groups) > 1 else "guidance_schedule"
        caption = "Guidance schedule, the scale included."
        found.append(_drawn(folder, name, alt, caption, partial(guidance_schedule, t, strengths, unit=unit)))
    return found


def reliability_by_level(run: Run, folder: Path) -> Picture | None:
    """Reliability diagrams of the guiding classifier by noise level."""
    if not (found := run.metrics.get("reliability")):
        return None
    caption = f"{run.name}: accuracy over confidence of the guiding classifier, by noise level."
    draw = partial(reliability, np.asarray(found["bins"], np.float64), [_plain(level) for level in found["levels"]])
    return _drawn(folder, f"reliability_{run.name}", f"Reliability diagrams. {caption}", caption, draw)


def trajectory_strips(run: Run, folder: Path) -> Picture | None:
    """x̂0 and the classifier's gradient over the steps of a few samples, where they were kept."""
    path = run.path / "trajectory.npz"
    if not path.is_file():
        return None
    kept = read_arrays(path, ("index", "label", "t", "x0", "gradient"))
    names = ((label, run.class_name(label)) for label in kept["label"].tolist())
    classes = [f"class {name}" if name == str(label) else _plain(name) for label, name in names]
    caption = f"{run.name}: what the denoiser predicts, and below it the gradient that guides it, red up and blue down."
    alt = f"{caption} Samples {', '.join(map(str, kept['index'].tolist()))} at {len(kept['t'])} steps."
    return _drawn(
        folder,
        f"trajectory_{run.name}",
        alt,
        caption,
        partial(strips, kept["x0"], kept["gradient"], kept["t"], classes),
    )


def grids(run: Run, folder: Path, rows: int = 10, columns: int = 10) -> list[Picture]:
    """The first samples of each class by index (only those are decoded), and real images of the same classes."""
    labels, index = run.columns["label"], run.columns["index"]
    _, first = np.unique(labels, return_index=True)
    chosen = labels[np.sort(first)][:rows].tolist()
    images = run.images([i for label in chosen for i in index[labels == label][:columns].tolist()])
    if not images:
        return []
    names = {label: _plain(run.class_name(label)) for label in chosen}
    made = {"label": np.array([run.requests[i][1] for i in images]), "image": list(images.values())}
    classes = ", ".join(run.class_name(label) for label in sorted(set(made["label"].tolist())))
    sets = {"samples": (made, "the first samples by index of each class, not chosen")}
    if run.real is not None and (shown := np.isin(run.real["label"], made["label"])).any():
        real = {name: run.real[name][shown] for name in ("label", "image")}
        sets["real"] = (real, "real images of the same classes, from the reference")
    return [
        _drawn(
            folder,
            f"{name}_{run.name}",
            f"{run.name}: {what}, a row for each of the classes {classes}.",
            f"{run.name}: {what}.",
            partial(sample_grid, [batch], rows=rows, columns=columns, names=names),
        )
        for name, (batch, what) in sets.items()
    ]


def same_noise(images: Mapping[str, np.ndarray], classes: Sequence[str], folder: Path) -> Picture:
    """A row for each run, a column for each sample: ``(N, C, H, W)`` by run, of ``(N,)`` classes."""
    caption = "The first sample of each class, from the same noise in a column: a row for each run."
    alt = f"{caption} Classes {', '.join(classes)}; runs {', '.join(images)}."
    plain = {_plain(name): each for name, each in images.items()}
    return _drawn(folder, "side_by_side", alt, caption, partial(side_by_side, plain, list(map(_plain, classes))))
