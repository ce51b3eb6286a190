"""Classifiers that can guide."""

from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIPClassifier
from calib_guidance.classifiers.ensemble import Ensemble
from calib_guidance.classifiers.gaussian_mixture import GaussianMixtureClassifier
from calib_guidance.classifiers.noise_aware import NoiseAwareClassifier
from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier
from calib_guidance.classifiers.temperature import fit_temperature

__all__ = [
    "CLIPClassifier",
    "Classifier",
    "Ensemble",
    "GaussianMixtureClassifier",
    "NoiseAwareClassifier",
    "OffTheShelfClassifier",
    "fit_temperature",
]
