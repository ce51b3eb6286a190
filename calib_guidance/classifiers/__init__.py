"""Classifiers that can guide."""

from calib_guidance.classifiers.base import Classifier as Classifier
from calib_guidance.classifiers.clip import CLIPClassifier as CLIPClassifier
from calib_guidance.classifiers.ensemble import Ensemble as Ensemble
from calib_guidance.classifiers.gaussian_mixture import GaussianMixtureClassifier as GaussianMixtureClassifier
from calib_guidance.classifiers.noise_aware import NoiseAwareClassifier as NoiseAwareClassifier
from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier as OffTheShelfClassifier
from calib_guidance.classifiers.temperature import fit_temperature as fit_temperature
