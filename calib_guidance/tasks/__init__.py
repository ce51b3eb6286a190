"""Lightning modules: two that fit, two that predict."""

from calib_guidance.tasks.calibrate_classifier import CalibrateClassifier
from calib_guidance.tasks.predict import DenoiseImages, GuidedSampling
from calib_guidance.tasks.train_diffusion import TrainDiffusion

__all__ = ["CalibrateClassifier", "DenoiseImages", "GuidedSampling", "TrainDiffusion"]
