"""Paths of flow models: x_τ = α·x0 + σ·ε, from the image at τ = 0 to noise at τ = 1 (Ma et al. 2024, arXiv 2401.08740)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from calib_guidance.errors import check_choice

PathName = Literal["linear", "gvp", "vp"]
TimeDirection = Literal["noise_to_data", "data_to_noise"]
_BETA_MIN, _BETA_MAX = 0.1, 20.0  # of the VP path


class PathCoefficients(NamedTuple):
    """α, σ and their derivatives in τ, of the shape of τ, float64."""

    alpha: np.ndarray
    sigma: np.ndarray
    d_alpha: np.ndarray
    d_sigma: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """σ/α, the noise level of x/α = x0 + (σ/α)·ε; infinite at pure noise."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def scale(self) -> np.ndarray:
        """√(α² + σ²): x_τ = scale·(√ᾱ·x0 + √(1−ᾱ)·ε)."""
        return np.hypot(self.alpha, self.sigma)


def path_coefficients(path: PathName, tau: np.ndarray | float) -> PathCoefficients:
    """Coefficients of a path at ``tau`` in [0, 1]. σ' of the VP path is infinite at τ = 0."""
    check_choice("path", path, get_args(PathName))
    tau = np.asarray(tau, np.float64)
    if path == "linear":
        return PathCoefficients(1 - tau, tau, -np.ones_like(tau), np.ones_like(tau))
    if path == "gvp":
        angle = np.pi / 2 * tau
        cos, sin = np.cos(angle), np.sin(angle)
        return PathCoefficients(cos, sin, -np.pi / 2 * sin, np.pi / 2 * cos)
    log_alpha = -(tau**2) * (_BETA_MAX - _BETA_MIN) / 4 - tau * _BETA_MIN / 2
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    d_alpha = -alpha * (_BETA_MIN + tau * (_BETA_MAX - _BETA_MIN)) / 2
    with np.errstate(divide="ignore"):
        return PathCoefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def path_time(path: PathName, alphas_cumprod: np.ndarray | float) -> np.ndarray:
    """τ where σ/α is that of ᾱ, at most 1; ᾱ = 0 is τ = 1."""
    check_choice("path", path, get_args(PathName))
    abar = np.asarray(alphas_cumprod, np.float64)
    signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
    if path == "linear":
        return noise / (signal + noise)
    if path == "gvp":
        return 2 / np.pi * np.arctan2(noise, signal)
    slope = (_BETA_MAX - _BETA_MIN) / 2
    log_signal = np.log(np.maximum(signal, 1e-300))
    return np.minimum((np.sqrt(_BETA_MIN**2 / 4 - 2 * slope * log_signal) - _BETA_MIN / 2) / slope, 1)


def network_time(tau: np.ndarray, direction: TimeDirection) -> np.ndarray:
    """t of a model whose t runs in ``direction``."""
    check_choice("time_direction", direction, get_args(TimeDirection))
    return tau if direction == "data_to_noise" else 1 - tau


def shifted_time(tau: np.ndarray, shift: float) -> np.ndarray:
    """s·τ/(1 + (s − 1)·τ), which multiplies every σ/α of the linear path by s (Esser et al. 2024)."""
    return shift * tau / (1 + (shift - 1) * tau)
