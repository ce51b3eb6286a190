"""UniPC with guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.guidance.base import Guidance
from calib_guidance.samplers.base import Observer, StepRecord, on_device, start
from calib_guidance.samplers.guidance_scaling import GuidanceScaling
from calib_guidance.samplers.multistep import Multistep, StepSizes


def corrector_weights(sizes: StepSizes) -> tuple[np.ndarray, np.ndarray]:
    """Weights of x̂0_before − x̂0 and x̂0' − x̂0 in the corrector of each step, ``(N,)`` each; none at the last, infinite one.

    They are UniC's, of B(h) = e^(−h) − 1: with them the step is exact where x̂0 is a polynomial in λ of the order's degree.
    """
    before, after = np.zeros(len(sizes.h)), np.zeros(len(sizes.h))
    second = sizes.before > 0
    after[1:] = 0.5
    h, r = sizes.h[second], 1 / sizes.before[second]
    # Means of u and u², u from 0 to 1 over the step, under the weight e^((u−1)h) with which x̂0 enters x'.
    b = np.expm1(-h)
    mean = (-b / h - 1) / b
    square = 2 * ((-b / h - 1) / -h - 0.5) / b
    # They are ρ_1 + ρ_2 and −r·ρ_1 + ρ_2, for differences of x̂0 over their distance in u, −r and 1.
    share = (mean - square) / (1 + r)
    before[second], after[second] = -share / r, mean - share
    return before, after


class UniPC(Multistep):
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) on x̂0 with B(h) = e^(−h) − 1, guided as the guidance term says.

    Each step predicts x' as DPM-Solver++ 2M does, which is UniP-2. What x̂0' is there then corrects the same step, without
    another evaluation, before the next one starts from it (UniC): with r = h_before/h,

        x' = √(1−ᾱ')/√(1−ᾱ)·x + √ᾱ'·(1 − e^(−h))·(x̂0 + ρ_1·(x̂0_before − x̂0)/(−r) + ρ_2·(x̂0' − x̂0)).

    The last step, which ends in x̂0, has order 1 and no corrector. The denoiser, guidance and observers see the predicted x.
    Operator splitting is left to DPM-Solver++, since the corrector takes x̂0 from where the predictor ended.

    Args:
        steps, spacing, sigma_min, sigma_max, order, clip_denoised, guidance_scaling, data_std: see
            :class:`~calib_guidance.samplers.multistep.Multistep`. The corrector raises the order by one.
    """

    guidance_scalings = ("ddpm_equivalent", "score")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: Noise,
        y: Tensor,
        guidance: Guidance | None = None,
        observers: Sequence[Observer] = (),
    ) -> Tensor:
        x = noise()
        levels = self.levels(denoiser)
        num_steps, times = len(levels.times), levels.times.tolist()
        predict, guide = start(denoiser, guidance, levels, y, self.clip_denoised)
        sizes = self.step_sizes(levels)
        term = GuidanceScaling(self.guidance_scaling, levels, self.data_std, self.memory, x)
        remaining = sizes.sigma_next / sizes.sigma  # e^(−h)
        to_x = on_device(sizes.alpha_next / sizes.alpha * remaining, x)
        to_d, slope = on_device(sizes.alpha_next * (1 - remaining), x), on_device(sizes.before / 2, x)
        from_before, from_after = (on_device(weights, x) for weights in corrector_weights(sizes))

        start_of_step, difference, added, last = x, 0.0, 0.0, None
        for i in reversed(range(num_steps)):
            guided, corrected, x0, arrived = term.begin(predict, guide, x, i)
            if last is not None:
                k = i + 1
                d = last + from_before[k] * difference + from_after[k] * (arrived - last)
                corrected = to_x[k] * start_of_step + to_d[k] * d + added
                difference = last - arrived
            added = term.end(guided, i)
            x_next = to_x[i] * corrected + to_d[i] * (x0 - slope[i] * difference) + added
            for observe in observers:
                observe(StepRecord(i, num_steps, times[i], y, x, guided, x_next))
            x, start_of_step, last = x_next, corrected, x0
        return x
