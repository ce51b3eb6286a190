"""Training: losses, learning-rate schedules, and what a classifier is trained on."""

from calib_guidance.training.inputs import CleanInput, DenoisedInput, InputTransform, NoisyInput
from calib_guidance.training.lr_schedules import WarmupCosine
from calib_guidance.training.smooth_ece import binned_smooth_ece, smooth_ece

__all__ = [
    "CleanInput",
    "DenoisedInput",
    "InputTransform",
    "NoisyInput",
    "WarmupCosine",
    "binned_smooth_ece",
    "smooth_ece",
]
