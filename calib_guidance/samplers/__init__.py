"""Samplers, one per file. The base owns the loop."""

from calib_guidance.samplers.base import Sampler, Transition
from calib_guidance.samplers.ddim import DDIM
from calib_guidance.samplers.ddpm import DDPM
from calib_guidance.samplers.dpm_solver import DPMSolver
from calib_guidance.samplers.heun import Heun
from calib_guidance.samplers.records import BufferedObserver, Observer, StepRecord
from calib_guidance.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "BufferedObserver",
    "DPMSolver",
    "Heun",
    "Observer",
    "Sampler",
    "StepRecord",
    "Transition",
    "UniPC",
]
