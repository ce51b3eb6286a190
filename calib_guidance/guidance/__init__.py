"""Classifier guidance and how it is scheduled."""

from calib_guidance.guidance.base import Guidance, GuidedPrediction
from calib_guidance.guidance.classifier_guidance import ClassifierGuidance, SwitchedGuidance, match_norm, rms
from calib_guidance.guidance.schedules import GuidanceSchedule

__all__ = [
    "ClassifierGuidance",
    "Guidance",
    "GuidanceSchedule",
    "GuidedPrediction",
    "SwitchedGuidance",
    "match_norm",
    "rms",
]
