"""Rules: how a conditional and a negative prediction are combined."""

from calib_guidance.denoisers.rules.apg import APG as APG
from calib_guidance.denoisers.rules.base import ConvertedRule as ConvertedRule
from calib_guidance.denoisers.rules.base import Level as Level
from calib_guidance.denoisers.rules.base import Rule as Rule
from calib_guidance.denoisers.rules.cfg_plus_plus import CFGPlusPlus as CFGPlusPlus
from calib_guidance.denoisers.rules.cfg_zero_star import CFGZeroStar as CFGZeroStar
from calib_guidance.denoisers.rules.classifier_free import ClassifierFreeGuidance as ClassifierFreeGuidance
from calib_guidance.denoisers.rules.fdg import FDG as FDG
from calib_guidance.denoisers.rules.feedback import FeedbackGuidance as FeedbackGuidance
from calib_guidance.denoisers.rules.mambo_g import MAMBOG as MAMBOG
from calib_guidance.denoisers.rules.rescaled import RescaledGuidance as RescaledGuidance
from calib_guidance.denoisers.rules.scheduled import Scheduled as Scheduled
from calib_guidance.denoisers.rules.tcfg import TCFG as TCFG
