"""Any network that predicts ε, v, x0 or the velocity of a flow from (x_t, t, y)."""

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.backend.compilation import Compiled
from calib_guidance.backend.precision import Dtype, dtype_of
from calib_guidance.denoisers.base import Denoiser, Predict, Prediction, at_step, x0_predictor
from calib_guidance.diffusion.parameterization import Parameterization
from calib_guidance.diffusion.paths import path_time
from calib_guidance.diffusion.schedules import PURE_NOISE, NoiseLevels, NoiseSchedule, ScheduleName, named_betas
from calib_guidance.errors import check_choice

Predicted = Parameterization | Literal["flow"]


class ModuleDenoiser(Denoiser):
    """A network of your own: ``network(x_t, t)``, or ``network(x_t, t, y)`` with classes.

    The network gets x_t = √ᾱ·x0 + √(1−ᾱ)·ε ``(N, C, H, W)``, t ``(N,)`` in 0 … T − 1 (long, or float between steps), and labels
    ``(N,)``. It returns ``(N, C, H, W)``, or with a learned variance ``(N, 2C, H, W)``: the second half, in [-1, 1], places the
    log-variance between its bounds (Nichol & Dhariwal 2021).

    A network that predicts a ``flow`` gets x_τ = (1 − τ)·x0 + τ·ε and t = T·τ, and returns the velocity ε − x0.

    Args:
        network: frozen here and set to evaluation mode.
        image_shape: ``(C, H, W)``.
        noise_schedule: ``linear``, ``cosine``, or the βs of the process, ``(T,)``. The last may be 1, pure noise (zero terminal
            SNR, Lin et al. 2024). Of a flow: what t means to classifiers, and what discrete samplers respace.
        num_steps: T of a named schedule.
        prediction: ``epsilon``, ``v``, ``x0`` or ``flow``.
        num_classes: number of labels; None for an unconditional network.
        null_label: label that the network was trained with for "no class", for classifier-free guidance.
        learned_variance: whether the network returns ``2C`` channels.
        clip: whether x̂0 may be clipped to [-1, 1]; false for latents.
        compile: compile the network, see :class:`~calib_guidance.backend.compilation.Compiled`.
        dtype: of the network; None leaves it as it is. x̂0 is float32.

    Examples:
        >>> class Half(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return x_t / 2
        >>> denoiser = ModuleDenoiser(Half(), (1, 1, 2), "cosine", prediction="x0")
        >>> denoiser(torch.ones(1, 1, 1, 2), 500, torch.tensor([0])).x0.flatten()
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        noise_schedule: ScheduleName | list[float] = "linear",
        num_steps: int = 1000,
        prediction: Predicted = "epsilon",
        num_classes: int | None = None,
        null_label: int | None = None,
        learned_variance: bool = False,
        clip: bool = True,
        compile: bool = False,
        dtype: Dtype | None = None,
    ):
        super().__init__()
        check_choice("prediction", prediction, (*get_args(Parameterization), "flow"))
        named = isinstance(noise_schedule, str)
        betas = named_betas(noise_schedule, num_steps) if named else np.array(noise_schedule, np.float64)
        self._from_pure_noise = prediction == "flow" or betas[-1] == 1
        if betas[-1] == 1:
            if prediction == "epsilon":
                raise ValueError(
                    "noise_schedule ends in pure noise (β = 1), where ε says nothing of x0: it needs v or x0"
                )
            betas[-1] = 1 - 1 / (1 + PURE_NOISE**2) / np.prod(1 - betas[:-1])
        self.schedule, self.prediction = NoiseSchedule(betas), prediction
        channels, height, width = image_shape
        self.image_shape, self.num_classes, self.null_label = (channels, height, width), num_classes, null_label
        self.has_learned_variance, self.clip, self.is_compiled = learned_variance, clip, compile
        self.network = network.eval().requires_grad_(False)
        if dtype is not None:
            self.network.to(dtype_of(dtype))
        self._call = Compiled(self._evaluate) if compile else self._evaluate

    @property
    def max_sigma(self) -> float:
        return math.inf if self._from_pure_noise else super().max_sigma

    def _evaluate(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters()), x_t.dtype)
        return self.network(x_t.to(dtype), t, *(() if y is None else (y,))).float()

    def _labels(self, y: Tensor | None) -> Tensor | None:
        """Labels as the network knows them, -1 replaced by its null label."""
        if self.num_classes is None:
            return None
        if y is None or bool((y < 0).any()):
            if self.null_label is None:
                raise ValueError("the network predicts with labels only: give y, or its null_label if it has one")
            y = torch.full((1,), self.null_label) if y is None else torch.where(y < 0, self.null_label, y)
        return y

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        device = next((p.device for p in self.network.parameters()), None)
        tau = path_time("linear", levels.alphas_cumprod)
        is_flow, labels = self.prediction == "flow", self._labels(y)
        times = torch.tensor(tau * levels.num_train_steps if is_flow else levels.times, device=device)
        times = times.long() if not is_flow and bool((times == times.round()).all()) else times.float()

        def output(x_t: Tensor, i: int | Tensor) -> Tensor:
            own = () if labels is None else (labels.to(x_t.device).expand(len(x_t)),)
            return self._call(x_t, times[i].expand(len(x_t)), *own)

        if not is_flow:
            return x0_predictor(self, output, levels, device)
        # In float64: a sampler that wants the velocity back divides by τ.
        to_path, tau = (torch.tensor(table, device=device) for table in (np.hypot(1 - tau, tau), tau))

        def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
            x = at_step(to_path, i).to(x_t.dtype) * x_t
            return Prediction(x - at_step(tau, i).to(x_t.dtype) * output(x, i).to(x_t.dtype))

        return predict
