"""Sampling loops, one per file."""

from calib_guidance.samplers.base import BufferedObserver, Sampler, StepRecord
from calib_guidance.samplers.ddim import DDIM
from calib_guidance.samplers.ddpm import DDPM
from calib_guidance.samplers.dpm_solver import DPMSolver
from calib_guidance.samplers.heun import Heun
from calib_guidance.samplers.unipc import UniPC

__all__ = ["DDIM", "DDPM", "BufferedObserver", "DPMSolver", "Heun", "Sampler", "StepRecord", "UniPC"]
