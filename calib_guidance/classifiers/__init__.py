"""Classifiers that can guide."""

from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.noise_aware import NoiseAwareClassifier
from calib_guidance.classifiers.off_the_shelf import OffTheShelfClassifier

__all__ = ["Classifier", "NoiseAwareClassifier", "OffTheShelfClassifier"]
