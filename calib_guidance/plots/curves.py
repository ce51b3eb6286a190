"""Quantities over the trajectory: ECE_t (arXiv 2310.11311, Figure 1; arXiv 2511.05844, Figure 1), strength of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import ConfigurationError, check_choice
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.plots.style import COLORS, LINE_STYLES, PathLike, panel, paper, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = {
    "variance": r"weight of $\nabla S$ / $\max_t\,\Sigma_t$",
    "noise": r"weight of $\nabla S$ in $\epsilon$",
    "shift": "shift of the sample / its rms",
    "difference": "shift / noise difference",
}


class Series(NamedTuple):
    """One line: its name in the legend, and at each of ``(N,)`` steps t of the full process the quantity and its std.

    ``std`` is the half-width of a band, None for no band. Values that were not measured are None or NaN.

    Examples:
        >>> Series("plain", t=[999, 0], mean=[0.1, 0.4]).std is None  # no band
        True
    """

    name: str
    t: Sequence[float]
    mean: Sequence[float | None]
    std: Sequence[float | None] | None = None


def _line(axis: Axes, t: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line over ascending t that shows points without neighbors too."""
    axis.plot(t, values, **style)
    there = np.isfinite(values)
    alone = there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False)
    if alone.any():
        axis.plot(t[alone], values[alone], ls="", marker="o", ms=3, color=style["color"])


@paper
def curves(
    series: Sequence[Series], path: PathLike, label: str, averages: bool = False, least: float | None = 0.0
) -> list[Path]:
    """Quantities over the trajectory, from noise on the left to the image on the right.

    Args:
        series: one line each, in the legend where there are several.
        label: of the quantity, for the axis.
        averages: also the mean over the points of each line, of ECE_t the integral ECE: in the legend, and of a line that is
            alone a horizontal one.
        least: that the quantity can be, where the axis begins; None begins it where the data do.
    """
    series, several = [Series(*each) for each in series], len(series) > 1
    if not any(np.isfinite(np.array(each.mean, np.float64)).any() for each in series):
        raise ConfigurationError(f"there is nothing to draw: {label} has not been measured at any step")
    figure, axis = panel(2.1 + 0.14 * (len(series) if several else 0))
    for number, (name, *columns) in enumerate(series):
        order = np.argsort(columns[0])
        t, mean, std = (None if c is None else np.array(c, np.float64)[order] for c in columns)
        # No two lines are alike up to 28.
        style = {"color": COLORS[number % 7], "ls": LINE_STYLES[number % 4]}
        average = np.nanmean(mean) if averages and np.isfinite(mean).any() else None
        if average is not None:
            name = f"{name} (mean {average:.3f})" if several else f"mean {average:.3f}"
        _line(axis, t, mean, **style, label=name if several else "_")
        if std is not None:
            low = np.maximum(mean - std, -np.inf if least is None else least)
            axis.fill_between(t, low, mean + std, color=style["color"], alpha=0.18, lw=0)
        if average is not None and not several:
            axis.axhline(average, color=COLORS[1], lw=1, ls="--", label=name)
    if least is not None:
        axis.set_ylim(bottom=least)
    steps = np.concatenate([each.t for each in series])
    room = 0.02 * np.ptp(steps) or 1
    axis.set(xlim=(steps.max() + room, steps.min() - room), ylabel=label, xlabel="diffusion step $t$  (noise → image)")
    if several:
        longest = max(len(text) for text in axis.get_legend_handles_labels()[1])
        columns = 3 if longest < 11 else 2 if longest < 25 else 1
        figure.legend(loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)
    elif averages:
        axis.legend()
    return save(figure, path)


def strength(schedule: GuidanceSchedule, levels: NoiseLevels, unit: str = "variance", scale: float = 1.0) -> np.ndarray:
    """What ∇S is multiplied by at each level, ``(N,)`` float64; 0 where guidance is off.

    Args:
        schedule: sine factor and intervals.
        levels: of the sampler.
        unit: ``variance``, a step of DDPM, (Σ_t + γ·sin(π·progress)·Σ_max)/Σ_max with Σ the step's β, the upper end of the
            range that networks learn (arXiv 2310.11311, Eq. 5); ``noise``, samplers that shift ε, √(1 − ᾱ_t); ``shift``,
            Algorithm 2, (N + 1 − j)/(N + 1) + γ·sin(π·progress) at executed step j; ``difference``, Algorithm 3,
            1 + γ·sin(π·progress).
        scale: s, which multiplies all of it.
    """
    check_choice("unit", unit, _UNITS)
    sine = np.array([schedule.sine(progress) for progress in levels.progress])
    if unit == "variance":
        variance = 1 - levels.alphas_cumprod / np.append(1.0, levels.alphas_cumprod[:-1])
        largest = np.maximum.accumulate(variance[::-1])[::-1]  # so far, from the noise on
        weight = (variance + sine * largest) / variance.max()
    elif unit == "noise":
        weight = np.sqrt(1 - levels.alphas_cumprod)
    elif unit == "shift":
        count = len(levels.times) + 1
        weight = (count - levels.executed) / count + sine
    else:
        weight = 1 + sine
    return scale * np.where(schedule.active(levels), weight, 0.0)


def guidance_schedule(
    t: Sequence[float], strengths: Mapping[str, Sequence[float]], path: PathLike, unit: str = "variance"
) -> list[Path]:
    """Curves of the ``(N,)`` strengths of guidance, by name, in a unit of :func:`strength`, over ``(N,)`` steps t."""
    return curves([Series(name, t, values) for name, values in strengths.items()], path, _UNITS[unit])
