"""Lightning modules: two that fit, two that predict."""

from calib_guidance.modules.calibrate_classifier import CalibrateClassifier
from calib_guidance.modules.denoise_images import DenoiseImages
from calib_guidance.modules.guided_sampling import GuidedSampling
from calib_guidance.modules.train_diffusion import TrainDiffusion

__all__ = ["CalibrateClassifier", "DenoiseImages", "GuidedSampling", "TrainDiffusion"]
