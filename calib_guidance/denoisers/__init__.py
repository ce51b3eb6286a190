"""Diffusion models behind one interface."""

from calib_guidance.denoisers.adm import ADMDenoiser
from calib_guidance.denoisers.analytic import GaussianMixture, GaussianMixtureClassifier
from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.decoders import LinearDecoder, TinyDecoder, VAEDecoder, fit_linear_decoder
from calib_guidance.denoisers.dit import DiTDenoiser
from calib_guidance.denoisers.edm import EDMDenoiser
from calib_guidance.denoisers.relabelled import Relabelled

__all__ = [
    "ADMDenoiser",
    "Denoiser",
    "DiTDenoiser",
    "EDMDenoiser",
    "GaussianMixture",
    "GaussianMixtureClassifier",
    "LinearDecoder",
    "Prediction",
    "Relabelled",
    "TinyDecoder",
    "VAEDecoder",
    "fit_linear_decoder",
]
