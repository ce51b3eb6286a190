"""What guidance adds over a step, however long it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from calib_guidance.denoisers.base import Predict
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Guide, GuidedPrediction
from calib_guidance.samplers.base import on_device

GUIDANCE_SCALINGS = ("ddpm_equivalent", "score", "lie_trotter", "strang")
_DATA_STD = 0.5  # what EDM takes that of images to be, pixel by pixel


def choose_guidance_scaling(
    term: str | None, data_std: float | None, memory: float, known: Sequence[str]
) -> tuple[str, float]:
    """The guidance term and d, where None leaves them to the sampler.

    The reverse SDE (p = 2) has ``ddpm_equivalent`` with d = 0.5: d is in its steps only as far as k² changes within
    one, which is by no
    more than about the ratio of the σ it leads between, and vanishes with short steps. An ODE keeps more of what is added at high
    noise the larger d is, at any number of steps: what the rule adds there at σ ≫ d is proportional to d, and 0.5, right for
    pixels that know nothing of each other, is a third of the digits' 1.6. No number is right for all data, so that
    ``ddpm_equivalent``
    of an ODE has none, and ``score``, which needs none, is the default.

    Args:
        term, data_std: as given.
        memory: p of :func:`ancestral_shift`.
        known: terms that the sampler has.

    Raises:
        ValueError: an unknown term, ``data_std`` out of range, or missing where it decides.
    """
    term = term or ("ddpm_equivalent" if memory >= 2 else "score")
    if term not in known:
        raise ValueError(f"guidance_scaling: unknown {term!r}; known: {', '.join(known)}")
    if data_std is not None and not 0 < data_std < math.inf:
        raise ValueError(f"data_std must be a finite number above 0, got {data_std}")
    if term == "ddpm_equivalent" and data_std is None and memory < 2:
        raise ValueError(
            "guidance_scaling: ddpm_equivalent carries guidance from DDPM over to an ODE in proportion to the data's "
            "standard deviation "
            "along what guidance changes: set data_std (1.6 for the digits), guidance_scaling to score, or take an "
            "SDE, to which it "
            "hardly matters"
        )
    return term, data_std or _DATA_STD


def ancestral_shift(sigma: np.ndarray, sigma_next: np.ndarray, data_std: float, memory: float) -> np.ndarray:
    """What a step shall add to x/√ᾱ, per unit of gradient, so that it leaves in the sample what short DDPM steps leave.

    In X = x/√ᾱ a DDPM step from σ to σ − dσ adds 2·(1−ᾱ)/√ᾱ·s·∇S·dσ/σ, whatever the number of steps. What becomes of it until
    the end is linear response, closed for Gaussian data of standard deviation d, where x̂0 moves by k² = d²/(d² + σ²) of X: of
    a displacement at σ, DDPM leaves k², the probability-flow ODE k. So a step from σ to σ' leaves, at a constant gradient,

        I = ∫_σ'^σ 2·(1−ᾱ)/√ᾱ·k² dσ/σ = ∫_σ'^σ 2d²·σ / ((d² + σ²)·√(1 + σ²)) dσ,

    and shall add I over what the sampler itself leaves of a displacement at σ', which is k'^p: p = 1 for the ODE, 2 for the
    reverse SDE, 1 + η² for DDIM. Many short steps of the SDE add what they add without this.

    Args:
        sigma, sigma_next: ``(N,)`` noise levels σ = √(1/ᾱ − 1) before and after each step.
        data_std: d.
        memory: p.

    Returns:
        ``(N,)`` float64.
    """
    if data_std == 1:

        def antiderivative(sigma: np.ndarray) -> np.ndarray:
            return -1 / np.sqrt(1 + sigma**2)
    elif data_std < 1:
        q = math.sqrt(1 - data_std**2)

        def antiderivative(sigma: np.ndarray) -> np.ndarray:
            # √(1 + σ²) − q, without cancellation.
            root = np.sqrt(1 + sigma**2)
            return np.log((sigma**2 + data_std**2) / (root + q) ** 2) / (2 * q)
    else:
        q = math.sqrt(data_std**2 - 1)

        def antiderivative(sigma: np.ndarray) -> np.ndarray:
            return np.arctan(np.sqrt(1 + sigma**2) / q) / q

    left = 2 * data_std**2 * (antiderivative(sigma) - antiderivative(sigma_next))
    return left * (1 + (sigma_next / data_std) ** 2) ** (memory / 2)


def kick(sigma: np.ndarray, sigma_next: np.ndarray) -> np.ndarray:
    """What the guidance term alone adds to x/√ᾱ from σ to σ', per unit of gradient: ∫ (1−ᾱ)/√ᾱ dσ/σ, closed; ``(N,)``."""
    return np.sqrt(1 + sigma**2) - np.sqrt(1 + sigma_next**2)


class Begun(NamedTuple):
    """Where the solver's part of a step starts.

    Attributes:
        guided: prediction and guidance.
        x: ``(N, C, H, W)`` where it starts.
        x0: ``(N, C, H, W)`` x̂0 there, with the guidance that belongs to it.
        arrived: ``(N, C, H, W)`` x̂0 where the solver's own part of the step before ended, from which ``x`` differs by what
            guidance added since.
    """

    guided: GuidedPrediction
    x: Tensor
    x0: Tensor
    arrived: Tensor


class GuidanceScaling:
    """The guidance of each step, of a sampler whose steps lead from level to level and from the least noisy one to x̂0.

    Args:
        term: one of ``GUIDANCE_SCALINGS``, see :class:`~calib_guidance.samplers.multistep.Multistep`.
        levels: of the steps.
        data_std, memory: see :func:`ancestral_shift`.
        like: where it is computed.
    """

    def __init__(self, term: str, levels: NoiseLevels, data_std: float, memory: float, like: Tensor):
        sigma, alpha = levels.sigmas, np.sqrt(levels.alphas_cumprod)
        sigma_next = np.append(0.0, sigma[:-1])
        self.ancestral, self.split = term == "ddpm_equivalent", None
        # 1 − ᾱ = (√ᾱ·σ)²
        self.to_x0, self.noise = on_device(alpha * sigma**2, like), on_device(sigma, like)
        shift = ancestral_shift(sigma, sigma_next, data_std, memory)
        self.to_x = on_device(np.append(1.0, alpha[:-1]) * shift, like)
        # How far x̂0 moves with x: k²/√ᾱ.
        self.response = on_device(data_std**2 / (data_std**2 + sigma**2) / alpha, like)
        self._added: Tensor | None = None
        if term == "lie_trotter":
            self.split = on_device(memory * alpha * kick(sigma, sigma_next), like)
        elif term == "strang":
            # The second half of a step and the first half of the next share the gradient.
            middle = np.append(np.sqrt(sigma * sigma_next), sigma[-1])
            self.split = on_device(memory * alpha * kick(middle[1:], middle[:-1]), like)

    def begin(self, predict: Predict, guide: Guide, x: Tensor, i: int) -> Begun:
        """Guidance at level ``i``, and what the solver does step ``i`` with."""
        guided = guide(predict, x, i)
        if self.split is None:
            x0 = self._x0(guided, i)
            return Begun(guided, x, x0, x0 if self._added is None else x0 - self.response[i] * self._added)
        arrived = guided.prediction.x0
        if guided.gradient is None:
            return Begun(guided, x, arrived, arrived)
        x = x + self.split[i] * guided.gradient
        return Begun(guided, x, predict(x, i).x0, arrived)

    def of_step(self, guided: GuidedPrediction) -> bool:
        """Whether the gradient is added to x' over the step as a whole, not to x̂0."""
        return self.ancestral and guided.at_x0 and guided.gradient is not None

    def _x0(self, guided: GuidedPrediction, i: int) -> Tensor:
        x0 = guided.prediction.x0
        if guided.gradient is not None and not self.of_step(guided):
            x0 = x0 + self.to_x0[i] * guided.gradient
        if guided.noise_shift is not None:
            x0 = x0 + self.noise[i] * guided.noise_shift
        return x0

    def end(self, guided: GuidedPrediction, i: int) -> Tensor | float:
        """What is added to x' at the end of step ``i``."""
        self._added = self.to_x[i] * guided.gradient if self.of_step(guided) else None
        return 0.0 if self._added is None else self._added
