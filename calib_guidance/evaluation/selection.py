"""Choosing metrics by name: options of the metric table, and specs of a user's own module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.loading import load_object
from calib_guidance.evaluation.metrics import METRICS
from calib_guidance.evaluation.sample_set import Measures, ReferenceHolds
from calib_guidance.evaluation.spec import MetricSpec

OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(spec.option for spec in METRICS.values() if spec.compute))


def load_metric(path: str) -> MetricSpec:
    """The spec at a dotted path, ``MODULE.NAME``: a :class:`MetricSpec`, or what makes one without arguments.

    Raises:
        ConfigurationError: there is none, or its key is taken.
    """
    module, _, name = path.rpartition(".")
    spec = load_object(module, name, f"metrics: {path}", "the dotted path of a MetricSpec")
    try:
        spec = spec() if callable(spec) else spec
    except TypeError as error:
        raise ConfigurationError(f"metrics: {path}: {error}; expected a MetricSpec, or what makes one") from error
    if not isinstance(spec, MetricSpec) or spec.compute is None:
        raise ConfigurationError(f"metrics: {path} is {type(spec).__name__}; expected a MetricSpec with compute")
    if spec.key in METRICS:
        raise ConfigurationError(f"metrics: {path} has the key {spec.key!r}, which a built-in metric has; rename it")
    return spec


def select(names: Iterable[str]) -> dict[str, tuple[MetricSpec, ...]]:
    """The metrics of each name, in the order of the table: names of :data:`OPTIONS`, or dotted paths of your own specs.

    Raises:
        ConfigurationError: an unknown name.
    """
    names = list(dict.fromkeys(names))
    if unknown := sorted(name for name in names if name not in OPTIONS and "." not in name):
        raise ConfigurationError(
            f"metrics: unknown {', '.join(unknown)}; known: {', '.join(OPTIONS)}, and the dotted path of a MetricSpec"
        )
    found = {
        option: tuple(spec for spec in METRICS.values() if spec.option == option and spec.compute)
        for option in OPTIONS
        if option in names
    }
    return found | {name: (load_metric(name),) for name in names if name not in OPTIONS}


def needs(names: Iterable[str]) -> set[str]:
    """Names of :data:`NEEDS` of any of the metrics."""
    return {need for specs in select(names).values() for spec in specs for need in spec.needs}


def applicable(measures: Measures, reference: ReferenceHolds) -> tuple[str, ...]:
    """Options whose needs are met and that are computed by default, whatever the number of samples."""
    return tuple(
        option
        for option, specs in select(OPTIONS).items()
        if specs[0].by_default(measures) and specs[0].unmet(measures, reference, None) is None
    )


def unmet(measures: Measures, reference: ReferenceHolds, num_samples: int, labels_known: bool = True) -> dict[str, str]:
    """Which of the metrics of ``measures`` cannot be computed, and why; see :meth:`MetricSpec.unmet`."""
    found = {
        name: specs[0].unmet(measures, reference, num_samples, labels_known)
        for name, specs in select(measures.metrics).items()
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def help_text() -> str:
    """A line for each option, for ``--help``."""
    helps: dict[str, str] = {}
    for spec in METRICS.values():
        if spec.compute and spec.help:
            helps.setdefault(spec.option, spec.help)
    return "".join(f"  {option:<11}{helps[option]}\n" for option in OPTIONS)


def described_specs(specs: Iterable[MetricSpec]) -> dict[str, dict[str, Any]]:
    """What readers of ``metrics.json`` need to know of metrics that are not in the table; see :func:`specs_of`."""
    return {
        spec.key: {"label": spec.label, "format": spec.format, "higher_is_better": spec.higher_is_better}
        for spec in specs
        if spec.key not in METRICS
    }


def specs_of(*measured: Mapping[str, Any]) -> dict[str, MetricSpec]:
    """The table, and the specs of your own that the contents of ``metrics.json`` describe, by key."""
    own = {key: MetricSpec(key, **each) for results in measured for key, each in results.get("own_metrics", {}).items()}
    return {**METRICS, **own}
