"""Classifier guidance (Dhariwal & Nichol 2021; arXiv 2310.11311; arXiv 2511.05844)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.backend.precision import power_of_two
from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.base import Predict, Prediction
from calib_guidance.diffusion.interval import Interval
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice, check_numbers
from calib_guidance.guidance.base import Aux, Decode, Guidance, Guide, Guided, Plan, identity
from calib_guidance.guidance.norms import match_norm, rms
from calib_guidance.guidance.resolution import ClassifierResolution
from calib_guidance.guidance.reuse import GradientReuse
from calib_guidance.guidance.schedules import GuidanceSchedule
from calib_guidance.guidance.stabilizer import GradientStabilizer
from calib_guidance.scores.base import Score, TemperedLogProb, as_float

ClassifierInput = Literal["x0", "x_t", "x_t_normalized"]
ApplyTo = Literal["score", "cfg_residual", "sample"]
_ROOM = 256.0  # where gradients start: far from the least number of float16 and from its largest, 65504
_SEEN = {"combined": "x0", "conditional": "x0_cond", "unconditional": "x0_uncond"}


def input_gradient(score: Callable[[Tensor], Tensor], logits: Tensor, source: Tensor) -> Tensor:
    """∇S of ``score(logits)`` with respect to ``source`` ``(N, …)``, which does not vanish in networks of half precision.

    ∇S of a sure classifier is below the least number of float16 (6e-8). The way back from the logits ``(N, K)`` is linear and
    samples do not meet on it, so each starts at one size and gets its own back at the end.
    """
    leaf = as_float(logits.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(score(leaf).sum(), leaf)
    size = power_of_two(slope.abs().amax(dim=1)) / _ROOM
    (gradient,) = torch.autograd.grad(logits, source, (slope / size[:, None]).to(logits.dtype))
    return gradient * size.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))


class ClassifierGuidance(Guidance):
    """Classifier guidance: climbs a score of a classifier.

    Args:
        classifier: frozen here; its input gradients are what guides.
        score: what to climb; plain log-probability by default.
        scale: s; 0 switches guidance off, and the classifier is then never run.
        classifier_input: what the classifier sees. ``x0``: the denoised image (better calibrated, the default), with the gradient
            taken there and not carried through the diffusion network; ``x_t``: the noisy sample and t, for noise-aware
            classifiers; ``x_t_normalized``: x_t/√ᾱ over its root mean square where that exceeds 1 (arXiv 2310.11311,
            Algorithm 2), with the gradient taken there.
        backprop_through_denoiser: with ``x0``, carry the gradient back to x_t (Bansal et al. 2023), a backward pass more.
        schedule: sine factor and interval; constant everywhere by default.
        apply_to: ``score`` adds to the score of the diffusion model, as the sampler's algorithm says; ``cfg_residual`` gives
            the gradient the norm of classifier-free guidance's residual and adds it there (arXiv 2310.11311,
            Algorithm 3), with strength scale·(1 + γ·sin(π·progress)); ``sample`` moves the sample itself along the gradient,
            whose size is ignored (Algorithm 2), which the Heun sampler does.
        decoder: makes images of x̂0 for the classifier, in place of the denoiser's own decoder. Frozen here.
        stabilizer: moving average, clipping and projection of the gradient; none by default.
        classifier_prediction: which x̂0 the classifier sees where the denoiser combines two: ``combined``, ``conditional`` or
            ``unconditional`` (the negative). The gradient is added to the combined one.
        reuse: steps for which a gradient serves; a new one at every guided step by default.
        resolution: smaller images for the classifier, with ``classifier_input: x0``; full size by default.

    Examples:
        >>> from calib_guidance.classifiers import GaussianMixtureClassifier
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> from calib_guidance.samplers import DDPM
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01])  # without labels
        >>> guide = ClassifierGuidance(GaussianMixtureClassifier(model, noise_aware=True), classifier_input="x_t")
        >>> noise = SampleStreams(seeds=[0] * 4, indices=range(4), shape=model.image_shape)
        >>> images = DDPM(steps="50")(model, noise, torch.tensor([0, 1, 0, 1]), guide)
        >>> [round(float(x)) for x in images]
        [-2, 2, -2, 2]
    """

    def __init__(
        self,
        classifier: Classifier,
        score: Score | None = None,
        scale: float = 1.0,
        classifier_input: ClassifierInput = "x0",
        backprop_through_denoiser: bool = False,
        schedule: GuidanceSchedule | None = None,
        apply_to: ApplyTo = "score",
        decoder: nn.Module | None = None,
        stabilizer: GradientStabilizer | None = None,
        classifier_prediction: Literal["combined", "conditional", "unconditional"] = "combined",
        reuse: GradientReuse | None = None,
        resolution: ClassifierResolution | None = None,
    ):
        super().__init__()
        check_choice("classifier_input", classifier_input, get_args(ClassifierInput))
        check_choice("apply_to", apply_to, get_args(ApplyTo))
        check_choice("classifier_prediction", classifier_prediction, _SEEN)
        check_numbers(scale=scale)
        if backprop_through_denoiser and classifier_input != "x0":
            raise ValueError(
                f"backprop_through_denoiser needs classifier_input: x0, got {classifier_input}: change one"
            )
        if resolution is not None and classifier_input != "x0":
            raise ValueError(
                f"resolution needs classifier_input: x0, got {classifier_input}: averages of pixels have less noise than "
                "the classifier is told"
            )
        if apply_to == "sample" and scale < 0:
            raise ValueError(f"with apply_to: sample, scale must be at least 0, got {scale}; 0 is off")
        self.classifier, self.score = classifier.freeze(), score or TemperedLogProb()
        self.scale, self.classifier_input, self.apply_to = scale, classifier_input, apply_to
        self.backprop_through_denoiser = backprop_through_denoiser
        self.schedule = schedule or GuidanceSchedule()
        self.decoder = decoder and decoder.eval().requires_grad_(False)
        self.classifier_prediction = classifier_prediction
        self.reuse, self.resolution = reuse or GradientReuse(), resolution
        self.group_size, self.stabilizer = self.score.group_size, stabilizer or GradientStabilizer()

    def plan(self, levels: NoiseLevels) -> Plan:
        active = np.array(self.schedule.active(levels)) & (self.scale != 0)
        sine = np.array([self.schedule.sine(progress) for progress in levels.progress])
        at_x0 = np.full(len(active), self.classifier_input == "x0" and not self.backprop_through_denoiser)
        runs = self.reuse.runs(levels, active)
        return Plan(active, np.full(len(active), self.scale), sine, at_x0, self.apply_to == "sample", runs)

    def prepare(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide:
        plan = self.plan(levels)
        # Classifiers are trained on integer steps.
        t = torch.tensor(np.rint(levels.times), device=y.device).long()[:, None].expand(-1, len(y))
        fractions = (levels.times / (levels.num_train_steps - 1)).tolist()
        to_ve = (1 / np.sqrt(levels.alphas_cumprod)).tolist()
        decode, executed, held = self.decoder or decode, levels.executed.tolist(), self.reuse.start(self.group_size)
        # A classifier in half precision takes float32 all the same, in which its gradient then is.
        dtype = next((p.dtype for p in self.classifier.parameters() if p.is_floating_point()), None)
        dtype = dtype and torch.promote_types(dtype, torch.float32)
        state: dict[str, Any] = {}

        def guide(predict: Predict, x_t: Tensor, i: int) -> Guided:
            if not plan.active[i]:
                return Guided(None if plan.moves_sample else predict(x_t, i))
            # Asked only once the network is queued, unless its graph depends on it: a GPU has work while the host waits.
            run = not self.backprop_through_denoiser or held.is_due(executed[i])
            with torch.set_grad_enabled(run):
                prediction, source, image = self._look(predict, x_t, i, to_ve[i], dtype)
            logits = fresh = None
            if held.is_due(executed[i]):
                with torch.enable_grad():
                    image = self.seen(decode(image)) if self.classifier_input == "x0" else image
                    logits = self.classifier(image.to(dtype or image.dtype), t[i])
                    gradient = input_gradient(lambda f: self.score(f, y, fractions[i]), logits, source)
                if self.resolution is not None and self.resolution.gain != 1:
                    gradient = self.resolution.gain * gradient
                fresh = held.take(gradient)
            gradient = self.stabilizer(held.applied, source.detach(), state).to(x_t.dtype)
            aux = Aux() if logits is None else Aux(logits.detach(), gradient, fresh)
            prediction = prediction and prediction.detach()
            return self._guided(prediction, gradient, aux, float(plan.sine[i]))

        return guide

    def seen(self, image: Tensor) -> Tensor:
        return image if self.resolution is None else self.resolution(image)

    def _look(
        self, predict: Predict, x_t: Tensor, i: int, to_ve: float, dtype: torch.dtype | None
    ) -> tuple[Prediction | None, Tensor, Tensor]:
        """The prediction, the tensor that the gradient is taken with respect to, and what the classifier sees of it."""
        if self.backprop_through_denoiser:
            source = x_t.detach().requires_grad_()
            prediction = predict(source, i)
            return prediction, source, self._seen(prediction)
        prediction = None
        if self.classifier_input == "x0" or self.apply_to != "sample":
            with torch.no_grad():
                prediction = predict(x_t, i)
        if self.classifier_input == "x0" and prediction is not None:
            seen = self._seen(prediction)
        elif self.classifier_input == "x_t":
            seen = x_t
        else:
            seen = x_t * to_ve
            seen = seen / rms(seen).clamp(min=1)
        source = seen.detach().to(dtype or seen.dtype).requires_grad_()
        return prediction, source, source

    def _seen(self, prediction: Prediction) -> Tensor:
        """The x̂0 that the classifier sees."""
        x0 = getattr(prediction, _SEEN[self.classifier_prediction])
        return prediction.x0 if x0 is None else x0

    def _guided(self, prediction: Prediction | None, gradient: Tensor, aux: Aux, sine: float) -> Guided:
        if self.apply_to != "cfg_residual" or prediction is None:
            return Guided(None if self.apply_to == "sample" else prediction, self.scale * gradient, aux)
        if prediction.residual is None:  # classifier-free guidance is off here
            return Guided(prediction, aux=aux)
        shift = self.scale * (1 + sine) * match_norm(gradient, prediction.residual)
        return Guided(prediction.shifted(shift), aux=aux)


class SwitchedGuidance(Guidance):
    """One guidance from pure noise down to a step, another from there to the image (arXiv 2310.11311, Appendix A.1).

    Args:
        early: guides while t > ``switch_at``.
        late: guides from ``switch_at`` down.
        switch_at: step of the full process (0 … 999) at which steps start; 200 is step 50 of 250, the paper's choice.

    Examples:
        >>> from calib_guidance.classifiers import GaussianMixtureClassifier
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01])
        >>> early, late = (ClassifierGuidance(GaussianMixtureClassifier(model), scale=s) for s in (1.0, 3.0))
        >>> SwitchedGuidance(early, late).plan(model.schedule.at([100, 200, 300])).scale
        array([3., 3., 1.])
    """

    def __init__(self, early: ClassifierGuidance, late: ClassifierGuidance, switch_at: int = 200):
        super().__init__()
        self.early, self.late, self.switch_at = early, late, switch_at
        sizes = {early.group_size, late.group_size} - {1}
        if len(sizes) > 1:
            raise ValueError(f"early and late guidance tilt over groups of different sizes: {sorted(sizes)}")
        if (early.apply_to == "sample") != (late.apply_to == "sample"):
            raise ValueError("early and late must both have apply_to: sample, or neither: their steps differ")
        self.group_size = max(early.group_size, late.group_size)

    def parts(self) -> Sequence[Guidance]:
        return [self.early, self.late]

    def is_early(self, levels: NoiseLevels) -> np.ndarray:
        """Whether ``early`` guides at each of the levels, ``(T,)`` bool."""
        return ~np.array(Interval([-math.inf, self.switch_at]).active(levels))

    def plan(self, levels: NoiseLevels) -> Plan:
        early, late, is_early = self.early.plan(levels), self.late.plan(levels), self.is_early(levels)
        active, scale, sine, at_x0 = (np.where(is_early, e, n) for e, n in zip(early[:4], late[:4], strict=True))
        runs = self.early.reuse.runs(levels, early.active & is_early) | self.late.reuse.runs(
            levels, late.active & ~is_early
        )
        return Plan(active, scale, sine, at_x0, early.moves_sample or late.moves_sample, runs)

    def prepare(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide:
        early, late = (part.prepare(levels, y, decode) for part in (self.early, self.late))
        chosen = [early if is_early else late for is_early in self.is_early(levels)]
        return lambda predict, x_t, i: chosen[i](predict, x_t, i)
