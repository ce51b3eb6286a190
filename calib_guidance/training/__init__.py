"""Training: losses, learning-rate schedules, and what a classifier is trained on."""

from calib_guidance.training.flow_matching import FlowMatching
from calib_guidance.training.inputs import CleanInput, DenoisedInput, InputTransform, NoisyInput
from calib_guidance.training.losses import binned_smooth_ece, smooth_ece
from calib_guidance.training.lr_schedules import WarmupCosine

__all__ = [
    "CleanInput",
    "DenoisedInput",
    "FlowMatching",
    "InputTransform",
    "NoisyInput",
    "WarmupCosine",
    "binned_smooth_ece",
    "smooth_ece",
]
