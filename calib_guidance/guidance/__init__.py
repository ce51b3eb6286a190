"""Classifier guidance and how it is scheduled."""

from calib_guidance.guidance.base import Aux, Guidance, Guided, Plan
from calib_guidance.guidance.classifier_guidance import ClassifierGuidance, SwitchedGuidance, match_norm, rms
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.guidance.stabilizer import GradientStabilizer
from calib_guidance.guidance.training_free import TrainingFreeGuidance

__all__ = [
    "Aux",
    "ClassifierGuidance",
    "GradientStabilizer",
    "Guidance",
    "GuidanceSchedule",
    "Guided",
    "Plan",
    "SwitchedGuidance",
    "TrainingFreeGuidance",
    "match_norm",
    "rms",
]
