"""Training-free guidance, TFG (Ye et al. 2024, arXiv 2409.15761)."""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.classifiers.base import Classifier
from calib_guidance.denoisers.base import Predict
from calib_guidance.diffusion.interval import Interval
from calib_guidance.diffusion.rng import KeyedNumbers
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_choice, check_numbers
from calib_guidance.guidance.base import Aux, Decode, Guidance, Guide, Guided, Plan, identity
from calib_guidance.scores.base import Score, TemperedLogProb

Shape = Literal["increase", "decrease", "constant"]


class TrainingFreeGuidance(Guidance):
    """Training-free guidance, TFG (Ye et al. 2024, arXiv 2409.15761).

    Moves x' of a step by d_t/√α + √ᾱ'·d_0, with α = ᾱ/ᾱ' and f the score of the classifier on clean images.

    - f̃(z) = log 1/M Σ_m exp f(z + e_m), e_m ~ N(0, σ_t²·I), drawn for every step: f, smoothed.
    - d_t = ρ_t·∇ of f̃(x̂0(x_t)) with respect to x_t, through the diffusion network.
    - d_0 = z − x̂0 after N_iter times z ← z + μ_t·∇f̃(z), from z = x̂0.

    x̂0 itself stays unguided. ρ_t and μ_t are ρ and μ times s_t over its mean: ``increase`` s = α, ``decrease`` s = 1 − α. σ_t is
    σ or, ``decrease``, σ·√(1−ᾱ). The sampler's ``recurrence`` is N_recur; the source samples with DDIM, η = 1. Special cases are
    diffusion posterior sampling (ρ alone), FreeDoM (ρ and recurrence), loss-guided diffusion (ρ, σ and M) and universal guidance
    (ρ, μ, N_iter and recurrence).

    Args:
        classifier: any differentiable classifier of clean images; frozen here.
        score: f; log-probability by default.
        rho, mu, sigma: ρ, μ, σ ≥ 0; 0 switches that part off, and with ρ = 0 nothing is carried through the diffusion network.
        samples: M, evaluations of the classifier in one batch.
        iterations: N_iter.
        rho_schedule, mu_schedule, sigma_schedule: ``increase``, ``decrease`` or ``constant``, as stated (σ: not ``increase``).
        interval: where it is on; everywhere by default.
        decoder: makes images of x̂0 for the classifier in place of the denoiser's decoder. Frozen here.

    Examples:
        >>> from calib_guidance.classifiers import GaussianMixtureClassifier
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> from calib_guidance.samplers import DDIM
        >>> model = GaussianMixture(means=[[-2.0], [2.0]], covariances=[0.01, 0.01])  # without labels
        >>> guide = TrainingFreeGuidance(GaussianMixtureClassifier(model), rho=1.0, mu=1.0)
        >>> noise = SampleStreams(seeds=[0] * 4, indices=range(4), shape=model.image_shape)
        >>> images = DDIM(steps="50", eta=1.0)(model, noise, torch.tensor([0, 1, 0, 1]), guide)
        >>> images.sign().flatten()
        tensor([-1.,  1., -1.,  1.])
    """

    classifier_input = "x0"
    apply_to = "step"

    def __init__(
        self,
        classifier: Classifier,
        score: Score | None = None,
        rho: float = 1.0,
        mu: float = 1.0,
        sigma: float = 0.01,
        samples: int = 4,
        iterations: int = 1,
        rho_schedule: Shape = "increase",
        mu_schedule: Shape = "increase",
        sigma_schedule: Literal["decrease", "constant"] = "decrease",
        interval: Interval | None = None,
        decoder: nn.Module | None = None,
    ):
        super().__init__()
        check_numbers(least=0, rho=rho, mu=mu, sigma=sigma)
        check_numbers(least=1, samples=samples, iterations=iterations)
        check_choice("rho_schedule", rho_schedule, get_args(Shape))
        check_choice("mu_schedule", mu_schedule, get_args(Shape))
        check_choice("sigma_schedule", sigma_schedule, ("decrease", "constant"))
        self.classifier, self.score = classifier.freeze(), score or TemperedLogProb()
        self.rho, self.mu, self.sigma, self.samples, self.iterations = rho, mu, sigma, samples, iterations
        self.rho_schedule, self.mu_schedule, self.sigma_schedule = rho_schedule, mu_schedule, sigma_schedule
        self.interval, self.decoder = interval or Interval(), decoder and decoder.eval().requires_grad_(False)
        self.group_size = self.score.group_size

    def plan(self, levels: NoiseLevels) -> Plan:
        active = np.array(self.interval.active(levels)) & bool(self.rho or self.mu)
        zero = np.zeros(len(active))
        return Plan(active, zero + 1, zero, active & False)

    def strengths(self, levels: NoiseLevels) -> np.ndarray:
        """ρ_t, μ_t and σ_t, ``(3, T)``."""
        alpha = levels.alphas_cumprod / np.append(1.0, levels.alphas_cumprod[:-1])
        curves = {"increase": alpha, "decrease": 1 - alpha, "constant": np.ones(len(alpha))}
        rho, mu = (curves[shape] / curves[shape].mean() for shape in (self.rho_schedule, self.mu_schedule))
        sigma = np.sqrt(1 - levels.alphas_cumprod) if self.sigma_schedule == "decrease" else curves["constant"]
        return np.stack([self.rho * rho, self.mu * mu, self.sigma * sigma])

    def prepare(self, levels: NoiseLevels, y: Tensor, decode: Decode = identity) -> Guide:
        active, strengths = self.plan(levels).active, self.strengths(levels).T.tolist()
        before = np.append(1.0, levels.alphas_cumprod[:-1])
        to_x, to_x0 = np.sqrt(before / levels.alphas_cumprod).tolist(), np.sqrt(before).tolist()
        t = torch.tensor(np.rint(levels.times), device=y.device).long()[:, None].expand(-1, len(y) * self.samples)
        fractions = (levels.times / (levels.num_train_steps - 1)).tolist()
        many = y.repeat(self.samples)
        state: dict[str, Any] = {"calls": 0}
        decode = self.decoder or decode

        def smoothed(z: Tensor, noise: Tensor | None, i: int) -> tuple[Tensor, Tensor]:
            """f̃ ``(N,)``, and the logits of the first copy."""
            copies = self.samples if noise is not None else 1
            images = decode(z if noise is None else (z + noise).flatten(0, 1))
            logits = self.classifier(images, t[i, : len(images)])
            f = self.score(logits, many[: len(images)], fractions[i]).view(copies, -1)
            return f.logsumexp(0) - math.log(copies), logits[: len(z)]

        def guide(predict: Predict, x_t: Tensor, i: int) -> Guided:
            if "numbers" not in state:
                state["numbers"] = KeyedNumbers(x_t)
            state["calls"] += 1
            if not active[i]:
                return Guided(predict(x_t, i))
            rho, mu, sigma = strengths[i]
            noise = sigma * self.draw(state["numbers"], state["calls"], x_t) if sigma else None
            x, move, aux = x_t.detach().requires_grad_(bool(rho)), 0.0, Aux()
            with torch.set_grad_enabled(bool(rho)):
                prediction = predict(x, i)
                if rho:
                    f, logits = smoothed(prediction.x0, noise, i)
                    (gradient,) = torch.autograd.grad(f.sum(), x)
                    move, aux = rho * to_x[i] * gradient, Aux(logits.detach(), gradient)
            prediction = prediction.detach()
            z = prediction.x0
            for _ in range(self.iterations if mu else 0):
                with torch.enable_grad():
                    z = z.detach().requires_grad_()
                    f, logits = smoothed(z, noise, i)
                    (gradient,) = torch.autograd.grad(f.sum(), z)
                z, aux = z.detach() + mu * gradient, Aux(logits.detach(), gradient)
            move = move + to_x0[i] * (z - prediction.x0)
            return Guided(prediction, aux=aux, move=move)

        return guide

    def draw(self, numbers: KeyedNumbers, call: int, x_t: Tensor) -> Tensor:
        """Standard normal noise of call ``call``, ``(M, N, C, H, W)``, from each sample's own stream."""
        return numbers.normal(self.samples, *x_t.shape[1:], stream=call).transpose(0, 1).to(x_t.dtype)
