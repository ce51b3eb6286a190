"""What runs are made of, where their settings differ, and what was measured of them, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib_guidance.evaluation.metrics import specs_of
from calib_guidance.evaluation.quality import uncertainty_sources
from calib_guidance.evaluation.spec import MetricSpec
from calib_guidance.report.runs import Run
from calib_guidance.runs.identity import leaves

_COUNTS = {
    "num_samples": "samples",
    "num_measured": "samples measured",
    "num_reference": "reference images",
    "nfe": "NFE",
}
# Of metrics.json, what is in the plots, the tables and the notes.
_SHOWN = {"ece_t", "gradient_norm_t", "guidance_schedule", "reliability"}
_SHOWN |= {"uncertainty", "notes", "by_class", "failed", "own_metrics"}


_UNSET = "not set"
_ELSEWHERE = {"trainer.default_root_dir"}  # the folder, by which the runs are listed


def flatten(settings: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Leaves by dotted key. Callbacks go by the name of their class, so that runs with other ones are compared one by one."""
    trainer = settings.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    if isinstance(callbacks, list) and all(isinstance(each, Mapping) for each in callbacks):
        named: dict[str, Any] = {}
        for number, each in enumerate(callbacks):
            name = str(each.get("class_path", number)).rpartition(".")[2]
            named[f"{name}#{number}" if name in named else name] = each
        settings = {**settings, "trainer": {**trainer, "callbacks": named}}
    return dict(leaves(settings, key))


def as_text(value: Any) -> str:
    """A setting as YAML writes it on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def parts(run: Run) -> list[dict[str, Any]]:
    """What a run is made of: every class under ``model`` and ``data`` of its configuration.

    Each has its ``place``, such as ``guidance.score``, its ``name``, and ``settings`` that are set, as ``name = value``.
    """
    flat = flatten(run.settings) or run.identity
    places = [key.removesuffix(".class_path") for key in flat if key.endswith(".class_path")]
    found = []
    for place in (place for place in places if place.startswith(("model", "data"))):
        inside = f"{place}.init_args."
        deeper = tuple(f"{other}." for other in places if other.startswith(inside))
        settings = [
            f"{key.removeprefix(inside)} = {as_text(value)}"
            for key, value in flat.items()
            if key.startswith(inside) and value is not None and not key.startswith(deeper)
        ]
        shown = place.replace(".init_args", "").removeprefix("model.")
        name = flat[f"{place}.class_path"].rpartition(".")[2]
        found.append({"place": shown, "name": name, "settings": settings})
    return found


def _differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By key that differs, its ``values`` as text, and whether each is ``changed`` from the first."""
    found = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [each.get(key, _UNSET) for each in settings]
        if any(changed := [value != values[0] for value in values]):
            texts = [_UNSET if value is _UNSET else as_text(value) for value in values]
            found[key] = {"key": key, "values": texts, "changed": changed}
    return found


def differences(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Where the settings of runs differ: those that samples are a function of, with the hashes of weights, and all others."""
    flats = [flatten(run.settings) for run in runs]
    by_content, by_name = _differences([run.identity for run in runs]), _differences(flats)
    # A file counts by its content in run.json; its name says more, where the names differ.
    of_samples = [by_name.get(key, difference) for key, difference in by_content.items()]
    known = by_content.keys() | _ELSEWHERE
    return of_samples, [each for key, each in by_name.items() if key not in known] if all(flats) else []


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
    small = value and not float(spec.format.format(value))  # for the digits that the metric usually has
    text = ("{:.3g}" if small else spec.format).format
    uncertainty = measured.get("uncertainty", {}).get(spec.key) or {}
    std, *ends = (uncertainty.get(name) for name in ("std", "low", "high"))
    if all(map(_is_number, ends)):
        cell |= {"ends": ends, "interval": " to ".join(map(text, ends))}
    return cell | {"value": value, "text": text(value), "std": text(std) if _is_number(std) else None}


def _row(spec: MetricSpec, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric of each run; ``apart`` are the cells with an interval that does not meet the first run's."""
    cells = [_cell(spec, each) for each in measured]
    first = cells[0]["ends"]
    for cell in cells[1:]:
        if first and (ends := cell["ends"]):
            cell["apart"] = ends[1] < first[0] or first[1] < ends[0]
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

    facts: dict[str, dict[str, list[Any]]] = {}
    for run, each in zip(runs, measured, strict=True):
        features, reference = (each.get("provenance", {}).get(name, {}) for name in ("features", "reference"))
        images = f"{each['num_reference']} images" if each.get("num_reference") is not None else None
        facts[run.name] = {
            "features": [each.get("features"), hashed(features, "weights_sha256")],
            "numbers of samples": [each.get("num_measured", each.get("num_samples"))],
            "references": [images, hashed(reference), hashed(reference.get("images", {}))],
        }
    notes = []
    for what in ("features", "numbers of samples", "references"):
        said = {name: of[what] for name, of in facts.items() if any(of[what])}
        if any(len(set(values) - {None}) > 1 for values in zip(*said.values(), strict=True)):
            listed = "; ".join(f"{name}: {', '.join(str(v) for v in values if v)}" for name, values in said.items())
            notes.append(f"The {what} differ, so the values do not compare: {listed}.")
    return notes


def _by_class(content: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[dict[str, Any]]]]]:
    """Metrics, and the values of each class, from ``{class: {metric: value, "std": {metric: std}}}``."""
    found = {name for measured in content.values() for name, value in measured.items() if _is_number(value)}
    specs = [spec for name, spec in _specs().items() if name in found]
    rows = []
    for label in sorted(content, key=lambda label: (len(label), label)):
        uncertainty = {name: {"std": std} for name, std in content[label].get("std", {}).items()}
        rows.append((label, [_cell(spec, content[label] | {"uncertainty": uncertainty}) for spec in specs]))
    return [spec.label for spec in specs], rows


def table(runs: Sequence[Run], measured: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table of what was measured of the runs, which metrics.json or evaluation/metrics.json says; None where nothing was.

    ``rows``, a metric each, ``uncertainty``, what the standard deviation of each metric is over, ``notes`` on what the values
    are worth, and ``by_class``: run, labels of metrics, and each class with its cells.
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


def provenance(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What the values and samples of each run came from: key, and the value of each run."""
    said = []
    for run in runs:
        told: dict[str, Any] = {}
        for prefix, measured in (("metrics", run.metrics), ("evaluation", run.evaluation)):
            for key in (key for key in measured if key not in _SHOWN and not key.endswith("_note")):
                told |= {} if _is_number(measured[key]) else dict(leaves(measured[key], f"{prefix}.{key}"))
        told |= {"run.fingerprint": run.about["fingerprint"], "run.created": run.about.get("created")}
        told |= dict(leaves(run.about.get("versions", {}), "run.versions"))
        told |= {key: value for key, value in run.identity.items() if key.startswith("weights of")}
        made_by = ", ".join(sorted({f"{w['device']} on {w['host']}" for w in run.status["workers"]}))
        told |= {"run.uint8_rule": run.identity.get("uint8_rule"), "run.made_by": made_by}
        said.append({key: as_text(value) for key, value in told.items() if value not in (None, [], "")})
    return [(key, [told.get(key, "–") for told in said]) for key in dict.fromkeys(key for told in said for key in told)]
