"""Sizes of gradients, sample by sample."""

import torch
from torch import Tensor

from calib_guidance.backend.precision import power_of_two


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, ``(N, C, H, W)`` to ``(N, 1, 1, 1)``; squares of tiny numbers do not underflow."""
    unit = power_of_two(x.abs().amax(dim=(1, 2, 3), keepdim=True))
    return unit * (x / unit).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def match_norm(gradient: Tensor, reference: Tensor) -> Tensor:
    """``gradient`` with the norm of ``reference``, ``(N, C, H, W)`` each, sample by sample; zero where the gradient is zero.

    Examples:
        >>> match_norm(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 0.5)).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    size = rms(gradient)
    return rms(reference) * (gradient / torch.where(size > 0, size, 1.0))
