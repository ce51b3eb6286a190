"""The forward process x_t = √ᾱ·x0 + √(1−ᾱ)·ε and the conversions between what networks predict."""

from typing import Literal, get_args

import numpy as np
from torch import Tensor

from calib_guidance.errors import check_choice

Parameterization = Literal["epsilon", "v", "x0"]


def diffuse(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Sample of q(x_t | x0) made with ``noise`` (Ho et al. 2020 Eq. 4)."""
    return alphas_cumprod.sqrt() * x0 + (1 - alphas_cumprod).sqrt() * noise


def network_target(prediction: Parameterization, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What a network is trained to predict: ε, x0, or v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022)."""
    if prediction == "v":
        return alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * x0
    return noise if prediction == "epsilon" else x0


def x0_coefficients(prediction: str, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b of x̂0 = a·x_t + b·output, for a network that predicts ε, v or x0.

    In float64, since 1/ᾱ − 1 loses most of its digits in float32 where there is little noise.
    """
    check_choice("prediction", prediction, get_args(Parameterization))
    if prediction == "epsilon":
        return np.sqrt(1 / alphas_cumprod), -np.sqrt(1 / alphas_cumprod - 1)
    if prediction == "x0":
        return np.zeros_like(alphas_cumprod), np.ones_like(alphas_cumprod)
    return np.sqrt(alphas_cumprod), -np.sqrt(1 - alphas_cumprod)
