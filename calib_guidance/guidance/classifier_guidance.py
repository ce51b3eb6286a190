"""Classifier guidance (Dhariwal & Nichol 2021; arXiv 2310.11311; arXiv 2511.05844)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.base import Predict
from calib_guidance.guidance.base import Guidance, Guide, GuidedPrediction
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.scores.base import Score
from calib_guidance.scores.log_prob import TemperedLogProb

AT = ("denoised", "x_t", "through_denoiser")
ENTERS = ("score", "noise_difference")


def match_norm(gradient: Tensor, reference: Tensor) -> Tensor:
    """``gradient`` with the norm of ``reference``, sample by sample; zero where the gradient is zero.

    Args:
        gradient, reference: ``(N, C, H, W)``.
    """
    norm = gradient.flatten(1).norm(dim=1)
    ratio = reference.flatten(1).norm(dim=1) / norm
    return gradient * torch.where(norm > 0, ratio, 0.0).view(-1, 1, 1, 1)


class ClassifierGuidance(Guidance):
    """Climbs a score of a classifier.

    Args:
        classifier: frozen here; its input gradients are what guides.
        score: what to climb; plain log-probability by default.
        scale: s; 0 switches guidance off, and the classifier is then never run.
        at: what the classifier sees. ``denoised``: x̂0 (better calibrated, the default), with the gradient taken there and not
            carried through the diffusion network; ``x_t``: the noisy sample and t, for noise-aware classifiers;
            ``through_denoiser``: x̂0, with the gradient carried back to x_t (Bansal et al. 2023), which costs a backward pass of
            the diffusion network.
        schedule: sine factor and interval; constant everywhere by default.
        enters: ``score`` adds to the score of the diffusion model, as the sampler's algorithm says; ``noise_difference`` gives
            the gradient the norm of classifier-free guidance's noise difference and adds it there (arXiv 2310.11311,
            Algorithm 3), with strength scale·(1 + γ·sin(π·i/N)).

    Raises:
        ValueError: unknown names or a scale that is not a finite number.
    """

    def __init__(
        self,
        classifier: Classifier,
        score: Score | None = None,
        scale: float = 1.0,
        at: str = "denoised",
        schedule: GuidanceSchedule | None = None,
        enters: str = "score",
    ):
        super().__init__()
        if at not in AT:
            raise ValueError(f"at: unknown {at!r}; known: {', '.join(AT)}")
        if enters not in ENTERS:
            raise ValueError(f"enters: unknown {enters!r}; known: {', '.join(ENTERS)}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale}")
        self.classifier, self.score = classifier.freeze(), score or TemperedLogProb()
        self.scale, self.at, self.enters = scale, at, enters
        self.schedule = schedule or GuidanceSchedule()
        self.group_size = self.score.group_size

    def parts(self) -> Sequence[Guidance]:
        return [self]

    def trajectory(self, timesteps: Sequence[int], num_train_steps: int, y: Tensor) -> Guide | None:
        active = [self.scale != 0 and self.schedule.is_active(t) for t in timesteps]
        if not any(active):
            return None
        table = torch.tensor(list(timesteps), device=y.device)[:, None].expand(-1, len(y))
        times = [t / (num_train_steps - 1) for t in timesteps]

        def guide(predict: Predict, x_t: Tensor, i: int) -> GuidedPrediction:
            if not active[i]:
                return GuidedPrediction(predict(x_t, i))
            with torch.enable_grad():
                if self.at == "through_denoiser":
                    source = x_t.detach().requires_grad_()
                    prediction = predict(source, i)
                    shown = prediction.x0
                else:
                    with torch.no_grad():
                        prediction = predict(x_t, i)
                    source = shown = (prediction.x0 if self.at == "denoised" else x_t).detach().requires_grad_()
                logits = self.classifier(shown, table[i])
                value = self.score(logits, y, times[i]).sum()
                (gradient,) = torch.autograd.grad(value, source)
            gradient, logits = gradient.to(x_t.dtype), logits.detach()
            prediction = type(prediction)(*(None if p is None else p.detach() for p in prediction))
            sine = self.schedule.sine(i, len(active))
            if self.enters == "noise_difference" and prediction.noise_difference is None:
                return GuidedPrediction(
                    prediction, logits=logits, step_gradient=gradient
                )  # classifier-free is off here
            if self.enters == "score":
                return GuidedPrediction(prediction, self.scale * gradient, None, sine, logits, gradient)
            shift = self.scale * (1 + sine) * match_norm(gradient, prediction.noise_difference)
            return GuidedPrediction(prediction, None, shift, 0.0, logits, gradient)

        return guide


class SwitchedGuidance(Guidance):
    """One guidance from pure noise down to a step, another from there to the image (arXiv 2310.11311, Appendix A.1).

    Each has its own classifier, input and score, so that an off-the-shelf classifier on x̂0 can hand over to a noise-aware one
    on x_t.

    Args:
        early: guides while t > ``switch_at``.
        late: guides from ``switch_at`` down.
        switch_at: step of the full process (0 … 999); 200 is step 50 of 250, the paper's choice.
    """

    def __init__(self, early: ClassifierGuidance, late: ClassifierGuidance, switch_at: int = 200):
        super().__init__()
        self.early, self.late, self.switch_at = early, late, switch_at
        sizes = {early.group_size, late.group_size} - {1}
        if len(sizes) > 1:
            raise ValueError(f"early and late guidance tilt over groups of different sizes: {sorted(sizes)}")
        self.group_size = max(early.group_size, late.group_size)

    def parts(self) -> Sequence[Guidance]:
        return [self.early, self.late]

    def trajectory(self, timesteps: Sequence[int], num_train_steps: int, y: Tensor) -> Guide | None:
        early, late = (part.trajectory(timesteps, num_train_steps, y) for part in (self.early, self.late))
        chosen = [early if t > self.switch_at else late for t in timesteps]
        if not any(chosen):
            return None

        def guide(predict: Predict, x_t: Tensor, i: int) -> GuidedPrediction:
            return chosen[i](predict, x_t, i) if chosen[i] else GuidedPrediction(predict(x_t, i))

        return guide
