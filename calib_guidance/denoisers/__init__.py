"""Diffusion models behind one interface."""

from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.combination import Combination
from calib_guidance.denoisers.decoders import LinearDecoder, TinyDecoder, VAEDecoder, fit_linear_decoder
from calib_guidance.denoisers.discrete import ADMDenoiser
from calib_guidance.denoisers.dit import DiTDenoiser
from calib_guidance.denoisers.edm import EDMDenoiser
from calib_guidance.denoisers.from_diffusers import DiffusersDenoiser
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture
from calib_guidance.denoisers.module import ModuleDenoiser
from calib_guidance.denoisers.negatives import (
    Autoguidance,
    IndependentCondition,
    Negative,
    PerturbedAttention,
    PerturbedTime,
    SlidingWindows,
    SmoothedAttention,
    Unconditional,
    UnconditionalModel,
)
from calib_guidance.denoisers.remap_classes import RemapClasses
from calib_guidance.denoisers.rules import (
    APG,
    FDG,
    MAMBOG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierFreeGuidance,
    ConvertedRule,
    FeedbackGuidance,
    Level,
    RescaledGuidance,
    Rule,
    Scheduled,
)

__all__ = [
    "APG",
    "FDG",
    "MAMBOG",
    "TCFG",
    "ADMDenoiser",
    "Autoguidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierFreeGuidance",
    "Combination",
    "ConvertedRule",
    "Denoiser",
    "DiTDenoiser",
    "DiffusersDenoiser",
    "EDMDenoiser",
    "FeedbackGuidance",
    "GaussianMixture",
    "IndependentCondition",
    "Level",
    "LinearDecoder",
    "ModuleDenoiser",
    "Negative",
    "PerturbedAttention",
    "PerturbedTime",
    "Prediction",
    "RemapClasses",
    "RescaledGuidance",
    "Rule",
    "Scheduled",
    "SlidingWindows",
    "SmoothedAttention",
    "TinyDecoder",
    "Unconditional",
    "UnconditionalModel",
    "VAEDecoder",
    "fit_linear_decoder",
]
