"""Quantities over the trajectory: ECE_t (arXiv 2310.11311, Figure 1; arXiv 2511.05844, Figure 1), strength of guidance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import ConfigurationError
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.plots.style import COLORS, LINE_STYLES, panel, paper, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = COLORS[:7]
_UNITS = {
    "variance": r"weight of $\nabla S$ / $\max_t\,\Sigma_t$",
    "noise": r"weight of $\nabla S$ in $\epsilon$",
    "shift": "shift of the sample / its rms",
    "difference": "shift / noise difference",
}


class Series(NamedTuple):
    """One line.

    Attributes:
        name: for the legend.
        t: ``(N,)`` step of the full process at each point.
        mean: ``(N,)`` the quantity; None or NaN where it was not measured.
        std: ``(N,)`` half-width of a band around it; None for none.
    """

    name: str
    t: Sequence[float]
    mean: Sequence[float | None]
    std: Sequence[float | None] | None = None


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """float64, None as NaN: how JSON says it."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _style(number: int) -> dict[str, Any]:
    """Color and dashes of a line among others; no two alike up to 28."""
    return {"color": _LINES[number % 7], "ls": LINE_STYLES[number % 4]}


def _trajectory_axis(axis: Axes, t: np.ndarray) -> None:
    """t from noise on the left to the image on the right."""
    low, high = (t.min(), t.max()) if len(t) else (0, 1)
    room = 0.02 * (high - low) or 1
    axis.set_xlim(high + room, low - room)
    axis.set_xlabel("diffusion step $t$  (noise → image)")


def _line(axis: Axes, t: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line that shows points without neighbors too."""
    order = np.argsort(t)
    t, values = t[order], values[order]
    axis.plot(t, values, **style)
    there = np.isfinite(values)
    alone = there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False)
    if alone.any():
        axis.plot(t[alone], values[alone], ls="", marker="o", ms=3, color=style["color"])


@paper
def curves(
    series: Sequence[Series],
    path: str | os.PathLike[str],
    label: str,
    averages: bool = False,
    least: float | None = 0.0,
) -> list[Path]:
    """Quantities over the trajectory, from noise on the left to the image on the right.

    Args:
        series: one line each, in the legend where there are several.
        path: see :func:`~calib_guidance.plots.style.save`.
        label: of the quantity, for the axis.
        averages: also the mean over the points of each line, of ECE_t the integral ECE: in the legend, and of a line that is
            alone a horizontal one.
        least: that the quantity can be, where the axis begins; None begins it where the data do.
    """
    series = [Series(*each) for each in series]
    means = [numbers(each.mean) for each in series]
    if not any(np.isfinite(mean).any() for mean in means):
        raise ConfigurationError(f"there is nothing to draw: {label} has not been measured at any step")
    several = len(series) > 1
    figure, axis = panel(2.1 + 0.14 * (len(series) if several else 0))
    for number, (each, mean) in enumerate(zip(series, means, strict=True)):
        t, style, name = numbers(each.t), _style(number), each.name
        average = np.nanmean(mean) if averages and np.isfinite(mean).any() else None
        if average is not None:
            name = f"{name} (mean {average:.3f})" if several else f"mean {average:.3f}"
        _line(axis, t, mean, **style, label=name if several else "_")
        if each.std is not None:
            order, std = np.argsort(t), numbers(each.std)
            low, high = np.maximum(mean - std, -np.inf if least is None else least), mean + std
            axis.fill_between(t[order], low[order], high[order], color=style["color"], alpha=0.18, lw=0)
        if average is not None and not several:
            axis.axhline(average, color=_LINES[1], lw=1, ls="--", label=name)
    if least is not None:
        axis.set_ylim(bottom=least)
    _trajectory_axis(axis, np.concatenate([numbers(each.t) for each in series]))
    axis.set_ylabel(label)
    if several:
        longest = max(len(text) for text in axis.get_legend_handles_labels()[1])
        columns = 3 if longest < 11 else 2 if longest < 25 else 1
        figure.legend(loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)
    elif averages:
        axis.legend()
    return save(figure, path)


def strength(schedule: GuidanceSchedule, levels: NoiseLevels, unit: str = "variance", scale: float = 1.0) -> np.ndarray:
    """What ∇S is multiplied by at each level; 0 where guidance is off.

    Args:
        schedule: sine factor and intervals.
        levels: of the sampler.
        unit: ``variance``, a step of DDPM, (Σ_t + γ·sin(π·progress)·Σ_max)/Σ_max with Σ the step's β, the upper end of the
            range that networks learn (arXiv 2310.11311, Eq. 5); ``noise``, samplers that shift ε, √(1 − ᾱ_t); ``shift``,
            Algorithm 2, (N + 1 − j)/(N + 1) + γ·sin(π·progress) at executed step j; ``difference``, Algorithm 3,
            1 + γ·sin(π·progress).
        scale: s, which multiplies all of it.

    Returns:
        ``(N,)`` float64.
    """
    sine = np.array([schedule.sine(progress) for progress in levels.progress])
    if unit == "variance":
        before = np.append(1.0, levels.alphas_cumprod[:-1])
        variance = 1 - levels.alphas_cumprod / before
        largest = np.maximum.accumulate(variance[::-1])[::-1]  # so far, from the noise on
        weight = (variance + sine * largest) / variance.max()
    elif unit == "noise":
        weight = np.sqrt(1 - levels.alphas_cumprod)
    elif unit == "shift":
        count = len(levels.times) + 1
        weight = (count - levels.executed) / count + sine
    elif unit == "difference":
        weight = 1 + sine
    else:
        raise ValueError(f"unit: unknown {unit!r}; known: {', '.join(_UNITS)}")
    return scale * np.where(schedule.active(levels), weight, 0.0)


@paper
def guidance_schedule(
    t: Sequence[float], strengths: Mapping[str, Sequence[float]], path: str | os.PathLike[str], unit: str = "variance"
) -> list[Path]:
    """Strength of guidance over the trajectory, from noise on the left to the image on the right.

    Args:
        t: ``(N,)`` step of the full process at each level.
        strengths: by name, what :func:`strength` says of each level, ``(N,)``.
        path: see :func:`~calib_guidance.plots.style.save`.
        unit: of the strengths, see :func:`strength`.
    """
    return curves([Series(name, t, values) for name, values in strengths.items()], path, _UNITS[unit])
