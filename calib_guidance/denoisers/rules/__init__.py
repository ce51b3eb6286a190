"""Rules: how a conditional and a negative prediction are combined."""

from calib_guidance.denoisers.rules.apg import APG
from calib_guidance.denoisers.rules.base import ConvertedRule, Level, Rule
from calib_guidance.denoisers.rules.cfg_plus_plus import CFGPlusPlus
from calib_guidance.denoisers.rules.cfg_zero_star import CFGZeroStar
from calib_guidance.denoisers.rules.classifier_free import ClassifierFreeGuidance
from calib_guidance.denoisers.rules.fdg import FDG
from calib_guidance.denoisers.rules.feedback import FeedbackGuidance
from calib_guidance.denoisers.rules.mambo_g import MAMBOG
from calib_guidance.denoisers.rules.rescaled import RescaledGuidance
from calib_guidance.denoisers.rules.scheduled import Scheduled
from calib_guidance.denoisers.rules.tcfg import TCFG

__all__ = [
    "APG",
    "FDG",
    "MAMBOG",
    "TCFG",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierFreeGuidance",
    "ConvertedRule",
    "FeedbackGuidance",
    "Level",
    "RescaledGuidance",
    "Rule",
    "Scheduled",
]
