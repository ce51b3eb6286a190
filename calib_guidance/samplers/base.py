"""The sampling loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import Noise
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.guidance.base import Guidance, Guided
from calib_guidance.samplers.evaluate import Evaluate, on_device, plan_of
from calib_guidance.samplers.guidance_scaling import GuidanceScaling


class Transition(NamedTuple):
    """Result of a step, x' = mean + std·z. The loop draws z ~ N(0, I), except at the last step.

    Examples:
        >>> Transition(mean=torch.zeros(1, 1, 1, 1)).std is None  # deterministic
        True
    """

    mean: Tensor  # (N, C, H, W)
    std: Tensor | None = None  # one number or (N, C, H, W); None of a deterministic step


class StepRecord(NamedTuple):
    """One step, as observers see it. Tensors stay on the device; an observer that reads them on the host slows sampling.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> from calib_guidance.samplers import DDIM
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> steps = []
        >>> _ = DDIM(steps="4")(model, noise, torch.tensor([0]), observers=[lambda record: steps.append((record.i, record.t))])
        >>> steps
        [(3, 999), (2, 666), (1, 333), (0, 0)]
    """

    i: int  # level of Sampler.levels, N − 1 … 0
    num_steps: int  # N
    t: float  # step of the full process; a fraction where the sampler stops between two of them
    y: Tensor  # (N,) classes
    x_t: Tensor  # (N, C, H, W) before the step
    guided: Guided
    x_next: Tensor  # (N, C, H, W) after the step


Observer = Callable[[StepRecord], None]


class BufferedObserver(ABC):
    """An observer that learns only when a batch is done which of its samples are kept, and counts those.

    Examples:
        >>> class LastStep(BufferedObserver):  # keeps the pixels of finished samples
        ...     kept = ()
        ...     def __call__(self, record):
        ...         self.images = record.x_next
        ...     def count(self, rows):
        ...         self.kept = self.images[rows].flatten().tolist()
        >>> from calib_guidance.guidance import Guided
        >>> observe, x = LastStep(), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        >>> observe(StepRecord(0, 1, 0, torch.zeros(2), x, Guided(None), x))
        >>> observe.count(slice(0, 1))  # the second sample failed
        >>> observe.kept
        [1.0]
    """

    @abstractmethod
    def __call__(self, record: StepRecord) -> None:
        """Note one step."""

    @abstractmethod
    def count(self, rows: slice | Tensor) -> None:
        """Count the samples at ``rows`` of what was noted since the last call; forget the others."""


class Sampler(ABC):
    """Base class of samplers: ``sampler(denoiser, noise, y, guidance) -> images``. A subclass is its coefficients and its step.

    Examples:
        >>> class Euler(Sampler):  # a sampler of your own: dx/dσ = ε of x/√ᾱ = x0 + σ·ε
        ...     steps = "50"
        ...     def coefficients(self, levels):
        ...         sigma = levels.sigmas
        ...         return {"sigma": sigma, "h": np.append(0, sigma[:-1]) - sigma, "root": np.sqrt(levels.alphas_cumprod)}
        ...     def step(self, x, i, evaluate, c):
        ...         ve = x / c.root[i]
        ...         ve = ve + c.h[i] * (ve - evaluate(x, i).predicted().x0) / c.sigma[i]
        ...         return Transition(ve * (c.root[i - 1] if i else 1))
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> from calib_guidance.diffusion import SampleStreams
        >>> model = GaussianMixture(means=[[3.0]], covariances=[0.01])
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> round(float(Euler()(model, noise, torch.tensor([0]))))
        3
    """

    steps: str | int  # respacing of the process, of samplers that stop at its steps
    clip_denoised: bool = True  # clip x̂0 to [-1, 1] before guidance, where it is an image
    recurrence: int = 1  # number of times that each step is done, with renoising in between
    scaling: GuidanceScaling | None = None  # strength of guidance by step size
    takes_score: bool = False  # whether step reads the score; elsewhere the loop folds it into x̂0
    renoises: bool = False  # whether step takes the noise from x0_renoise where a prediction has it
    moves_sample: bool = False  # whether step can move the sample along the score (arXiv 2310.11311, Algorithm 2)
    steps_vp: bool = (
        True  # whether a step is one evaluation that leads to x' = √ᾱ'·x0 + √(1−ᾱ')·ε, as training-free guidance needs
    )

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        """Noise levels of the N steps, least noisy first."""
        return denoiser.schedule.respace(self.steps).levels

    @abstractmethod
    def coefficients(self, levels: NoiseLevels) -> dict[str, np.ndarray]:
        """Tables ``(N,)`` float64 of the numbers that a step needs."""

    @abstractmethod
    def step(self, x: Tensor, i: int, evaluate: Evaluate, c: SimpleNamespace) -> Transition:
        """One step from level ``i`` to level ``i`` − 1, or at 0 to the image.

        Args:
            x: ``(N, C, H, W)``, x_t = √ᾱ·x0 + √(1−ᾱ)·ε where :meth:`to_vp` is not overridden.
            i: level.
            evaluate: ``evaluate(x, i)`` is the guided prediction; ``evaluate.unguided(x, i)`` that of the model alone.
            c: the coefficients on the device, with ``scale`` and ``sine`` of guidance, ``moves_sample``, ``noise()``, and
                ``state``, a dict of tensors ``(N, …)`` that a step leaves to the next.
        """

    def start(self, noise: Noise, levels: NoiseLevels) -> Tensor:
        """x_T ``(N, C, H, W)``, in the type that the steps compute in."""
        return noise()

    def to_vp(self, x: Tensor, i: int, c: SimpleNamespace) -> Tensor:
        """x_t = √ᾱ·x0 + √(1−ᾱ)·ε of a sampler's ``x`` at level ``i``; -1 is the image."""
        return x

    def evaluated(self, denoiser: Denoiser) -> NoiseLevels:
        """Every level at which a step evaluates, those of the steps first."""
        return self.levels(denoiser)

    def nfe(self, denoiser: Denoiser) -> int:
        """Number of function evaluations (NFE) per sample."""
        return len(self.levels(denoiser).times) * self.recurrence * denoiser.nfe

    def check(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        """Raise ValueError where sampler, denoiser and guidance do not fit together."""
        _check_start(self.levels(denoiser))
        name = type(self).__name__
        self._check_step(denoiser, guidance)
        for part in guidance.parts() if guidance else ():
            if part.apply_to == "sample" and not self.moves_sample:
                raise ValueError(f"apply_to: sample is Algorithm 2, and {name} has none: set score, or take Heun")
            if part.apply_to == "score" and part.schedule.gamma and not self.takes_score:
                raise ValueError(f"{name} has no sine factor: set the guidance schedule's gamma to 0, or take DDPM")

    def _check_step(self, denoiser: Denoiser, guidance: Guidance | None) -> None:
        name = type(self).__name__
        if denoiser.renoises and not self.renoises:
            raise ValueError(f"{name} cannot renoise as CFG++: set the sampler to DDIM or DPMSolver")
        if not self.steps_vp and any(part.apply_to == "step" for part in (guidance.parts() if guidance else ())):
            raise ValueError(
                f"training-free guidance adds to x' of a step with one evaluation, and {name} has others: set the sampler to "
                "DDIM (eta: 1 in the source), DDPM, DPMSolver or UniPC, which flow models take too"
            )

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: Noise,
        y: Tensor,
        guidance: Guidance | None = None,
        observers: Sequence[Observer] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Sample one batch of classes ``y`` ``(N,)``: ``(N, C, H, W)`` float32 images.

        Args:
            denoiser: the diffusion model.
            noise: source of standard normal images; called once for x_T, then once per noise that a step adds.
            guidance: None samples the model alone.
            observers: each is called after every step, and after every repetition of one.
            progress: called with the number of finished steps and N after every step.
        """
        self._check_step(denoiser, guidance)
        levels = self.levels(denoiser)
        _check_start(levels)
        n, times = len(levels.times), [int(t) if t.is_integer() else t for t in levels.times.tolist()]
        x = self.start(noise, levels)
        evaluate = Evaluate(self, denoiser, guidance, y, x)
        plan, kept = plan_of(guidance, levels), levels.alphas_cumprod / np.append(1.0, levels.alphas_cumprod[:-1])
        tables = self.coefficients(levels) | {"scale": plan.scale, "sine": plan.sine}
        tables |= {"keep": np.sqrt(kept), "renoise": np.sqrt(1 - kept)}
        c = SimpleNamespace(**{name: on_device(table, x) for name, table in tables.items()})
        c.moves_sample, c.noise, c.state = plan.moves_sample, noise, {}
        for i in reversed(range(n)):
            for repeat in range(self.recurrence):
                mean, std = self.step(x, i, evaluate, c)
                mean, guided = evaluate.finish(mean, i)
                x_next = mean if std is None or i == 0 else _add_noise(mean, std, noise())
                if i and denoiser.looks_at_steps:
                    evaluate.predict.after_step(self.to_vp(x_next, i - 1, c), i - 1)
                if observers:
                    x_t, x_after = self.to_vp(x, i, c), self.to_vp(x_next, i - 1, c)
                    record = StepRecord(i, n, times[i], y, x_t, guided, x_after)
                    for observe in observers:
                        observe(record)
                x = x_next
                if repeat < self.recurrence - 1:
                    x = c.keep[i] * x + c.renoise[i] * noise()
            if progress is not None:
                progress(n - i, n)
        return x.float()


def _check_start(levels: NoiseLevels) -> None:
    if levels.alphas_cumprod[-1] > 0.5:
        raise ValueError(
            f"sampling starts from pure noise, and the first step is at t = {levels.times[-1]:g} of {levels.num_train_steps} "
            f"(σ = {levels.sigmas[-1]:.3g}), where images have more signal than noise: set the sampler's steps to at least 2, "
            "without sections of 0 or 1 at the end, or its sigma_max to at least 1"
        )


def _add_noise(mean: Tensor, std: Tensor, z: Tensor) -> Tensor:
    """mean + std·z. One pass where std is an image, as DDPM's is; one rounding more where it is a number."""
    return torch.addcmul(mean, std, z) if std.ndim else mean + std * z
