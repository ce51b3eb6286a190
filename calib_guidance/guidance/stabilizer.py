"""Steadier classifier gradients: averaged over steps, clipped, and projected."""

from typing import Any, final

from torch import Tensor

from calib_guidance.denoisers.rules.apg import clip_norm, project
from calib_guidance.errors import check_numbers


@final
class GradientStabilizer:
    """Averaging, clipping and projection of each sample's ∇S, in this order, before it is scaled.

    - An exponential moving average over the guided evaluations of a trajectory, m ← β·m + (1 − β)·∇S, used as m/(1 − β^k) after k
      of them (arXiv 2507.00687; the correction for the start at 0 is ours).
    - Clipping: g·min(1, r/‖g‖).
    - The part along what the classifier sees is multiplied by η (adaptive projected guidance, arXiv 2410.02416).

    Args:
        ema: β, 0 ≤ β < 1; 0 takes each gradient alone.
        max_norm: r > 0, in units of ∇S over all pixels; None clips nothing.
        parallel: η; 1 projects nothing.

    Examples:
        >>> gradient = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
        >>> GradientStabilizer(max_norm=1.0)(gradient, torch.zeros(1, 1, 1, 2), {}).flatten()
        tensor([0.6000, 0.8000])
    """

    def __init__(self, ema: float = 0.0, max_norm: float | None = None, parallel: float = 1.0):
        check_numbers(least=0, below=1, ema=ema)
        check_numbers(above=0, null="no clipping", max_norm=max_norm)
        self.ema, self.max_norm, self.parallel = ema, max_norm, parallel

    def __call__(self, gradient: Tensor, seen: Tensor, state: dict[str, Any]) -> Tensor:
        """The steadier ``(N, C, H, W)`` of ∇S at ``seen``; ``state`` is that of one trajectory, empty at its start."""
        if self.ema:
            mean, weight = (1 - self.ema) * gradient, 1 - self.ema
            if state:
                mean, weight = mean + self.ema * state["mean"], weight + self.ema * state["weight"]
            state |= {"mean": mean, "weight": weight}
            gradient = mean / weight  # the weights so far add up to 1 − β^k
        if self.max_norm is not None:
            gradient = clip_norm(gradient, self.max_norm)
        return gradient if self.parallel == 1 else project(gradient, seen.to(gradient.dtype), self.parallel)
