"""UniPC with guidance."""

from types import SimpleNamespace

import numpy as np
from torch import Tensor

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.samplers.base import Transition
from calib_guidance.samplers.evaluate import Evaluate
from calib_guidance.samplers.multistep import Multistep, on_own_path


def corrector_weights(h: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of x̂0_before − x̂0 and x̂0' − x̂0 in the corrector of each step, ``(N,)`` each; none at the last, infinite one.

    They are UniC's, of B(h) = e^(−h) − 1: with them the step is exact where x̂0 is a polynomial in λ of the order's degree.
    """
    before, after = np.zeros(len(h)), np.zeros(len(h))
    second = ratio > 0
    after[1:] = 0.5
    h, r = h[second], 1 / ratio[second]
    # Means of u and u², u from 0 to 1 over the step, under the weight e^((u−1)h) with which x̂0 enters x'.
    b = np.expm1(-h)
    mean = (-b / h - 1) / b
    square = 2 * ((-b / h - 1) / -h - 0.5) / b
    # They are ρ_1 + ρ_2 and −r·ρ_1 + ρ_2, for differences of x̂0 over their distance in u, −r and 1.
    share = (mean - square) / (1 + r)
    before[second], after[second] = -share / r, mean - share
    return before, after


class UniPC(Multistep):
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) on x̂0 with B(h) = e^(−h) − 1.

    Each step predicts x' as DPM-Solver++ 2M does, which is UniP-2. What x̂0' is there then corrects the same step, without
    another evaluation, before the next one starts from it (UniC): with r = h_before/h,

        x' = √(1−ᾱ')/√(1−ᾱ)·x + √ᾱ'·(1 − e^(−h))·(x̂0 + ρ_1·(x̂0_before − x̂0)/(−r) + ρ_2·(x̂0' − x̂0)).

    The last step, which ends in x̂0, has order 1 and no corrector. The denoiser, guidance and observers see the predicted x. The
    corrector raises the order by one.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(UniPC(steps=20)(model, noise, torch.tensor([0]))))
        3
    """

    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        from_before, from_after = corrector_weights(*self.lengths(levels))
        return super().coefficients(levels) | {"from_before": from_before, "from_after": from_after}

    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        x0, last, difference = evaluate(x, i).predicted().x0, c.state.get("x0"), c.state.get("difference")
        if last is not None:
            k, here = i + 1, on_own_path(x0, i, evaluate, c)
            d = last if difference is None else last + c.from_before[k] * difference
            d = d + c.from_after[k] * (here - last)
            x = c.to_x[k] * c.state["start"] + c.to_d[k] * d
            x = x if evaluate.moved is None else x + evaluate.moved
            difference = c.state["difference"] = last - here
        c.state |= {"start": x, "x0": x0}
        d = x0 if difference is None else x0 - c.slope[i] * difference
        return Transition(c.to_x[i] * x + c.to_d[i] * d)
