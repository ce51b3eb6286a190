"""Diffusion models behind one interface."""

from calib_guidance.denoisers.adm import ADMDenoiser
from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.classifier_free import ClassifierFreeGuidance
from calib_guidance.denoisers.decoders import LinearDecoder, TinyDecoder, VAEDecoder, fit_linear_decoder
from calib_guidance.denoisers.dit import DiTDenoiser
from calib_guidance.denoisers.edm import EDMDenoiser
from calib_guidance.denoisers.gaussian_mixture import GaussianMixture
from calib_guidance.denoisers.remap_classes import RemapClasses

__all__ = [
    "ADMDenoiser",
    "ClassifierFreeGuidance",
    "Denoiser",
    "DiTDenoiser",
    "EDMDenoiser",
    "GaussianMixture",
    "LinearDecoder",
    "Prediction",
    "RemapClasses",
    "TinyDecoder",
    "VAEDecoder",
    "fit_linear_decoder",
]
