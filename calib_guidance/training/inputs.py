"""What a classifier is trained on: clean images, noisy ones, or what a diffusion model makes of those."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.backend.precision import autocast
from calib_guidance.denoisers.base import Denoiser, prepare_clipped
from calib_guidance.diffusion.parameterization import diffuse
from calib_guidance.diffusion.rng import DIFFUSION, SampleStreams, random_steps
from calib_guidance.diffusion.schedules import NoiseSchedule, ScheduleName, named_betas
from calib_guidance.errors import ConfigurationError, check_choice

Precision = Literal["bf16", "fp16", "fp32"]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


class InputTransform(nn.Module, ABC):
    """Base class of what a classifier is trained on: ``input_transform(batch, seed) -> (x, t)``.

    Examples:
        >>> class Inverted(InputTransform):  # an input of your own: negatives of images
        ...     num_steps = 1000
        ...     def forward(self, batch, seed=None):
        ...         return -batch["image"], None
        >>> Inverted()({"image": torch.ones(1, 1, 1, 1)})[0].item()
        -1.0
    """

    num_steps: int  # length of the diffusion process that t refers to

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], seed: int | None = None) -> tuple[Tensor, Tensor | None]:
        """What the classifier sees.

        Args:
            batch: ``image`` ``(N, C, H, W)`` in [-1, 1], ``label`` and ``index`` ``(N,)``, and ``t`` ``(N,)`` of images that
                were denoised beforehand.
            seed: ≥ 0, which with the index determines step and noise of a sample, whatever the batch and the device; None
                draws from torch's global generator.

        Returns:
            Images ``(N, C, H, W)`` in the type of ``image``, and their steps ``(N,)``, 0 … num_steps − 1, or None.
        """

    def check_image(self, shape: Sequence[int]) -> None:
        """Raise ConfigurationError where it cannot take images of ``(C, H, W)``."""

    def check_classes(self, num_classes: int) -> None:
        """Raise ConfigurationError where it cannot take labels 0 … num_classes − 1."""


class CleanInput(InputTransform):
    """Images as they are, with the steps that a data set of denoised images brings along.

    Args:
        num_steps: length of the process that those steps are of.

    Examples:
        >>> images, t = CleanInput()({"image": torch.ones(2, 1, 4, 4), "label": torch.tensor([0, 1])})
        >>> images.shape, t
        (torch.Size([2, 1, 4, 4]), None)
    """

    def __init__(self, num_steps: int = 1000):
        super().__init__()
        self.num_steps = num_steps

    def forward(self, batch: dict[str, Tensor], seed: int | None = None) -> tuple[Tensor, Tensor | None]:
        return batch["image"], batch.get("t")


class _DiffusedInput(InputTransform):
    """x_t ~ q(x_t | x0) at steps of a (respaced) schedule.

    Args:
        schedule: of the full process.
        steps: respacing as samplers take it, e.g. ``"250"``; None draws from all steps.
        weights: relative weights of equal sections of the respaced schedule, from the cleanest to the noisiest; None draws
            all steps alike.
    """

    def __init__(self, schedule: NoiseSchedule, steps: str | int | None = None, weights: Sequence[float] | None = None):
        super().__init__()
        self.num_steps = len(schedule)
        self.schedule = schedule if steps is None else schedule.respace(steps)
        share = np.ones(1) if weights is None else np.asarray(weights, dtype=np.float64)
        if not (share.ndim == 1 and share.size and np.isfinite(share).all() and (share >= 0).all() and share.any()):
            raise ValueError(f"weights must be numbers of at least 0, not all of them 0, got {weights}")
        # The density is constant within a section, so a section may end within a step. Both axes are scaled to integers,
        # where the edges of steps and sections meet exactly.
        size, sections = len(self.schedule), len(share)
        ends, edges = np.arange(1, size + 1) * sections, np.arange(sections + 1) * size
        cumulative = np.interp(ends, edges, np.append(0.0, share.cumsum()))
        self._cumulative = cumulative / cumulative[-1]
        tables = {"cumulative": self._cumulative, "alphas_cumprod": self.schedule.alphas_cumprod}
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table).float(), persistent=False)
        self.register_buffer("timesteps", torch.tensor(self.schedule.timesteps), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to a device and stays float32: in half precision the tables would tell few steps apart."""
        return super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)

    def diffuse(self, batch: dict[str, Tensor], seed: int | None) -> tuple[Tensor, Tensor]:
        """x_t ``(N, C, H, W)`` and the respaced step ``(N,)`` of each."""
        if "t" in batch:
            raise ConfigurationError(
                "the images carry a step t already, as data sets of denoised images do: set the input_transform to "
                "calib_guidance.training.CleanInput, or the data to clean images"
            )
        x0 = batch["image"]
        if seed is None:
            # Zero-weight steps stay out: the first entry above u is never one that adds nothing.
            i = torch.searchsorted(self.cumulative, torch.rand(len(x0), device=x0.device), right=True)
            noise = torch.randn_like(x0)
        else:
            indices = batch["index"].tolist()
            drawn = np.searchsorted(self._cumulative, random_steps(seed, indices), side="right")
            i = torch.from_numpy(drawn).to(x0.device)
            noise = SampleStreams([seed] * len(x0), indices, x0.shape[1:], x0.device, DIFFUSION)()
        return diffuse(x0, noise, self.alphas_cumprod[i].view(-1, 1, 1, 1)).to(x0.dtype), i


class NoisyInput(_DiffusedInput):
    """Noisy images x_t ~ q(x_t | x0) with t drawn over the schedule (Dhariwal & Nichol 2021, section 4).

    Args:
        noise_schedule: ``linear`` or ``cosine``, that of the diffusion model to be guided.
        num_steps: length of that process.

    Examples:
        >>> batch = {"image": torch.zeros(200, 1, 1, 1), "index": torch.arange(200)}
        >>> x_t, t = NoisyInput("linear")(batch, seed=0)  # of zero images: std √(1 − ᾱ)
        >>> round(float(x_t[t > 500].std()), 1), bool(x_t[t < 200].std() < 0.6)
        (1.0, True)
    """

    def __init__(self, noise_schedule: ScheduleName = "linear", num_steps: int = 1000, *args: Any, **kwargs: Any):
        super().__init__(NoiseSchedule(named_betas(noise_schedule, num_steps)), *args, **kwargs)

    def forward(self, batch: dict[str, Tensor], seed: int | None = None) -> tuple[Tensor, Tensor]:
        x_t, i = self.diffuse(batch, seed)
        return x_t, self.timesteps[i]


class NoDeepcopy:
    """Holds a value that a deep copy of the owner shares with it. PyTorch sees no module here: it is not saved, nor trained."""

    def __init__(self, value: Any):
        self.value = value

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


class DenoisedInput(_DiffusedInput):
    """Denoised images x̂0(x_t) of a frozen diffusion model, clipped and decoded as in guidance (arXiv 2310.11311).

    No gradient is kept. The model is not part of this module's parameters, state and copies.

    Args:
        denoiser: the diffusion model to be guided; a class-conditional one is given the labels.
        precision: ``bf16`` or ``fp16`` autocast of the network, or ``fp32``, which runs it as sampling does (in its own
            ``dtype``). Of a network that predicts ε, x̂0 has √(1/ᾱ − 1) times the rounding error.

    Examples:
        >>> from calib_guidance.denoisers import GaussianMixture
        >>> model = GaussianMixture(means=[[0.5]], covariances=[1e-6])  # all of its images are about 0.5
        >>> batch = {"image": torch.full((4, 1, 1, 1), 0.5), "label": torch.zeros(4).long(), "index": torch.arange(4)}
        >>> x0, t = DenoisedInput(model, precision="fp32")(batch, seed=0)
        >>> [round(float(value), 2) for value in x0]
        [0.5, 0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: str | int | None = None,
        weights: Sequence[float] | None = None,
        precision: Precision = "bf16",
    ):
        check_choice("precision", precision, PRECISIONS)
        super().__init__(denoiser.schedule, steps, weights)
        self._frozen, self._device = NoDeepcopy(denoiser.eval().requires_grad_(False)), None
        self.precision = precision

    @property
    def denoiser(self) -> Denoiser:
        return self._frozen.value

    def check_image(self, shape: Sequence[int]) -> None:
        expected = self.denoiser.image_shape
        if tuple(shape) != tuple(expected):
            found, wanted = ("×".join(map(str, s)) for s in (shape, expected))
            raise ConfigurationError(
                f"the data has images of {found}, the denoiser takes {wanted} (channels, height, width): set the image size of "
                "the data, or the image_size and in_channels of the denoiser's network, so that they agree"
            )

    def check_classes(self, num_classes: int) -> None:
        expected = self.denoiser.num_classes
        if expected not in (None, num_classes):
            raise ConfigurationError(
                f"the data has {num_classes} classes, the denoiser {expected}: set data.num_classes to the "
                "denoiser's, or its class_conditional to false"
            )

    @torch.no_grad()
    def forward(
        self, batch: dict[str, Tensor], seed: int | None = None, precision: Precision | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of :class:`InputTransform`; ``precision`` stands in for the configured one."""
        x_t, i = self.diffuse(batch, seed)
        if x_t.device != self._device:
            self.denoiser.to(x_t.device)
            self._device = x_t.device
        # Off where it is not asked for, even inside the autocast of a trainer: embeddings and coefficients stay float32.
        with autocast(x_t.device, None):
            predict = prepare_clipped(self.denoiser, self.schedule.levels, batch["label"])
            with autocast(x_t.device, PRECISIONS[precision or self.precision]):
                x0 = self.denoiser.decode(predict(x_t, i).x0)
        return x0.to(x_t.dtype), self.timesteps[i]
