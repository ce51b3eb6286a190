"""What was measured of the runs, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib_guidance.evaluation.metrics import specs_of
from calib_guidance.evaluation.quality import uncertainty_sources
from calib_guidance.evaluation.spec import MetricSpec
from calib_guidance.report.runs import Run
from calib_guidance.report.settings import as_text
from calib_guidance.runs.store import leaves

_COUNTS = {
    "num_samples": "samples",
    "num_measured": "samples measured",
    "num_reference": "reference images",
    "nfe": "NFE",
}
_DRAWN = {"ece_t", "gradient_norm_t", "guidance_schedule", "reliability"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _specs(*measured: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """How each value is named and written: the metric table, other values by their name, and counts."""
    specs = specs_of(*measured)
    found = dict.fromkeys(name for each in measured for name, value in each.items() if _is_number(value))
    plain = [name for name in found if name not in specs and name not in _COUNTS]
    specs |= {name: MetricSpec(name, name.replace("_", " "), "{:.4g}") for name in plain}
    return specs | {name: MetricSpec(name, label, "{:.0f}") for name, label in _COUNTS.items()}


def _cell(spec: MetricSpec, measured: Mapping[str, Any]) -> dict[str, Any]:
    """A value as it was stored, None where there is none, and as text, with its standard deviation and 95 % interval."""
    value = measured.get(spec.key)
    cell = {"value": None, "text": "–", "std": None, "interval": None, "ends": None, "apart": False}
    if not _is_number(value):
        return cell
    form = spec.format
    if value and not float(form.format(value)):  # too small for the digits that the metric usually has
        form = "{:.3g}"
    cell |= {"value": value, "text": form.format(value)}
    uncertainty = measured.get("uncertainty", {}).get(spec.key) or {}
    if _is_number(uncertainty.get("std")):
        cell["std"] = form.format(uncertainty["std"])
    ends = [uncertainty.get("low"), uncertainty.get("high")]
    if all(map(_is_number, ends)):
        cell |= {"ends": ends, "interval": " to ".join(map(form.format, ends))}
    return cell


def _row(spec: MetricSpec, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric of each run; ``apart`` are the cells with an interval that does not meet the first run's."""
    cells = [_cell(spec, each) for each in measured]
    if first := cells[0]["ends"]:
        for cell in cells[1:]:
            ends = cell["ends"]
            cell["apart"] = ends is not None and (ends[1] < first[0] or first[1] < ends[0])
    better = {None: "", True: "higher", False: "lower"}[spec.higher_is_better]
    return {"name": spec.key, "label": spec.label, "better": better, "cells": cells}


def _notes(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each once, with the names of the runs that it is said of where that is not all of them."""
    of: dict[str, list[str]] = {}
    for run, each in zip(runs, measured, strict=True):
        said = [*each.get("notes", []), *(v for k, v in each.items() if k.endswith("_note") and isinstance(v, str))]
        for note in dict.fromkeys(map(str, said)):
            of.setdefault(note, []).append(run.name)
    return [note if len(names) == len(runs) else f"{', '.join(names)}: {note}" for note, names in of.items()]


def _incomparable(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why values of the runs cannot be compared. What a run does not say counts as equal."""

    def hashed(provenance: Mapping[str, Any], key: str = "sha256") -> str | None:
        return f"{key} {provenance[key][:12]}" if provenance.get(key) else None

    facts: dict[str, dict[str, list[Any]]] = {"features": {}, "numbers of samples": {}, "references": {}}
    for run, each in zip(runs, measured, strict=True):
        if not each:
            continue
        features, reference = (each.get("provenance", {}).get(name, {}) for name in ("features", "reference"))
        count = each.get("num_reference")
        images = None if count is None else f"{count} images"
        facts["features"][run.name] = [each.get("features"), hashed(features, "weights_sha256")]
        facts["numbers of samples"][run.name] = [each.get("num_measured", each.get("num_samples"))]
        facts["references"][run.name] = [images, hashed(reference), hashed(reference.get("images", {}))]
    notes = []
    for what, said in facts.items():
        if any(len(set(values) - {None}) > 1 for values in zip(*said.values(), strict=True)):
            listed = "; ".join(f"{name}: {', '.join(str(v) for v in values if v)}" for name, values in said.items())
            notes.append(f"The {what} differ, so the values do not compare: {listed}.")
    return notes


def table(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table of what was measured in one way.

    Args:
        runs: all of the page.
        measured: of each, the content of its metrics.json or evaluation/metrics.json; empty where there is none.

    Returns:
        None where no run has one; else ``rows``, a metric each, ``uncertainty``, what the standard deviation of each metric is
        over, ``notes`` on what the values are worth, and ``by_class``: run, labels of metrics, and each class with its cells.
    """
    if not any(measured):
        return None
    found = {name for each in measured for name, value in each.items() if _is_number(value)}
    if all(each.get("num_measured") in (None, each.get("num_samples")) for each in measured):
        found.discard("num_measured")  # all of them, as one expects
    return {
        "rows": [_row(spec, measured) for name, spec in _specs(*measured).items() if name in found],
        "uncertainty": [f"{', '.join(labels)}: {of}" for of, labels in uncertainty_sources(*measured).items()],
        "notes": _incomparable(runs, measured) + _notes(runs, measured),
        "by_class": [
            (run.name, *_by_class(each["by_class"]))
            for run, each in zip(runs, measured, strict=True)
            if isinstance(each.get("by_class"), Mapping) and each["by_class"]
        ],
    }


def _by_class(content: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[dict[str, Any]]]]]:
    """Metrics, and the values of each class, from ``{class: {metric: value, "std": {metric: std}}}``."""
    found = {name for measured in content.values() for name, value in measured.items() if _is_number(value)}
    specs = [spec for name, spec in _specs().items() if name in found]
    rows = []
    for label in sorted(content, key=lambda label: (len(label), label)):
        uncertainty = {name: {"std": std} for name, std in content[label].get("std", {}).items()}
        rows.append((label, [_cell(spec, content[label] | {"uncertainty": uncertainty}) for spec in specs]))
    return [spec.label for spec in specs], rows


def provenance(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What the values and samples of each run came from: key, and the value of each run."""
    said = []
    for run in runs:
        told: dict[str, Any] = {}
        for prefix, measured in (("metrics", run.metrics), ("evaluation", run.evaluation)):
            rest = {
                key: value
                for key, value in measured.items()
                if key not in _DRAWN | {"uncertainty", "notes", "by_class", "failed", "own_metrics"}
                and not key.endswith("_note")
                and value is not None
                and not _is_number(value)
            }
            told |= dict(leaves(rest, prefix))
        told |= {
            "run.fingerprint": run.about["fingerprint"],
            "run.created": run.about.get("created"),
            **dict(leaves(run.about.get("versions", {}), "run.versions")),
            **{key: value for key, value in run.identity.items() if key.startswith("weights of")},
            "run.uint8_rule": run.identity.get("uint8_rule"),
            "run.made_by": ", ".join(sorted({f"{w['device']} on {w['host']}" for w in run.status["workers"]})) or None,
        }
        said.append(told)
    keys = dict.fromkeys(key for told in said for key, value in told.items() if value not in (None, []))
    return [(key, ["–" if told.get(key) in (None, []) else as_text(told[key]) for told in said]) for key in keys]
