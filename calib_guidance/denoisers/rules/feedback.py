"""Feedback guidance (Koulischer et al. 2025, arXiv 2506.06085)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.rules.base import Level, Rule
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers

_LARGEST_LOG_P = 3.0


def offset_and_temperature(sigmas: np.ndarray, pi: float, t0: float, t1: float) -> tuple[float, float]:
    """δ and τ of N steps that start at ``sigmas`` ``(N,)``, the least noisy first; the source rounds both to 4 digits."""
    n = len(sigmas)
    offset = math.log(1.5 * (1 - pi)) / ((1 - t0) * n)
    variance = np.append(0.0, sigmas[:-1] ** 2 * (1 - (sigmas[:-1] / sigmas[1:]) ** 2))
    return offset, abs(0.2 * np.interp(t1 * n, np.arange(n), variance) * offset)


class FeedbackGuidance(Rule):
    """Feedback guidance: a weight that follows how well the sample fits its class.

    x̂0_u + λ·(x̂0_c − x̂0_u) with λ = p/(p − (1 − π)), p an estimate of p(y | x_t) from the steps so far. On x̂0.

    Guides strongly where the sample does not yet follow its class. Each sample has a log p, 0 at the start. A step from x to x',
    both in x = x0 + σ·ε, adds −τ/(2σ̃²)·(‖x' − μ_c‖² − ‖x' − μ_u‖²) + δ, with q = (σ'/σ)², μ = q·x + (1 − q)·x̂0 and
    σ̃² = σ'²·(1 − q). All evaluations of a step have the same λ.

    Args:
        pi: π, 0 < π < 1: the model of the data mixes p(x | y) with this weight and p(x) with the rest.
        t0, t1: the times, as fractions of the steps from the image on, that set δ and τ.
        max_weight: λ_max, greatest λ, above 1.
        weight: w; w − 1 is added to λ, always or inside ``sigma_interval``; 1 adds nothing.
        sigma_interval: ``[low, high]``, both excluded, where w − 1 is added.
        offset, temperature: δ and τ, in place of ``t0`` and ``t1``. τ is in units of squared distance over all pixels.

    Published for EDM2-512 with a stochastic sampler of 64 steps: the defaults, or ``t1: 0.492`` with ``weight: 2.6`` and
    ``sigma_interval: [0.48, 6.84]``.

    Examples:
        >>> from calib_guidance.diffusion import NoiseSchedule
        >>> rule, y = FeedbackGuidance(pi=0.5), torch.tensor([0])
        >>> state = rule.start(NoiseSchedule(np.full(4, 0.5)).levels, y)
        >>> level = Level(torch.zeros(1, 1, 1, 1), *torch.tensor([3.0, 0.0625, 15**0.5, 0.125]))
        >>> cond, uncond = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 1.0)
        >>> float(rule(cond, uncond, level, state))  # at the first step λ = 1/π
        3.0
    """

    looks_at_steps = True

    def __init__(
        self,
        pi: float = 0.999,
        t0: float = 0.556,
        t1: float = 0.429,
        max_weight: float = 10.0,
        weight: float = 1.0,
        sigma_interval: Sequence[float] | None = None,
        offset: float | None = None,
        temperature: float | None = None,
    ):
        super().__init__()
        check_numbers(above=0, below=1, pi=pi)
        check_numbers(least=0, below=1, t0=t0)
        check_numbers(least=0, most=1, t1=t1)
        check_numbers(weight=weight, max_weight=max_weight)
        if not weight < max_weight:
            raise ValueError(f"max_weight must be above weight ({weight}), got {max_weight}")
        largest = max_weight - weight + 1
        self.pi, self.t0, self.t1, self.weight = pi, t0, t1, weight
        self.low, self.high = sigma_interval or (-math.inf, math.inf)
        self.offset, self.temperature = offset, temperature
        self.smallest_log_p = math.log((1 - pi) * largest / (largest - 1))

    def start(self, levels: NoiseLevels, y: Tensor) -> dict[str, Tensor]:
        steps = levels.sigmas[: int(levels.executed.max()) + 1]
        by_time = offset_and_temperature(steps, self.pi, self.t0, self.t1)
        stated = (self.offset, self.temperature)
        offset, temperature = (b if s is None else s for b, s in zip(by_time, stated, strict=True))
        values = {"log_p": 0.0, "offset": offset, "temperature": temperature}
        return {k: torch.full((len(y),), v, dtype=torch.float64, device=y.device) for k, v in values.items()}

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        if "x" not in state:  # the first evaluation of a step
            sigma = level.sigma.expand(len(x0_cond), 1, 1, 1)
            x = level.x_t / level.alphas_cumprod.sqrt()
            kept = {"x": x, "cond": x0_cond, "uncond": x0_uncond, "sigma": sigma, "weight": self._weight(sigma, state)}
            state |= {name: value.detach() for name, value in kept.items()}
        return x0_uncond + state["weight"].to(x0_cond.dtype) * (x0_cond - x0_uncond)

    def _weight(self, sigma: Tensor, state: dict[str, Tensor]) -> Tensor:
        p = state["log_p"].exp()
        inside = (self.low < sigma) & (sigma < self.high)
        return (p / (p - (1 - self.pi))).view_as(sigma) + (self.weight - 1) * inside

    def after_step(self, level: Level, state: dict[str, Tensor]) -> None:
        if "x" not in state:  # outside the interval of guidance
            return
        x, cond, uncond, sigma = (state.pop(name).double() for name in ("x", "cond", "uncond", "sigma"))
        q = (level.sigma.double() / sigma) ** 2
        mean = q * x + (1 - q) * (cond + uncond) / 2
        # ‖x' − μ_c‖² − ‖x' − μ_u‖² = 2·⟨x' − (μ_c + μ_u)/2, μ_u − μ_c⟩
        moved = level.x_t.double() / level.alphas_cumprod.double().sqrt() - mean
        distance = 2 * (moved * (1 - q) * (uncond - cond)).sum(dim=(1, 2, 3))
        variance = (level.sigma.double() ** 2 * (1 - q)).flatten()
        log_p = state["log_p"] - state["temperature"] / (2 * variance) * distance + state["offset"]
        state["log_p"] = log_p.clamp(self.smallest_log_p, _LARGEST_LOG_P)
