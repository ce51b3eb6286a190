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
from calib_guidance.denoisers.negatives import Autoguidance, Negative, Unconditional, UnconditionalModel
from calib_guidance.denoisers.remap_classes import RemapClasses
from calib_guidance.denoisers.rules import ClassifierFreeGuidance, Level, Rule

__all__ = [
    "ADMDenoiser",
    "Autoguidance",
    "ClassifierFreeGuidance",
    "Combination",
    "Denoiser",
    "DiTDenoiser",
    "DiffusersDenoiser",
    "EDMDenoiser",
    "GaussianMixture",
    "Level",
    "LinearDecoder",
    "ModuleDenoiser",
    "Negative",
    "Prediction",
    "RemapClasses",
    "Rule",
    "TinyDecoder",
    "Unconditional",
    "UnconditionalModel",
    "VAEDecoder",
    "fit_linear_decoder",
]
