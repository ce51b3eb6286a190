"""Classifier guidance (Dhariwal & Nichol 2021; arXiv 2310.11311; arXiv 2511.05844)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.base import Predict
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Decode, Guidance, Guide, GuidedPrediction, identity
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.scores.base import Score
from calib_guidance.scores.log_prob import TemperedLogProb

CLASSIFIER_INPUTS = ("x0", "x_t", "x_t_normalized")
APPLY_TO = ("score", "cfg_residual", "sample")


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, ``(N, C, H, W)`` to ``(N, 1, 1, 1)``."""
    return x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


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
        classifier_input: what the classifier sees. ``x0``: the denoised image (better calibrated, the default), with the gradient
            taken there and not carried through the diffusion network; ``x_t``: the noisy sample and t, for noise-aware
            classifiers; ``x_t_normalized``: x_t/√ᾱ over its root mean square where that exceeds 1 (arXiv 2310.11311,
            Algorithm 2), with the gradient taken there.
        backprop_through_denoiser: with ``x0``, carry the gradient back to x_t (Bansal et al. 2023), which costs a backward pass
            of the diffusion network.
        schedule: sine factor and interval; constant everywhere by default.
        apply_to: ``score`` adds to the score of the diffusion model, as the sampler's algorithm says; ``cfg_residual`` gives
            the gradient the norm of classifier-free guidance's noise difference and adds it there (arXiv 2310.11311,
            Algorithm 3), with strength scale·(1 + γ·sin(π·progress)); ``sample`` moves the sample itself along the gradient,
            whose size is left out (Algorithm 2), which the Heun sampler does.
        decoder: what makes images of x̂0 for the classifier, in place of the denoiser's own decoder: a cheaper one for latent
            models. Frozen here.

    Raises:
        ValueError: unknown names or a scale that is not a finite number.
    """

    def __init__(
        self,
        classifier: Classifier,
        score: Score | None = None,
        scale: float = 1.0,
        classifier_input: str = "x0",
        backprop_through_denoiser: bool = False,
        schedule: GuidanceSchedule | None = None,
        apply_to: str = "score",
        decoder: nn.Module | None = None,
    ):
        super().__init__()
        if classifier_input not in CLASSIFIER_INPUTS:
            known = ", ".join(CLASSIFIER_INPUTS)
            raise ValueError(f"classifier_input must be one of {known}, got {classifier_input!r}")
        if backprop_through_denoiser and classifier_input != "x0":
            raise ValueError(
                f"backprop_through_denoiser needs classifier_input: x0, got {classifier_input}: set one of the two"
            )
        if apply_to not in APPLY_TO:
            raise ValueError(f"apply_to must be one of {', '.join(APPLY_TO)}, got {apply_to!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale}")
        self.classifier, self.score = classifier.freeze(), score or TemperedLogProb()
        self.scale, self.classifier_input, self.apply_to = scale, classifier_input, apply_to
        self.backprop_through_denoiser = backprop_through_denoiser
        self.schedule = schedule or GuidanceSchedule()
        self.decoder = decoder and decoder.eval().requires_grad_(False)
        self.group_size = self.score.group_size

    def parts(self) -> Sequence[Guidance]:
        return [self]

    def active(self, levels: NoiseLevels) -> list[bool]:
        return [self.scale != 0 and on for on in self.schedule.active(levels)]

    def trajectory(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide | None:
        active = self.active(levels)
        if not any(active):
            return None
        # Classifiers were trained on whole steps.
        table = torch.tensor(np.rint(levels.times), device=y.device).long()[:, None].expand(-1, len(y))
        fractions = (levels.times / (levels.num_train_steps - 1)).tolist()
        sines = [self.schedule.sine(progress) for progress in levels.progress.tolist()]
        to_ve = (1 / np.sqrt(levels.alphas_cumprod)).tolist()
        decode = self.decoder or decode
        # One in half precision takes float32 all the same, in which its gradient then is.
        dtype = next((p.dtype for p in self.classifier.parameters() if p.is_floating_point()), None)
        dtype = dtype and torch.promote_types(dtype, torch.float32)

        def guide(predict: Predict, x_t: Tensor, i: int, gradient_only: bool = False) -> GuidedPrediction:
            if not active[i]:
                return GuidedPrediction(None if gradient_only else predict(x_t, i))
            with torch.enable_grad():
                prediction = None
                if self.backprop_through_denoiser:
                    source = x_t.detach().requires_grad_()
                    prediction = predict(source, i)
                    shown = prediction.x0
                else:
                    if self.classifier_input == "x0" or not gradient_only:
                        with torch.no_grad():
                            prediction = predict(x_t, i)
                    if self.classifier_input == "x0":
                        seen = prediction.x0
                    else:
                        seen = x_t if self.classifier_input == "x_t" else x_t * to_ve[i]
                        if self.classifier_input == "x_t_normalized":
                            seen = seen / rms(seen).clamp(min=1)
                    source = shown = seen.detach().to(dtype or seen.dtype).requires_grad_()
                if self.classifier_input == "x0":
                    shown = decode(shown)
                logits = self.classifier(shown.to(dtype or shown.dtype), table[i])
                value = self.score(logits, y, fractions[i]).sum()
                (gradient,) = torch.autograd.grad(value, source)
            gradient, logits = gradient.to(x_t.dtype), logits.detach()
            if prediction is not None:
                prediction = type(prediction)(*(None if p is None else p.detach() for p in prediction))
            seen_by = {"logits": logits, "step_gradient": gradient}
            if self.apply_to == "score":
                at_x0 = self.classifier_input == "x0" and not self.backprop_through_denoiser
                return GuidedPrediction(prediction, self.scale * gradient, sine=sines[i], at_x0=at_x0, **seen_by)
            if self.apply_to == "sample":
                size = rms(gradient)
                direction = gradient * torch.where(size > 0, 1 / size, 0.0)
                return GuidedPrediction(prediction, direction=direction, scale=self.scale, sine=sines[i], **seen_by)
            if prediction.cfg_residual is None:  # classifier-free guidance is off here
                return GuidedPrediction(prediction, **seen_by)
            shift = self.scale * (1 + sines[i]) * match_norm(gradient, prediction.cfg_residual)
            return GuidedPrediction(prediction, noise_shift=shift, **seen_by)

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

    def active(self, levels: NoiseLevels) -> list[bool]:
        early, late = self.early.active(levels), self.late.active(levels)
        return [e if t > self.switch_at else n for t, e, n in zip(levels.times, early, late, strict=True)]

    def trajectory(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide | None:
        early, late = (part.trajectory(levels, y, decode) for part in (self.early, self.late))
        chosen = [early if t > self.switch_at else late for t in levels.times]
        if not any(chosen):
            return None

        def guide(predict: Predict, x_t: Tensor, i: int, gradient_only: bool = False) -> GuidedPrediction:
            if chosen[i] is None:
                return GuidedPrediction(None if gradient_only else predict(x_t, i))
            return chosen[i](predict, x_t, i, gradient_only)

        return guide
