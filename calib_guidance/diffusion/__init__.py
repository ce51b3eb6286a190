"""Diffusion processes: schedules, noise levels, parameterizations and per-sample random streams."""

from calib_guidance.diffusion.interval import Interval
from calib_guidance.diffusion.rng import Noise, SampleStreams
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule

__all__ = [
    "Interval",
    "Noise",
    "NoiseLevels",
    "NoiseSchedule",
    "SampleStreams",
]
