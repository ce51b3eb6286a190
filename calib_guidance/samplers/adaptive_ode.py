"""The ODE of flow models, in steps of its own choice."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.paths import PathName, shifted_time
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import Transition
from calib_guidance.samplers.dormand_prince import dormand_prince
from calib_guidance.samplers.encoding import FlowEncoder
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.flow import IMAGE


class AdaptiveODE(FlowEncoder):
    """The ODE dx/dτ = v of a flow model by Dormand and Prince's method (dopri5), SiT's default; :meth:`encode` is its reverse.

    Its steps keep the estimated error below atol + rtol·|x| (:mod:`calib_guidance.samplers.dormand_prince`), each evaluation
    guided at its own τ.

    Args:
        num_steps: parts that the way is solved in; observers look after each.
        rtol, atol: tolerances.
        together: whether all samples of a batch take the same steps, as in SiT: fewer calls of the network, but a sample
            depends a little on the others; by default each is solved by itself.

    See :class:`~calib_guidance.samplers.flow.FlowSampler` for the others.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> image = torch.full((1, 1, 1, 1), 3.1)  # one standard deviation above the mean
        >>> round(float(AdaptiveODE(rtol=1e-6).encode(model, image)), 2)  # as is its noise
        1.0
    """

    def __init__(
        self,
        num_steps: int = 1,
        path: PathName = "linear",
        shift: float = 1.0,
        start: float = 1.0,
        end: float = 0.0,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        together: bool = False,
    ):
        check_numbers(above=0, rtol=rtol, atol=atol)
        super().__init__(num_steps, path, shift, start, end)
        self.rtol, self.atol, self.together = rtol, atol, together

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        super().check(denoiser, guidance)
        stabilizers = [getattr(part, "stabilizer", None) for part in (guidance.parts() if guidance else ())]
        if denoiser.looks_at_steps or any(each is not None and each.ema for each in stabilizers):
            raise ValueError(
                "AdaptiveODE chooses its own steps, and this guidance remembers the step before: take FlowODE"
            )

    def nfe(self, denoiser: Denoiser) -> int:
        """The least: in each part one step, and the choice of its size."""
        return 9 * self.num_steps * denoiser.nfe

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        tau, c = self.at(levels)
        following = np.append(shifted_time(np.array(self.end), self.shift), tau[:-1])
        return {"to_vp": 1 / c.scale, "alpha": c.alpha, "sigma": c.sigma, "tau": tau, "following": following}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        evaluate(c.to_vp[i] * x, i)  # what observers see
        return Transition(self.advance(x, float(c.tau[i]), float(c.following[i]), evaluate))

    def advance(self, x: Tensor, start: float, end: float, evaluate: Evaluate) -> Tensor:
        def solved(rows: slice) -> Tensor:
            def slope(tau: float, x: Tensor) -> Tensor:
                return self.velocity_at(tau, x, evaluate, rows)

            return dormand_prince(slope, max(start, IMAGE), end, x[rows], self.rtol, self.atol)

        return torch.cat([solved(rows) for rows in ([slice(None)] if self.together else map(_only, range(len(x))))])


def _only(n: int) -> slice:
    return slice(n, n + 1)
