"""Single samples of a page: the evaluation classifier's best and worst, and what runs make of the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib_guidance.report.pictures import same_noise, sample
from calib_guidance.report.runs import Run

_EXTREMES = 10  # of the best and of the worst
_CLASSES = 10  # samples side by side
_LOOKED_AT = 256  # samples among which the most different are chosen, to read only a part of long runs
_MOST_DIFFERENT = 8


def _classified(run: Run, images: dict[int, np.ndarray], index: int, label: int) -> dict[str, Any]:
    """A sample with what the evaluation classifier says of it: ``predicted`` and ``confidence``, None where it says nothing."""
    predicted, confidence = run.verdicts.get(index, (None, None))
    name = run.class_name(label)
    alt = f"{run.name}: sample {index} of class {name}"
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
    if run.predictions is None or not len(run.predictions["index"]):
        return None
    index, label, predicted, confidence = (run.predictions[k] for k in ("index", "label", "predicted", "confidence"))
    order = np.lexsort((index, confidence))
    count = min(_EXTREMES, (len(order) + 1) // 2)
    chosen = {"worst": order[:count], "best": order[::-1][: min(count, len(order) - count)]}
    images = run.images(index[np.concatenate(list(chosen.values()))].tolist())
    found = {
        name: [_classified(run, images, int(index[row]), int(label[row])) for row in rows if int(index[row]) in images]
        for name, rows in chosen.items()
    }
    wrong = int((predicted != label).sum())
    return {"run": run.name, **found, "num_classified": len(order), "num_wrong": wrong}


def _seeds(run: Run) -> str:
    return f"{', '.join(map(str, run.seeds[:5]))}{' …' if len(run.seeds) > 5 else ''}"


def _shared(runs: Sequence[Run]) -> tuple[list[Run], dict[int, tuple[int, int]], list[str]]:
    """Runs that share samples with the first, the (seed, label) of those by index, and remarks on the other runs."""
    first, *others = runs
    shared, compared, remarks = first.requests, [first], []
    if not shared:
        return compared, {}, [f"{first.name}, with which the others are compared, has no samples yet."]
    for run in others:
        both = dict(sorted(shared.items() & run.requests.items()))
        if both:
            shared = both
            compared.append(run)
        elif not run.requests:
            remarks.append(f"{run.name} has no samples yet.")
        elif set(run.seeds) != set(first.seeds):
            remarks.append(
                f"{run.name} has other seeds ({_seeds(run)}) than {first.name} ({_seeds(first)}): no sample of it is "
                "from the same noise, and it is not set side by side. Sample both with the same data.init_args.seed."
            )
        else:
            remarks.append(
                f"{run.name} has no sample of the same index, seed and label as {first.name}: it is not set side by side. Sample "
                "both with the same data.init_args.labels."
            )
    return compared, shared, remarks


def _first_of_each_class(requests: dict[int, tuple[int, int]]) -> list[int]:
    chosen: dict[int, int] = {}
    for index, (_, label) in requests.items():
        if label not in chosen and len(chosen) < _CLASSES:
            chosen[label] = index
    return [index for _, index in sorted(chosen.items())]


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
    chosen, looked_at = _first_of_each_class(requests), list(requests)[:_LOOKED_AT]
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
    columns = {name: np.stack([found[i] for i in chosen]) for name, found in zip(names, images, strict=True)}
    classes = [runs[0].class_name(requests[i][1]) for i in chosen]

    def distances(index: int) -> list[float]:
        differences = (found[index].astype(np.float64) - images[0][index] for found in images)
        return [float(np.sqrt(np.square(difference).mean())) for difference in differences]

    apart = {index: distances(index) for index in looked_at}
    for index in sorted(looked_at, key=lambda index: (-max(apart[index]), index))[:_MOST_DIFFERENT]:
        if max(apart[index]) > 0:
            seed, label = requests[index]
            pairs = zip(compared, images, strict=True)
            shown = [_classified(run, found, index, label) for run, found in pairs]
            different = {
                "index": index,
                "label": runs[0].class_name(label),
                "seed": seed,
                "samples": shown,
                "distances": apart[index],
            }
            content["different"].append(different)
    return content | {"picture": same_noise(columns, classes, folder), "num_looked_at": len(looked_at)}
