"""Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416)."""

from torch import Tensor

from calib_guidance.denoisers.rules.base import ConvertedRule, Representation, inner, norm, ratio
from calib_guidance.errors import check_numbers


def project(vector: Tensor, onto: Tensor, parallel: float) -> Tensor:
    """``vector`` with its part along ``onto`` multiplied by ``parallel``; ``(N, C, H, W)``, sample by sample."""
    along = (ratio(inner(vector, onto), inner(onto, onto)) * (parallel - 1)).to(vector.dtype)
    return vector + along * onto


def clip_norm(vector: Tensor, longest: float) -> Tensor:
    """``vector`` ``(N, C, H, W)``, shortened to the norm ``longest`` where it is longer, sample by sample."""
    return vector * (longest / norm(vector)).clamp(max=1).to(vector.dtype)


class APG(ConvertedRule):
    """Adaptive projected guidance (APG).

    c + (w − 1)·(s⊥ + η·s∥): the difference c − u with momentum, clipped, and with less of its part along c.

    In this order: m = c − u + β·m_before; s = m·min(1, r/‖m‖), where m itself is kept unclipped; s∥ is the projection of s on c,
    s⊥ the rest. (diffusers' default formulation adds w·(s⊥ + η·s∥) to u, another rule unless η = 1.)

    Args:
        weight: w; 1 is the conditional prediction.
        parallel: η; 1 with no momentum and no norm is classifier-free guidance.
        max_norm: r > 0; None clips nothing. It depends on the size of the samples.
        momentum: β, −1 < β < 1; negative values push away from earlier directions, 0 is none.
        representation: ``x0`` as in the source, ``epsilon`` or ``v``.

    The defaults are diffusers' for text to image.

    Examples:
        >>> import torch
        >>> cond, uncond = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).view(2, 1, 1, 1, 2)
        >>> rule = APG(weight=3.0, parallel=0.0, max_norm=None, momentum=0.0)
        >>> rule.combine(cond, uncond, {}).flatten()  # c + 2·(0, 1), the part of c − u = (1, 1) across c
        tensor([1., 2.])
    """

    def __init__(
        self,
        weight: float = 10.0,
        parallel: float = 0.0,
        max_norm: float | None = 10.0,
        momentum: float = -0.5,
        representation: Representation = "x0",
    ):
        super().__init__(weight, representation)
        check_numbers(parallel=parallel)
        check_numbers(above=0, null="no clipping", max_norm=max_norm)
        check_numbers(above=-1, below=1, momentum=momentum)
        self.parallel, self.max_norm, self.momentum = parallel, max_norm, momentum

    def combine(self, cond: Tensor, uncond: Tensor, state: dict[str, Tensor]) -> Tensor:
        step = cond - uncond
        if self.momentum:
            step = step + self.momentum * state["difference"] if state else step
            state["difference"] = step.detach()
        if self.max_norm is not None:
            step = clip_norm(step, self.max_norm)
        return cond + (self.weight - 1) * project(step, cond, self.parallel)
