"""Guidance: classifiers and classifier-free, and how they are scheduled."""

from calib_guidance.guidance.base import Guidance, GuidedPrediction
from calib_guidance.guidance.classifier_free import ClassifierFreeGuidance
from calib_guidance.guidance.classifier_guidance import ClassifierGuidance, SwitchedGuidance, match_norm, rms
from calib_guidance.guidance.schedules import GuidanceSchedule

__all__ = [
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Guidance",
    "GuidanceSchedule",
    "GuidedPrediction",
    "SwitchedGuidance",
    "match_norm",
    "rms",
]
