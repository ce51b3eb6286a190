"""Lightning modules: two that fit, two that predict."""

from calib_guidance.tasks.calibrate_classifier import CalibrateClassifier
from calib_guidance.tasks.denoise_images import DenoiseImages
from calib_guidance.tasks.guided_sampling import GuidedSampling
from calib_guidance.tasks.train_diffusion import TrainDiffusion

__all__ = ["CalibrateClassifier", "DenoiseImages", "GuidedSampling", "TrainDiffusion"]
