"""What was measured of the runs, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from calib_guidance.evaluation.quality import TABLE
from calib_guidance.report.runs import Run
from calib_guidance.report.settings import as_text, flatten

# What says how the figures came about, and curves, which are drawn.
_COUNTS = {
    "num_samples": "samples",
    "num_measured": "samples measured",
    "num_reference": "reference images",
    "num_evaluations": "network evaluations each",
}
_BETTER = {
    "frechet_distance": "lower",
    "frechet_distance_infinite": "lower",
    "spatial_frechet_distance": "lower",
    "kernel_distance": "lower",
    "kernel_distance_mean": "lower",
    "inception_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "classifier_accuracy": "higher",
    "classifier_ece": "lower",
    "clip_score": "higher",
    "integral_ece": "lower",
    "seconds_per_image": "lower",
}
_DRAWN = {"ece_t", "gradient_norm_t", "guidance_schedule", "reliability"}


class Cell(NamedTuple):
    """A figure of a run.

    Attributes:
        value: as it was stored; None where there is none.
        text: the same for people.
        sd: standard deviation, as text; None where it is not known.
        interval: of 95 %, as text; None where it is not known.
        apart: whether that interval lies apart from the first run's.
    """

    value: float | None
    text: str
    sd: str | None = None
    interval: str | None = None
    apart: bool = False


class Row(NamedTuple):
    """A metric, of each run. ``better`` is ``lower``, ``higher`` or empty."""

    name: str
    label: str
    better: str
    cells: list[Cell]


class Figures(NamedTuple):
    """What was measured in one way.

    Attributes:
        rows: a metric each.
        spreads: what the spreads are of, with the metrics that each is said of.
        notes: of the runs, on what the figures are worth.
        by_class: of each run that has them, class by class: run, metrics, and class with figures.
    """

    rows: list[Row]
    spreads: list[str]
    notes: list[str]
    by_class: list[tuple[str, list[str], list[tuple[str, list[Cell]]]]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(name: str) -> tuple[str, str]:
    """Words for a metric, and how it is written."""
    if name in _COUNTS:
        return _COUNTS[name], "{:.0f}"
    return TABLE.get(name, (name.replace("_", " "), "{:.4g}"))


def _cell(name: str, measured: Mapping[str, Any]) -> tuple[Cell, Mapping[str, Any]]:
    """A figure, and its spread."""
    value = measured.get(name)
    if not _is_number(value):
        return Cell(None, "–"), {}
    form = _label(name)[1]
    if value and not float(form.format(value)):  # too small for the digits that the metric usually has
        form = "{:.3g}"
    spread = measured.get("spread", {}).get(name) or {}
    sd = form.format(spread["sd"]) if _is_number(spread.get("sd")) else None
    ends = [spread.get("low"), spread.get("high")]
    interval = " to ".join(map(form.format, ends)) if all(map(_is_number, ends)) else None
    return Cell(value, form.format(value), sd, interval), spread


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ends = [spread.get(end) for spread in (one, other) for end in ("low", "high")]
    return all(map(_is_number, ends)) and (ends[1] < ends[2] or ends[3] < ends[0])


def _row(name: str, measured: Sequence[Mapping[str, Any]]) -> Row:
    cells, spreads = zip(*(_cell(name, each) for each in measured), strict=True)
    cells = [
        cell._replace(apart=_apart(spread, spreads[0])) if number else cell
        for number, (cell, spread) in enumerate(zip(cells, spreads, strict=True))
    ]
    return Row(name, _label(name)[0], _BETTER.get(name, ""), cells)


def _notes(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each once, with the names of the runs that it is said of where that is not all of them."""
    of: dict[str, list[str]] = {}
    for run, each in zip(runs, measured, strict=True):
        said = [*each.get("notes", []), *(v for k, v in each.items() if k.endswith("_note") and isinstance(v, str))]
        for note in dict.fromkeys(map(str, said)):
            of.setdefault(note, []).append(run.name)
    return [note if len(names) == len(runs) else f"{', '.join(names)}: {note}" for note, names in of.items()]


def _incomparable(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why figures of the runs cannot be compared, if so. What a run does not say counts as the same."""
    notes = []
    for what, facts in (("features", _features), ("numbers of samples", _counts), ("references", _references)):
        said = {run.name: facts(each) for run, each in zip(runs, measured, strict=True) if each}
        if any(len(set(values) - {None}) > 1 for values in zip(*said.values(), strict=True)):
            listed = "; ".join(f"{name}: {', '.join(str(v) for v in values if v)}" for name, values in said.items())
            notes.append(f"The {what} differ, so that the figures do not compare: {listed}.")
    return notes


def _sha256(provenance: Mapping[str, Any], key: str = "sha256") -> str | None:
    return f"{key} {provenance[key][:12]}" if provenance.get(key) else None


def _features(measured: Mapping[str, Any]) -> tuple[str | None, ...]:
    provenance = measured.get("provenance", {}).get("features", {})
    return measured.get("features"), _sha256(provenance, "weights_sha256")


def _counts(measured: Mapping[str, Any]) -> tuple[int | None, ...]:
    return (measured.get("num_measured", measured.get("num_samples")),)


def _references(measured: Mapping[str, Any]) -> tuple[str | None, ...]:
    provenance = measured.get("provenance", {}).get("reference", {})
    count = measured.get("num_reference")
    images = None if count is None else f"{count} images"
    return images, _sha256(provenance), _sha256(provenance.get("images", {}))


def _spreads(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    of: dict[str, list[str]] = {}
    for each in measured:
        for name, spread in each.get("spread", {}).items():
            if isinstance(spread, Mapping) and spread.get("of"):
                labels = of.setdefault(str(spread["of"]), [])
                if (label := _label(name)[0]) not in labels:
                    labels.append(label)
    return [f"{', '.join(labels)}: {source}" for source, labels in of.items()]


def figures(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> Figures | None:
    """The table of what was measured in one way.

    Args:
        runs: all of the page.
        measured: of each, the content of its metrics.json or evaluation/metrics.json; empty where there is none.

    Returns:
        The table, None where no run has one.
    """
    if not any(measured):
        return None
    found = dict.fromkeys(name for each in measured for name, value in each.items() if _is_number(value))
    names = [name for name in TABLE if name in found]
    names += [name for name in found if name not in TABLE and name not in _COUNTS]
    if all(each.get("num_measured") in (None, each.get("num_samples")) for each in measured):
        found.pop("num_measured", None)  # all of them, as one expects
    names += [name for name in _COUNTS if name in found]
    by_class = []
    for run, each in zip(runs, measured, strict=True):
        if isinstance(each.get("by_class"), Mapping) and each["by_class"]:
            by_class.append((run.name, *_by_class(each["by_class"])))
    notes = _incomparable(runs, measured) + _notes(runs, measured)
    return Figures([_row(name, measured) for name in names], _spreads(measured), notes, by_class)


def _by_class(content: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Metrics, and of each class the figures, from ``{class: {metric: value, "spread": {metric: sd}}}``."""
    found = dict.fromkeys(
        name for measured in content.values() for name, value in measured.items() if _is_number(value)
    )
    names = [name for name in found if name in TABLE] + [name for name in found if name in _COUNTS]
    rows = []
    for label in sorted(content, key=lambda label: (len(label), label)):
        measured = content[label]
        spreads = {name: {"sd": sd} for name, sd in measured.get("spread", {}).items()}
        rows.append((label, [_cell(name, measured | {"spread": spreads})[0] for name in names]))
    return [_label(name)[0] for name in names], rows


def provenance(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What the figures and samples of each run came from: key, and the value of each run."""
    said = []
    for run in runs:
        told: dict[str, Any] = {}
        for prefix, measured in (("metrics", run.metrics), ("evaluation", run.evaluation)):
            rest = {
                key: value
                for key, value in measured.items()
                if key not in _DRAWN | {"spread", "notes", "by_class", "failed"}
                and not key.endswith("_note")
                and value is not None
                and not _is_number(value)
            }
            told |= dict(flatten(rest, prefix))
        told |= {
            "run.fingerprint": run.about["fingerprint"],
            "run.created": run.about.get("created"),
            **dict(flatten(run.about.get("versions", {}), "run.versions")),
            **{key: value for key, value in run.identity.items() if key.startswith("weights of")},
            "run.uint8_rule": run.identity.get("uint8_rule"),
            "run.made_by": ", ".join(sorted({f"{w['device']} on {w['host']}" for w in run.status["workers"]})) or None,
        }
        said.append(told)
    keys = dict.fromkeys(key for told in said for key, value in told.items() if value not in (None, []))
    return [(key, ["–" if told.get(key) in (None, []) else as_text(told[key]) for told in said]) for key in keys]
