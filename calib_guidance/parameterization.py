"""The forward process x_t = √ᾱ·x0 + √(1−ᾱ)·ε and the conversions between what networks predict.

``alphas_cumprod`` broadcasts against the images everywhere.
"""

from __future__ import annotations

from torch import Tensor

PREDICTIONS = ("epsilon", "v")


def diffuse(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Sample of q(x_t | x0) made with ``noise`` (Ho et al. 2020 Eq. 4)."""
    return alphas_cumprod.sqrt() * x0 + (1 - alphas_cumprod).sqrt() * noise


def x0_from_epsilon(x_t: Tensor, epsilon: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The clean image that ``x_t`` and its noise imply."""
    return (1 / alphas_cumprod).sqrt() * x_t - (1 / alphas_cumprod - 1).sqrt() * epsilon


def epsilon_from_x0(x_t: Tensor, x0: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noise that ``x_t`` and its clean image imply."""
    return ((1 / alphas_cumprod).sqrt() * x_t - x0) / (1 / alphas_cumprod - 1).sqrt()


def v_target(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022)."""
    return alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * x0


def x0_from_v(x_t: Tensor, v: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The clean image that ``x_t`` and v imply."""
    return alphas_cumprod.sqrt() * x_t - (1 - alphas_cumprod).sqrt() * v
