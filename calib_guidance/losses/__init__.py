"""Losses, as pure functions of tensors."""

from calib_guidance.losses.smooth_ece import smooth_ece

__all__ = ["smooth_ece"]
