"""Guided predictions along one trajectory."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, prepare_clipped
from calib_guidance.diffusion.schedules import PURE_NOISE, NoiseLevels
from calib_guidance.guidance.base import Guidance, Guided, Plan
from calib_guidance.guidance.norms import match_norm

if TYPE_CHECKING:
    from calib_guidance.samplers.base import Sampler


def on_device(table: object, like: Tensor) -> Tensor:
    """A float64 table in the type of ``like``, on its device: uploaded once, before the loop."""
    return torch.as_tensor(table).to(like.dtype).to(like.device)


def plan_of(guidance: Guidance | None, levels: NoiseLevels) -> Plan:
    """The plan of guidance, or of none."""
    if guidance is not None:
        return guidance.plan(levels)
    none = np.zeros(len(levels.times))
    return Plan(none > 0, none, none, none > 0)


class Evaluate:
    """``evaluate(x, i)``: the guided prediction for ``x`` at level ``i``, bound to one trajectory.

    The score is folded into x̂0 as a shift by (1−ᾱ)/√ᾱ·s·∇S, the posterior mean under the guided score, unless the sampler
    reads it itself. Under ``guidance_scaling: ddpm_equivalent`` a score at x̂0 is not part of the step, and the loop adds it to
    the result.

    Args:
        sampler, denoiser, guidance, y: of the trajectory.
        x: ``(N, C, H, W)`` x_T.
        levels: of the evaluations; None takes those of the sampler.

    Attributes:
        moved: ``(N, C, H, W)`` what the loop added to x after the last step, or None.
        seen: what observers see of the current step: its first prediction and guidance.
    """

    def __init__(
        self,
        sampler: "Sampler",
        denoiser: Denoiser,
        guidance: Guidance | None,
        y: Tensor,
        x: Tensor,
        levels: NoiseLevels | None = None,
    ):
        scaling = sampler.scaling
        levels = sampler.evaluated(denoiser) if levels is None else levels
        self._bound = sampler, denoiser, guidance, y
        self.predict: Any = prepare_clipped(denoiser, levels, y, sampler.clip_denoised)
        getattr(self.predict, "start", lambda x: None)(x)
        self._guide = guidance and guidance.prepare(levels, y, denoiser.decode)
        plan = plan_of(guidance, levels)
        self._fold = not (sampler.takes_score or plan.moves_sample)
        self._scaled = [scaling is not None and bool(at_x0) for at_x0 in plan.at_x0]
        # 1 − ᾱ = (√ᾱ·σ)². At pure noise the true score of a class is 0, and a classifier's would be multiplied by infinity.
        sigma = np.where(levels.sigmas > PURE_NOISE / 2, 0, levels.sigmas)
        self._to_x0 = on_device(np.sqrt(levels.alphas_cumprod) * sigma**2, x)
        self._added = self._to_x0 if scaling is None else on_device(scaling.added(levels), x)
        self.moved: Tensor | None = None
        self.seen: Guided | None = None
        self._move: Tensor | None = None

    def at(self, sigma: float, x: Tensor, rows: slice = slice(None)) -> "Evaluate":
        """The same at a level that is not one of the sampler's, for some of the samples."""
        sampler, denoiser, guidance, y = self._bound
        rows_y: Any = None if y is None else y[rows]
        return Evaluate(sampler, denoiser, guidance, rows_y, x, denoiser.schedule.at_sigmas([sigma]))

    def __call__(self, x: Tensor, i: int) -> Guided:
        guided = self.unguided(x, i) if self._guide is None else self._guide(self.predict, x, i)
        self._see(guided)
        self._move = guided.move
        if guided.score is None or not self._fold:
            return guided
        if self._scaled[i]:
            self._move = self._added[i] * guided.score
            return guided._replace(score=None)
        return guided._replace(prediction=guided.predicted().shifted(self._to_x0[i] * guided.score), score=None)

    def both(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The guided x̂0, and that whose ε is the noise of the step: the same unless CFG++ says otherwise."""
        prediction = self(x, i).predicted()
        return prediction.x0, prediction.x0 if prediction.x0_renoise is None else prediction.x0_renoise

    def unguided(self, x: Tensor, i: int) -> Guided:
        """The prediction alone."""
        guided = Guided(self.predict(x, i))
        self._see(guided)
        return guided

    def _see(self, guided: Guided) -> None:
        if self.seen is None:
            self.seen = guided
        elif self.seen.prediction is None:
            self.seen = self.seen._replace(prediction=guided.prediction)

    def finish(self, mean: Tensor, i: int) -> tuple[Tensor, Guided]:
        """``mean`` of step ``i`` with what guidance adds to it, and what observers are told."""
        self.moved = self._move
        seen, self.seen, self._move = self.seen or Guided(None), None, None
        return (mean if self.moved is None else mean + self.moved), seen


def sample_move(x: Tensor, i: int, k: int, num_steps: int, evaluate: Evaluate, c: SimpleNamespace) -> Tensor | None:
    """What ``apply_to: sample`` adds to X = x0 + σ·ε at step ``i`` (arXiv 2310.11311, Algorithm 2), with the gradient at level
    ``k``; None where guidance is off.
    """
    score = evaluate(c.to_vp[k] * x, k).score
    if score is None:
        return None
    strength = (c.scale[i] * ((i + 2) / (num_steps + 1))).clamp(min=1e-5) + c.scale[i] * c.sine[i]
    return strength * match_norm(score, x)
