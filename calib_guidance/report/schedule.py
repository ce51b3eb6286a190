"""How strong guidance was at each step of a run, from its configuration: no network is built and no weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from calib_guidance import samplers
from calib_guidance.figures import strength
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.noise_schedule import NoiseLevels, NoiseSchedule, named_betas
from calib_guidance.report.runs import Run
from calib_guidance.report.settings import flatten

_SCHEDULE = re.compile(r"denoiser(\.init_args\.denoiser)*\.init_args\.(noise_schedule|num_steps)")
_GUIDES = ("ClassifierGuidance", "SwitchedGuidance")


class Strength(NamedTuple):
    """Of guidance, for scale 1.

    Attributes:
        unit: see :func:`calib_guidance.figures.strength`.
        t: ``(N,)`` step of the full process at each level.
        values: ``(N,)``, 0 where guidance is off.
        scales: that it is multiplied by, one or those of both parts of a switched guidance.
    """

    unit: str
    t: np.ndarray
    values: np.ndarray
    scales: tuple[float, ...]


def _class_of(settings: Mapping[str, Any]) -> str:
    return str(settings.get("class_path")).rpartition(".")[2]


def _levels(run: Run, model: Mapping[str, Any]) -> NoiseLevels:
    """The sampler's own, of the noise schedule that the configuration or the weights name."""
    named = {
        match[2]: value
        for key, value in flatten({"denoiser": model["denoiser"]})
        if (match := _SCHEDULE.fullmatch(key)) and value is not None
    }
    for name, weights in run.metrics.get("weights", {}).items():
        if name.startswith("denoiser"):  # what the configuration leaves to the weights
            named = {key: weights[key] for key in ("noise_schedule", "num_steps") if weights.get(key)} | named
    schedule = NoiseSchedule(named_betas(named["noise_schedule"], named.get("num_steps", 1000)))
    sampler = model["sampler"]
    # Only the package's own: a configuration that came with a folder must not name what is imported here.
    if not sampler["class_path"].startswith(f"{samplers.__name__}."):
        raise KeyError(sampler["class_path"])
    build = getattr(samplers, _class_of(sampler))
    return build(**sampler.get("init_args", {})).levels(SimpleNamespace(schedule=schedule))


def _unit(sampler: str, enters: str) -> str:
    if enters == "score":
        return "variance" if sampler == "DDPM" else "noise"
    return {"sample": "shift", "noise_difference": "difference"}[enters]


def guidance_strength(run: Run) -> Strength | None:
    """The strength of a run's guidance over its steps; None where it has none.

    Raises:
        ValueError: it cannot be told from the configuration: a guidance, sampler or noise schedule of somebody's own, or
            guidance that enters in two ways.
    """
    if not run.settings:
        raise ValueError("there is no config.yaml")
    model = run.settings["model"].get("init_args", {})
    if not model.get("guidance"):
        return None
    kind, options = _class_of(model["guidance"]), model["guidance"].get("init_args", {})
    if kind not in _GUIDES:
        raise ValueError(f"{kind} is a guidance of its own")
    ends = [options] if kind == "ClassifierGuidance" else [options[end]["init_args"] for end in ("early", "late")]
    scales = tuple(float(end.get("scale", 1.0)) for end in ends)
    if not any(scales):
        return None
    units = {_unit(_class_of(model["sampler"]), end.get("enters", "score")) for end in ends}
    if len(units) > 1:
        raise ValueError("its two parts enter in different ways")
    (unit,) = units
    try:
        levels = _levels(run, model)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its noise levels are not known ({error})") from error
    values = [
        strength(GuidanceSchedule(**((end.get("schedule") or {}).get("init_args", {}))), levels, unit) * (scale != 0)
        for end, scale in zip(ends, scales, strict=True)
    ]
    if len(values) == 2:
        values = [np.where(levels.times > options.get("switch_at", 200), *values)]
    return Strength(unit, levels.times, values[0], scales)
