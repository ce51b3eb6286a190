"""Calibrated classifier guidance of diffusion models.

Implements *Elucidating the design space of classifier-guided diffusion generation* (arXiv 2310.11311) and *Enhancing
diffusion model guidance through calibration and regularization* (arXiv 2511.05844).
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("calib_guidance")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
