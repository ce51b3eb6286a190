"""Negatives: what stands for the unconditional prediction."""

from calib_guidance.denoisers.negatives.base import Negative as Negative
from calib_guidance.denoisers.negatives.independent_condition import IndependentCondition as IndependentCondition
from calib_guidance.denoisers.negatives.other_model import Autoguidance as Autoguidance
from calib_guidance.denoisers.negatives.other_model import UnconditionalModel as UnconditionalModel
from calib_guidance.denoisers.negatives.perturbed_attention import PerturbedAttention as PerturbedAttention
from calib_guidance.denoisers.negatives.perturbed_time import PerturbedTime as PerturbedTime
from calib_guidance.denoisers.negatives.sliding_windows import SlidingWindows as SlidingWindows
from calib_guidance.denoisers.negatives.smoothed_attention import SmoothedAttention as SmoothedAttention
from calib_guidance.denoisers.negatives.unconditional import Unconditional as Unconditional
