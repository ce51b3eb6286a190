"""One interface over every diffusion model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from calib_guidance.diffusion.parameterization import x0_coefficients
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule


class Prediction(NamedTuple):
    """Output of a denoiser at x_t, ``(N, C, H, W)`` each and not clipped.

    The variance is the position of the reverse step's log-variance between the posterior's (0) and that of β (1).

    Examples:
        >>> Prediction(x0=torch.ones(1, 1, 1, 2)).shifted(torch.full((1, 1, 1, 2), 0.5)).x0.flatten()
        tensor([1.5000, 1.5000])
    """

    x0: Tensor  # estimate of the clean image
    variance: Tensor | None = None  # None where it is not learned
    residual: Tensor | None = None  # x̂0 minus that of the negative, of a combination
    x0_renoise: Tensor | None = None  # x̂0 whose ε is the noise of the step; None where it is that of x0
    x0_cond: Tensor | None = None  # what a combination combined
    x0_uncond: Tensor | None = None

    def detach(self) -> Self:
        """The same values without a graph."""
        detached = {name: value.detach() for name, value in self._asdict().items() if value is not None}
        return self._replace(**detached)

    def shifted(self, shift: Tensor) -> Self:
        """With ``shift`` added to x̂0, and to that of the noise, so that guidance is as strong under either."""
        renoise = None if self.x0_renoise is None else self.x0_renoise + shift
        return self._replace(x0=self.x0 + shift, x0_renoise=renoise)


_SIGMA_MAX = 80.0  # beyond it nothing is left of the image, and guidance is multiplied by σ

Predict = Callable[[Tensor, int | Tensor], Prediction]


def at_step(table: Tensor, i: int | Tensor) -> Tensor:
    """Entry ``i`` of a table ``(T,)``: one number, or where ``i`` is ``(N,)`` one per sample, ``(N, 1, 1, 1)``."""
    return table[i].view(-1, 1, 1, 1) if isinstance(i, Tensor) else table[i]


class Denoiser(nn.Module, ABC):
    """A diffusion model in the coordinates x_t = √ᾱ·x0 + √(1−ᾱ)·ε, whatever its network was trained in.

    ``denoiser(x_t, t, y)`` predicts x̂0. A sampler calls :meth:`prepare` once instead, and its result at every step.

    Examples:
        >>> from calib_guidance.diffusion.schedules import named_betas
        >>> class Gray(Denoiser):  # a model of your own: all of its images are 0
        ...     schedule, image_shape, num_classes = NoiseSchedule(named_betas("linear")), (1, 2, 2), None
        ...     def prepare(self, levels, y):
        ...         return lambda x_t, i: Prediction(torch.zeros_like(x_t))
        >>> from calib_guidance.diffusion import SampleStreams
        >>> from calib_guidance.samplers import DDIM
        >>> model = Gray()
        >>> noise = SampleStreams(seeds=[0], indices=[0], shape=model.image_shape)
        >>> DDIM(steps="10")(model, noise, torch.tensor([0])).flatten()
        tensor([0., 0., 0., 0.])
    """

    schedule: NoiseSchedule  # of the full process, which says what t means; discrete samplers respace it
    image_shape: tuple[int, int, int]  # (C, H, W) of x_t
    num_classes: int | None  # number of labels, or None of an unconditional model
    clip: bool = True  # whether x̂0 is an image, which samplers may clip to [-1, 1]
    has_learned_variance: bool = False  # whether predictions have a variance
    nfe: int = 1  # number of function evaluations (NFE) per prediction
    renoises: bool = False  # whether predictions have an x0_renoise
    looks_at_steps: bool = False  # whether what prepare returns has to see every step

    @property
    def max_sigma(self) -> float:
        """σ where flow samplers start: infinite of models of pure noise; else the largest of the schedule, at most 80."""
        return min(float(self.schedule.levels.sigmas[-1]), _SIGMA_MAX)

    @abstractmethod
    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        """Bind the model to noise levels and labels ``y`` ``(N,)``, -1 for none; what does not depend on x_t is computed once.

        Returns:
            ``predict(x_t, i)``, the prediction for ``x_t`` ``(N, C, H, W)`` at level ``i``. Samplers take all samples
            through the same step and give ``i`` as a number; a long tensor ``(N,)``, on the device of ``x_t``, gives every
            sample a step of its own (``residual`` is then 0, not None, for samples where it is off). It may offer
            ``start(x)``, called with x_T before the first step, and ``after_step(x_next, i)``, called after every step but the
            last with the sample at level ``i`` where it ended.
        """

    def forward(self, x_t: Tensor, t: int | Tensor, y: Tensor | None = None) -> Prediction:
        """Predict x̂0 of ``x_t`` ``(N, C, H, W)`` at step ``t``, one or ``(N,)`` of 0 … T − 1; ``y`` as for :meth:`prepare`."""
        steps = torch.as_tensor(t).reshape(-1)
        i = torch.arange(len(steps), device=x_t.device) if len(steps) > 1 else 0
        return self.prepare(self.schedule.at(steps.tolist()), y)(x_t, i)

    def decode(self, x0: Tensor) -> Tensor:
        """Images of x̂0: the same outside latent models."""
        return x0


def x0_predictor(denoiser: Any, network: Callable[..., Tensor], levels: NoiseLevels, device: Any) -> Predict:
    """``predict(x_t, i)`` of ``network(x_t, i)``, whose output is ``denoiser.prediction`` and, where learned, a variance."""
    coefficients = x0_coefficients(denoiser.prediction, levels.alphas_cumprod)
    from_x, from_output = (torch.tensor(c, device=device).float() for c in coefficients)

    def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
        output, variance = network(x_t, i), None
        if denoiser.has_learned_variance:
            output, variance = output.chunk(2, dim=1)
            variance = (variance + 1) / 2
        return Prediction(at_step(from_x, i) * x_t + at_step(from_output, i) * output, variance)

    return predict


class DenoiserWrapper(Denoiser):
    """A denoiser around a denoiser, whose process, shape and decoder it shares."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser, self.num_classes, self.nfe = denoiser, denoiser.num_classes, denoiser.nfe
        self.schedule, self.image_shape, self.clip = denoiser.schedule, denoiser.image_shape, denoiser.clip
        self.has_learned_variance = denoiser.has_learned_variance
        self.renoises, self.looks_at_steps = denoiser.renoises, denoiser.looks_at_steps

    @property
    def max_sigma(self) -> float:
        return self.denoiser.max_sigma

    def decode(self, x0: Tensor) -> Tensor:
        return self.denoiser.decode(x0)


class _Clipped:
    """A bound denoiser with x̂0 clipped to [-1, 1]. What else it offers is unchanged."""

    def __init__(self, predict: Predict):
        self._predict = predict

    def __call__(self, x_t: Tensor, i: int | Tensor) -> Prediction:
        prediction = self._predict(x_t, i)
        images = {name: value for name, value in prediction._asdict().items() if name.startswith("x0")}
        return prediction._replace(**{name: value if value is None else _clip(value) for name, value in images.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predict, name)


def _clip(x0: Tensor) -> Tensor:
    # Adding 0·x̂0 keeps NaN and ∞ non-finite: an overflowing network must not pass for one that predicts ±1.
    return x0.clamp(-1, 1).add(x0, alpha=0)


def prepare_clipped(denoiser: Denoiser, levels: NoiseLevels, y: Tensor | None, clip: bool = True) -> Predict:
    """:meth:`Denoiser.prepare` with x̂0 clipped to [-1, 1] where asked and where it is an image."""
    predict = denoiser.prepare(levels, y)
    return _Clipped(predict) if clip and denoiser.clip else predict
