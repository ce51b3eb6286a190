"""Negatives: what stands for the unconditional prediction."""

from calib_guidance.denoisers.negatives.base import Negative
from calib_guidance.denoisers.negatives.independent_condition import IndependentCondition
from calib_guidance.denoisers.negatives.other_model import Autoguidance, UnconditionalModel
from calib_guidance.denoisers.negatives.perturbed_attention import PerturbedAttention
from calib_guidance.denoisers.negatives.perturbed_time import PerturbedTime
from calib_guidance.denoisers.negatives.sliding_windows import SlidingWindows
from calib_guidance.denoisers.negatives.smoothed_attention import SmoothedAttention
from calib_guidance.denoisers.negatives.unconditional import Unconditional

__all__ = [
    "Autoguidance",
    "IndependentCondition",
    "Negative",
    "PerturbedAttention",
    "PerturbedTime",
    "SlidingWindows",
    "SmoothedAttention",
    "Unconditional",
    "UnconditionalModel",
]
