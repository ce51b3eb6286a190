"""Negatives: what stands for the unconditional prediction."""

from calib_guidance.denoisers.negatives.base import Negative
from calib_guidance.denoisers.negatives.other_model import Autoguidance, UnconditionalModel
from calib_guidance.denoisers.negatives.unconditional import Unconditional

__all__ = ["Autoguidance", "Negative", "Unconditional", "UnconditionalModel"]
