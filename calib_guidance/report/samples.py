"""Single samples of a page: the evaluation classifier's best and worst, and what runs make of the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calib_guidance.report.pictures import Picture, same_noise, sample
from calib_guidance.report.runs import Run

_EXTREMES = 10  # of the best and of the worst
_CLASSES = 10  # samples side by side
_LOOKED_AT = 256  # samples among which the most different are chosen, to read only a part of long runs
_MOST_DIFFERENT = 8


class Classified(NamedTuple):
    """A sample with what the evaluation classifier says of it.

    Attributes:
        picture: of it.
        index, label: of the sample.
        predicted: class that the evaluation classifier sees; None where there is none.
        confidence: the evaluation classifier's probability of ``label``; None where there is none.
    """

    picture: Picture
    index: int
    label: int
    predicted: int | None = None
    confidence: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether the evaluation classifier sees another class."""
        return self.predicted is not None and self.predicted != self.label


class Verdict(NamedTuple):
    """What an evaluation classifier says of a run: the samples that it is most and least certain of, and how many there are."""

    run: str
    best: list[Classified]
    worst: list[Classified]
    num_classified: int
    num_wrong: int


class Different(NamedTuple):
    """What runs make of one request.

    Attributes:
        index, label, seed: of the request.
        samples: of each run.
        distances: of each run from the first, root mean square over pixels in gray levels; 0 for the first.
    """

    index: int
    label: int
    seed: int
    samples: list[Classified]
    distances: list[float]


class SideBySide(NamedTuple):
    """Runs from the same noise.

    Attributes:
        picture: the first sample of each class; None where nothing can be shown.
        different: the samples that differ most from the first run's, of those that were looked at.
        runs: that are compared.
        num_shared: samples of the same index, seed and label in all of them.
        num_looked_at: of those, among which ``different`` were chosen.
        remarks: why something is not compared.
    """

    picture: Picture | None
    different: list[Different]
    runs: list[str]
    num_shared: int
    num_looked_at: int
    remarks: list[str]


def _verdicts(run: Run) -> dict[int, tuple[int, float]]:
    """What the evaluation classifier says of each sample that it has classified."""
    if run.predictions is None:
        return {}
    columns = (run.predictions[key].tolist() for key in ("index", "predicted", "confidence"))
    return {index: (predicted, confidence) for index, predicted, confidence in zip(*columns, strict=True)}


def _classified(run: Run, image: np.ndarray, index: int, label: int, verdict: tuple[int, float] | None) -> Classified:
    said = (
        ""
        if verdict is None
        else f"; the evaluation classifier sees class {verdict[0]}, confidence {verdict[1]:.2f} in class {label}"
    )
    return Classified(
        sample(image, f"{run.name}: sample {index} of class {label}{said}"), index, label, *(verdict or ())
    )


def classified_samples(run: Run) -> Verdict | None:
    """Best and worst samples of a run by the evaluation classifier's confidence in their class; None without predictions.

    Where there are few samples none is among both.
    """
    if run.predictions is None or not len(run.predictions["index"]):
        return None
    predictions, verdicts = run.predictions, _verdicts(run)
    order = np.lexsort((predictions["index"], predictions["confidence"]))
    count = min(_EXTREMES, (len(order) + 1) // 2)
    chosen = {"worst": order[:count], "best": order[::-1][: min(count, len(order) - count)]}
    images = run.images(predictions["index"][np.concatenate(list(chosen.values()))].tolist())
    found = {
        name: [
            _classified(run, images[index], index, label, verdicts[index])
            for index, label in zip(
                predictions["index"][rows].tolist(), predictions["label"][rows].tolist(), strict=True
            )
            if index in images
        ]
        for name, rows in chosen.items()
    }
    wrong = int((predictions["predicted"] != predictions["label"]).sum())
    return Verdict(run.name, found["best"], found["worst"], len(order), wrong)


def _requests(run: Run) -> dict[int, tuple[int, int]]:
    """Seed and label by index."""
    index, seed, label = (run.columns[name].tolist() for name in ("index", "seed", "label"))
    return dict(zip(index, zip(seed, label, strict=True), strict=True))


def _seeds(run: Run) -> str:
    return f"{', '.join(map(str, run.seeds[:5]))}{' …' if len(run.seeds) > 5 else ''}"


def _shared(runs: Sequence[Run]) -> tuple[list[Run], list[int], list[str]]:
    """Runs with samples of the same index, seed and label as the first, those indices, and remarks on the other runs."""
    first, *others = runs
    shared, compared, remarks = _requests(first), [first], []
    if not shared:
        return compared, [], [f"{first.name}, with which the others are compared, has no samples yet."]
    for run in others:
        requests = _requests(run)
        both = {index for index, request in shared.items() if requests.get(index) == request}
        if both:
            shared = {index: request for index, request in shared.items() if index in both}
            compared.append(run)
        elif not requests:
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
    return compared, list(shared), remarks


def _first_of_each_class(labels: Mapping[int, int]) -> list[int]:
    chosen: dict[int, int] = {}
    for index, label in labels.items():
        if label not in chosen and len(chosen) < _CLASSES:
            chosen[label] = index
    return sorted(chosen.values(), key=lambda index: labels[index])


def side_by_side(runs: Sequence[Run]) -> SideBySide:
    """What runs make of the same index, seed and label, the first run being what the others are compared with."""
    compared, shared, remarks = _shared(runs)
    names = [run.name for run in compared]
    nothing = SideBySide(None, [], names, 0, 0, remarks)
    if len(compared) < 2:
        return nothing
    requests = {index: _requests(compared[0])[index] for index in sorted(shared)}
    labels = {index: label for index, (_, label) in requests.items()}
    chosen, looked_at = _first_of_each_class(labels), list(requests)[:_LOOKED_AT]
    images = {run.name: run.images({*chosen, *looked_at}) for run in compared}
    # A damaged shard may be found only when it is read.
    there = set.intersection(*(set(found) for found in images.values()))
    chosen, looked_at = [[i for i in wanted if i in there] for wanted in (chosen, looked_at)]
    if not there:
        return nothing
    shapes = {name: next(iter(found.values())).shape for name, found in images.items()}
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
        remarks.append(f"The runs have images of other sizes ({sizes}): they are not set side by side.")
        return nothing
    columns: dict[str, dict[str, Any]] = {
        name: {
            "index": np.array(chosen),
            "label": np.array([labels[i] for i in chosen]),
            "seed": np.array([requests[i][0] for i in chosen]),
            "image": np.stack([found[i] for i in chosen]),
        }
        for name, found in images.items()
    }
    verdicts = [_verdicts(run) for run in compared]
    base = images[names[0]]

    def distances(index: int) -> list[float]:
        differences = (images[name][index].astype(np.float64) - base[index] for name in names)
        return [float(np.sqrt(np.square(difference).mean())) for difference in differences]

    apart = {index: distances(index) for index in looked_at}
    most = sorted(looked_at, key=lambda index: (-max(apart[index]), index))[:_MOST_DIFFERENT]
    different = [
        Different(
            index,
            labels[index],
            requests[index][0],
            [
                _classified(run, images[run.name][index], index, labels[index], said.get(index))
                for run, said in zip(compared, verdicts, strict=True)
            ],
            apart[index],
        )
        for index in most
        if max(apart[index]) > 0
    ]
    return SideBySide(same_noise(columns), different, names, len(shared), len(looked_at), remarks)
