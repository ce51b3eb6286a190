"""Combined predictions: classifier-free guidance and its relatives, as a denoiser around a denoiser."""

from collections.abc import Callable

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, DenoiserWrapper, Predict, Prediction, at_step
from calib_guidance.denoisers.negatives.base import Negative
from calib_guidance.denoisers.negatives.unconditional import Unconditional
from calib_guidance.denoisers.rules.base import Level, Rule
from calib_guidance.denoisers.rules.classifier_free import ClassifierFreeGuidance
from calib_guidance.diffusion.interval import Interval
from calib_guidance.diffusion.schedules import NoiseLevels


class Combination(DenoiserWrapper):
    """A rule applied to a denoiser's prediction and a negative one, alone or under classifier guidance.

    The variance is the conditional one's.

    Args:
        denoiser: predicts with the label.
        rule: how the two predictions are combined; classifier-free guidance by default.
        negative: what stands for the unconditional prediction; by default the same denoiser without label.
        interval: outside it the conditional prediction is used alone; everywhere by default.
        channels: how many of the first channels are combined, the others being the conditional prediction's; None combines
            all. DiT's published samples combine 3 of 4.

    Examples:
        >>> from calib_guidance.denoisers import ClassifierFreeGuidance, GaussianMixture
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01], class_conditional=True)
        >>> combined = Combination(model, ClassifierFreeGuidance(1.5))
        >>> x_t, y = torch.zeros(1, 1, 1, 1), torch.tensor([1])  # of pure noise, between both means
        >>> [round(float(denoiser(x_t, 999, y).x0), 2) for denoiser in (model, combined)]
        [2.0, 3.0]
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rule: Rule | None = None,
        negative: Negative | None = None,
        interval: Interval | None = None,
        channels: int | None = None,
    ):
        super().__init__(denoiser)
        if channels is not None and not 1 <= channels <= self.image_shape[0]:
            raise ValueError(f"channels must be 1 … {self.image_shape[0]}, or null for all, got {channels}")
        self.rule, self.negative = rule or ClassifierFreeGuidance(), negative or Unconditional()
        self.negative.check(denoiser)
        self.interval, self.channels = interval or Interval(), channels
        self.nfe = self.negative.nfe(denoiser)
        inner = [part for part in self.modules() if part is not self and isinstance(part, Combination)]
        if any(part.renoises or part.looks_at_steps for part in inner):
            raise ValueError("CFG++ and feedback guidance steer the step itself: make theirs the outermost combination")
        self.renoises, self.looks_at_steps = self.rule.renoises_with_negative, self.rule.looks_at_steps

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        if y is None:
            raise ValueError("a combination of predictions needs labels: give y, -1 for none")
        return _Trajectory(self, levels, y)


class _Trajectory:
    """A combination bound to levels and labels, with the state of its samples."""

    def __init__(self, combination: Combination, levels: NoiseLevels, y: Tensor):
        self.rule, shape = combination.rule, combination.image_shape
        self.conditional = combination.denoiser.prepare(levels, y)
        self.pair = combination.negative.prepare(combination.denoiser, levels, y)
        self.active = combination.interval.active(levels)
        self.actives = torch.as_tensor(self.active, device=y.device)
        progress = (levels.executed + 0.5) / (levels.executed.max() + 1)
        tables = (levels.times, levels.alphas_cumprod, levels.sigmas, progress)
        self.tables = [torch.as_tensor(table, device=y.device).float() for table in tables]
        self.channels = combination.channels or shape[0]
        self.combined = (torch.arange(shape[0], device=y.device) < self.channels).view(-1, 1, 1)
        self.state = self.rule.start(levels, y)
        self._start: Callable[[Tensor], None] | None = getattr(self.pair, "start", None)

    def start(self, x: Tensor) -> None:
        """Tell the negative x_T, which its random numbers follow from."""
        if self._start is not None:
            self._start(x)
            self._start = None

    def __call__(self, x_t: Tensor, i: int | Tensor) -> Prediction:
        self.start(x_t)  # where no sampler has
        if not isinstance(i, Tensor) and not self.active[i]:
            return self.conditional(x_t, i)
        cond, uncond = self.pair(x_t, i)
        level, k = self._level(x_t, i), self.channels
        x0 = self.rule(cond.x0[:, :k], uncond.x0[:, :k], level, self.state)
        x0 = x0 if k == x_t.shape[1] else torch.cat([x0, cond.x0[:, k:]], dim=1)
        if isinstance(i, Tensor) and self.state:
            raise ValueError(
                f"{type(self.rule).__name__} carries a state from step to step, and here samples are at different steps: take a "
                "rule without state, such as ClassifierFreeGuidance"
            )
        on = at_step(self.actives, i) & self.combined
        x0, residual = torch.where(on, x0, cond.x0), (x0 - uncond.x0) * on
        renoise = torch.where(on, uncond.x0, x0) if self.rule.renoises_with_negative else None
        return Prediction(x0, cond.variance, residual, renoise, cond.x0, uncond.x0)

    def after_step(self, x_next: Tensor, i: int) -> None:
        """Tell the rule where a step ended: at ``x_next``, level ``i``."""
        self.rule.after_step(self._level(x_next, i), self.state)

    def _level(self, x_t: Tensor, i: int | Tensor) -> Level:
        return Level(x_t[:, : self.channels], *(at_step(table, i) for table in self.tables))
