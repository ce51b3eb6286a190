"""Pictures that a page carries in itself: plots, the best and worst samples, and what runs make of the same noise."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from calib_guidance import plots
from calib_guidance.plots import Series
from calib_guidance.report.runs import Run, read_arrays

LARGEST = 160  # pixels of a sample that is shown by itself; larger ones are reduced
_EXTREMES = 10  # of the best and of the worst
_CLASSES = 10  # in a grid, with as many samples each, and side by side with one
_LOOKED_AT = 256  # samples among which the most different are chosen, to read only a part of long runs
_MOST_DIFFERENT = 8


class Picture(NamedTuple):
    """A PNG or GIF as ``data:`` address, its size in pixels, what it shows, and what is said below it."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str = ""


def _picture(content: bytes, alt: str, caption: str = "", kind: str = "png") -> Picture:
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height, alt, caption)


def sample(image: np.ndarray, alt: str) -> Picture:
    """One sample, uint8 ``(C, H, W)`` gray or RGB."""
    pixels = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    pixels.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG", optimize=True)
    return _picture(buffer.getvalue(), alt)


def _drawn(
    folder: Path, name: str, alt: str, caption: str, draw: Callable[..., list[Path]], *data: Any, **options: Any
) -> Picture:
    """What one of the functions of calib_guidance.plots draws."""
    drawn = draw(*data, path=folder / re.sub(r"[^\w.-]+", "_", name), **options)[0]
    return _picture(drawn.read_bytes(), alt, caption, drawn.suffix[1:])


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


# Of each curve over the steps: its name, that of its file, key in metrics.json, key of its values, label, and caption.
_CURVES = (
    (
        *("ECE_t", "ece_t", "ece_t", "ece", r"ECE$_t$ of the classifier"),
        "Calibration error of the guiding classifier on what it was shown at each step, and its mean over steps; the band is one "
        "standard deviation over samples.",
    ),
    (
        *("The gradient norm", "gradient_norm", "gradient_norm_t", "mean", r"$\|\nabla S\|$"),
        "Norm of the gradient that guides, mean over samples; the band is one standard deviation of samples.",
    ),
)


def over_steps(runs: Sequence[Run], folder: Path) -> Iterator[Picture]:
    """Curves of all runs in one plot each, and schedules in one for all runs of the same steps and unit."""
    for name, file, key, values, label, caption in _CURVES:
        tried = [run.attempt(name, _series, key, values) for run in runs]
        if lines := [line for line in tried if line is not None and np.isfinite(line.mean).any()]:
            alt = f"{name} over the diffusion step t: {'; '.join(map(_ends, lines))}."
            plain = [line._replace(name=_plain(line.name)) for line in lines]
            yield _drawn(folder, file, alt, caption, plots.curves, plain, label=label, averages=key == "ece_t")
    groups: dict[tuple[str, tuple[float, ...]], dict[str, list[float]]] = {}
    for run in runs:
        if kept := run.attempt("The guidance schedule", _schedule, len(runs) > 1):
            groups.setdefault(kept[:2], {}).update(kept[2])
    for number, ((unit, t), strengths) in enumerate(groups.items(), 1):
        lines = [_ends(Series(name.replace("$\\gamma$", "γ"), t, values)) for name, values in strengths.items()]
        alt = f"Strength of guidance over the diffusion step t: {'; '.join(lines)}."
        name, caption = "guidance_schedule", "Guidance schedule, the scale included."
        name += f"_{number}" if len(groups) > 1 else ""
        yield _drawn(folder, name, alt, caption, plots.guidance_schedule, t, strengths, unit=unit)


def _schedule(run: Run, several: bool) -> tuple[str, tuple[float, ...], dict[str, list[float]]] | None:
    """Unit, steps and strengths by name: of one run with and without the sine factor; of several what each was guided with."""
    if not (kept := run.metrics.get("guidance_schedule")):
        return None
    strengths = {name: _numbers(values, kept["t"]) for name, values in kept["strength"].items()}
    return kept["unit"], tuple(kept["t"]), {_plain(run.name): list(strengths.values())[-1]} if several else strengths


def reliability_by_level(run: Run, folder: Path) -> Picture | None:
    """Reliability diagrams of the guiding classifier by noise level."""
    if not (found := run.metrics.get("reliability")):
        return None
    caption = f"{run.name}: accuracy over confidence of the guiding classifier, by noise level."
    data = np.asarray(found["bins"], np.float64), [_plain(level) for level in found["levels"]]
    alt = f"Reliability diagrams. {caption}"
    return _drawn(folder, f"reliability_{run.name}", alt, caption, plots.reliability, *data)


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
    data = kept["x0"], kept["gradient"], kept["t"], classes
    beside = plots.real_of_classes(kept["label"].tolist(), kept["x0"].shape[2:], run.real)
    if any(image is not None for image in beside):
        caption = f"{caption.removesuffix('.')}; on the right a real image of the class."
    return _drawn(folder, f"trajectory_{run.name}", alt, caption, plots.strips, *data, real=beside)


def animated(run: Run, folder: Path) -> Picture | None:
    """x̂0 of a few samples as a moving picture, where its frames were kept."""
    path = run.path / "trajectory.npz"
    if not path.is_file():
        return None
    try:
        kept = read_arrays(path, ("label", "frames", "frames_t"))
    except ValueError:  # without frames; what is damaged is said of the strips
        return None
    names = [run.class_name(label) for label in kept["label"].tolist()]
    beside = plots.real_of_classes(kept["label"].tolist(), kept["frames"].shape[2:], run.real)
    caption = f"{run.name}: what the denoiser predicts, from noise to image."
    alt = f"{caption} An animation of {len(kept['frames_t'])} steps, of the classes {', '.join(names)}."
    data = kept["frames"], kept["frames_t"], names
    return _drawn(folder, f"animation_{run.name}", alt, caption, plots.animation, *data, real=beside)


def guidance_grid(run: Run, folder: Path) -> Picture | None:
    """One noise under several scores and scales, where it was sampled."""
    path = run.path / "guidance_grid.npz"
    if not path.is_file():
        return None
    kept = read_arrays(path, ("score", "scale", "image", "index", "label"))
    name, scores = run.class_name(int(kept["label"])), [str(score) for score in kept["score"]]
    caption = f"{run.name}: sample {int(kept['index'])}, of class {name}, under each score (rows) and scale (columns)."
    alt = f"{caption} Scores {', '.join(scores)}; scales {', '.join(f'{scale:g}' for scale in kept['scale'])}."
    data = kept["image"], list(map(_plain, scores)), kept["scale"].tolist()
    return _drawn(folder, f"guidance_grid_{run.name}", alt, caption, plots.guidance_grid, *data)


def _by_class(requests: dict[int, tuple[int, int]]) -> dict[int, list[int]]:
    """Indices of the classes that occur first, by class."""
    found: dict[int, list[int]] = {}
    for index, (_, label) in requests.items():
        if label in found or len(found) < _CLASSES:
            found.setdefault(label, []).append(index)
    return found


def grids(run: Run, folder: Path) -> list[Picture]:
    """The first samples of each class by index (only those are decoded), and real images of the same classes."""
    by_class = _by_class(run.requests)
    images = run.images([index for found in by_class.values() for index in found[:_CLASSES]])
    if not images:
        return []
    options = {"rows": _CLASSES, "columns": _CLASSES}
    options["names"] = {label: _plain(run.class_name(label)) for label in by_class}
    made = {"label": np.array([run.requests[i][1] for i in images]), "image": list(images.values())}
    classes = ", ".join(run.class_name(label) for label in sorted(set(made["label"].tolist())))
    sets = {"samples": (made, "the first samples by index of each class, not chosen")}
    if run.real is not None and (shown := np.isin(run.real["label"], made["label"])).any():
        real = {name: run.real[name][shown] for name in ("label", "image")}
        sets["real"] = (real, "real images of the same classes, from the reference")
    found = []
    for name, (batch, what) in sets.items():
        alt = f"{run.name}: {what}, a row for each of the classes {classes}."
        caption = f"{run.name}: {what}."
        found.append(_drawn(folder, f"{name}_{run.name}", alt, caption, plots.sample_grid, [batch], **options))
    return found


def _classified(run: Run, images: dict[int, np.ndarray], index: int) -> dict[str, Any]:
    """A sample with what the evaluation classifier says of it: ``predicted`` and ``confidence``, None where it says nothing."""
    predicted, confidence = run.verdicts.get(index, (None, None))
    label = run.requests[index][1]
    alt = f"{run.name}: sample {index} of class {(name := run.class_name(label))}"
    if predicted is not None:
        alt += f"; the evaluation classifier sees class {run.class_name(predicted)}, confidence {confidence:.2f} in class {name}"
    return {
        "picture": sample(images[index], alt),
        "index": index,
        "label": name,
        "predicted": None if predicted is None else run.class_name(predicted),
        "confidence": confidence,
        "wrong": predicted not in (None, label),
    }


def classified_samples(run: Run) -> dict[str, Any] | None:
    """Best and worst samples of a run by the evaluation classifier's confidence in their class; None without predictions.

    With few samples, no sample is among both.
    """
    if not run.verdicts:
        return None
    order = sorted(run.verdicts, key=lambda index: (run.verdicts[index][1], index))
    count = min(_EXTREMES, (len(order) + 1) // 2)
    chosen = {"worst": order[:count], "best": order[::-1][: min(count, len(order) - count)]}
    images = run.images([*chosen["worst"], *chosen["best"]])
    found = {name: [_classified(run, images, i) for i in indices if i in images] for name, indices in chosen.items()}
    wrong = sum(predicted != run.requests[index][1] for index, (predicted, _) in run.verdicts.items())
    return {"run": run.name, **found, "num_classified": len(order), "num_wrong": wrong}


def _shared(runs: Sequence[Run]) -> tuple[list[Run], dict[int, tuple[int, int]], list[str]]:
    """Runs that share samples with the first, the (seed, label) of those by index, and remarks on the other runs."""
    first, *others = runs
    shared, compared, remarks = first.requests, [first], []
    if not shared:
        return compared, {}, [f"{first.name}, with which the others are compared, has no samples yet."]
    seeds = {run.name: f"{', '.join(map(str, run.seeds[:5]))}{' …' if len(run.seeds) > 5 else ''}" for run in runs}
    for run in others:
        if both := dict(sorted(shared.items() & run.requests.items())):
            shared = both
            compared.append(run)
        elif not run.requests:
            remarks.append(f"{run.name} has no samples yet.")
        elif set(run.seeds) != set(first.seeds):
            remarks.append(
                f"{run.name} has other seeds ({seeds[run.name]}) than {first.name} ({seeds[first.name]}): no sample of it is "
                "from the same noise, and it is not set side by side. Sample both with the same data.init_args.seed."
            )
        else:
            remarks.append(
                f"{run.name} has no sample of the same index, seed and label as {first.name}: it is not set side by side. Sample "
                "both with the same data.init_args.labels."
            )
    return compared, shared, remarks


def side_by_side(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """What runs make of the same index, seed and label, the first run being what the others are compared with.

    Returns:
        ``picture``, the first sample of each class, None where nothing can be shown; ``different``, those of the first
        ``num_looked_at`` samples that differ most from the first run's (``distances``: root mean square over pixels in gray
        levels); ``runs`` that are compared, ``num_shared`` samples, and ``remarks`` on why something is not compared.
    """
    compared, requests, remarks = _shared(runs)
    names = [run.name for run in compared]
    content = {"picture": None, "different": [], "runs": names, "num_shared": len(requests), "remarks": remarks}
    if len(compared) < 2:
        return content
    chosen, looked_at = [found[0] for _, found in sorted(_by_class(requests).items())], list(requests)[:_LOOKED_AT]
    images = [run.images({*chosen, *looked_at}) for run in compared]
    # A damaged shard may be found only when it is read.
    there = set.intersection(*map(set, images))
    chosen, looked_at = [[i for i in wanted if i in there] for wanted in (chosen, looked_at)]
    if not chosen:
        return content
    shapes = [next(iter(found.values())).shape for found in images]
    if len(set(shapes)) > 1:
        sizes = ", ".join(f"{name} {'×'.join(map(str, s))}" for name, s in zip(names, shapes, strict=True))
        remarks.append(f"The runs have images of other sizes ({sizes}): they are not set side by side.")
        return content

    def distances(index: int) -> list[float]:
        differences = (found[index].astype(np.float64) - images[0][index] for found in images)
        return [float(np.sqrt(np.square(difference).mean())) for difference in differences]

    apart = {index: each for index in looked_at if max(each := distances(index)) > 0}
    for index in sorted(apart, key=lambda index: (-max(apart[index]), index))[:_MOST_DIFFERENT]:
        seed, label = requests[index]
        shown = [_classified(run, found, index) for run, found in zip(compared, images, strict=True)]
        about = {"index": index, "label": runs[0].class_name(label), "seed": seed}
        content["different"].append({**about, "samples": shown, "distances": apart[index]})
    rows = {_plain(name): [found[i] for i in chosen] for name, found in zip(names, images, strict=True)}
    classes = [runs[0].class_name(requests[i][1]) for i in chosen]
    caption = "The first sample of each class, from the same noise in a column: a row for each run."
    alt = f"{caption} Classes {', '.join(classes)}; runs {', '.join(names)}."
    drawn = _drawn(folder, "side_by_side", alt, caption, plots.side_by_side, rows, list(map(_plain, classes)))
    return content | {"picture": drawn, "num_looked_at": len(looked_at)}
