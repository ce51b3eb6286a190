"""Sampling loops, one per file."""

from calib_guidance.samplers.base import Revisable, Sampler, StepRecord
from calib_guidance.samplers.ddim import DDIM
from calib_guidance.samplers.ddpm import DDPM
from calib_guidance.samplers.heun import Heun

__all__ = ["DDIM", "DDPM", "Heun", "Revisable", "Sampler", "StepRecord"]
