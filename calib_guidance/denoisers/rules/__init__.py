"""Rules: how a conditional and a negative prediction are combined."""

from calib_guidance.denoisers.rules.base import Level, Rule
from calib_guidance.denoisers.rules.classifier_free import ClassifierFreeGuidance

__all__ = ["ClassifierFreeGuidance", "Level", "Rule"]
