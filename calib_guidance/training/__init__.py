"""Training: losses, learning-rate schedules, and what a classifier is trained on."""

from calib_guidance.training.edm_loss import EDMLoss
from calib_guidance.training.flow_matching import FlowMatching
from calib_guidance.training.inputs import CleanInput, DenoisedInput, InputTransform, NoisyInput
from calib_guidance.training.losses import binned_smooth_ece, smooth_ece
from calib_guidance.training.lr_schedules import InverseSqrt, WarmupCosine
from calib_guidance.training.objective import Objective

__all__ = [
    "CleanInput",
    "DenoisedInput",
    "EDMLoss",
    "FlowMatching",
    "InputTransform",
    "InverseSqrt",
    "NoisyInput",
    "Objective",
    "WarmupCosine",
    "binned_smooth_ece",
    "smooth_ece",
]
