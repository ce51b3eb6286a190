"""Classifier guidance and how it is scheduled."""

from calib_guidance.guidance.base import Aux, Guidance, Guided, Plan
from calib_guidance.guidance.classifier_guidance import ClassifierGuidance, SwitchedGuidance, match_norm, rms
from calib_guidance.guidance.schedules import GuidanceSchedule

__all__ = [
    "Aux",
    "ClassifierGuidance",
    "Guidance",
    "GuidanceSchedule",
    "Guided",
    "Plan",
    "SwitchedGuidance",
    "match_norm",
    "rms",
]
