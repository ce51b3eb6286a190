"""How strong guidance is at each step (arXiv 2310.11311, Eq. 5 and Figure 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.plots.curves import line, line_style, numbers, trajectory_axis
from calib_guidance.plots.style import COLUMN, paper, save

UNITS = {
    "variance": r"weight of $\nabla S$ / $\max_t\,\Sigma_t$",
    "noise": r"weight of $\nabla S$ in $\epsilon$",
    "shift": "shift of the sample / its rms",
    "difference": "shift / noise difference",
}


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

    Raises:
        ValueError: another unit.
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
        raise ValueError(f"unit: unknown {unit!r}; known: {', '.join(UNITS)}")
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
    figure = Figure(figsize=(COLUMN, 2.1))
    axis = figure.add_subplot()
    t = numbers(t)
    for number, (name, values) in enumerate(strengths.items()):
        line(axis, t, numbers(values), **line_style(number), label=name)
    axis.set_ylim(bottom=0)
    trajectory_axis(axis, t)
    axis.set_ylabel(UNITS[unit])
    if len(strengths) > 1:
        axis.legend(handlelength=2.6)
    return save(figure, path)
