"""Diffusion models behind one interface."""

from calib_guidance.denoisers.adm import ADMDenoiser
from calib_guidance.denoisers.analytic import GaussianMixture, GaussianMixtureClassifier
from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.relabelled import Relabelled

__all__ = ["ADMDenoiser", "Denoiser", "GaussianMixture", "GaussianMixtureClassifier", "Prediction", "Relabelled"]
