"""Losses, as pure functions of tensors."""

from calib_guidance.losses.smooth_ece import binned_smooth_ece, smooth_ece

__all__ = ["binned_smooth_ece", "smooth_ece"]
