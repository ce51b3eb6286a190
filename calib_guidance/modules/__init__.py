"""Lightning modules: two that fit, one that predicts."""

from calib_guidance.modules.calibrate_classifier import CalibrateClassifier
from calib_guidance.modules.guided_sampling import GuidedSampling
from calib_guidance.modules.train_diffusion import TrainDiffusion

__all__ = ["CalibrateClassifier", "GuidedSampling", "TrainDiffusion"]
