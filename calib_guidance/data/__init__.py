"""Data for ``fit`` and requests for ``predict``."""

from calib_guidance.data.digits import Digits, digits
from calib_guidance.data.noising import Clean, Noisy

__all__ = ["Clean", "Digits", "Noisy", "digits"]
