"""Diffusion processes: schedules, noise levels, parameterizations and per-sample random streams."""

from calib_guidance.diffusion.interval import Interval as Interval
from calib_guidance.diffusion.rng import Noise as Noise
from calib_guidance.diffusion.rng import SampleStreams as SampleStreams
from calib_guidance.diffusion.schedules import NoiseLevels as NoiseLevels
from calib_guidance.diffusion.schedules import NoiseSchedule as NoiseSchedule
