"""The diffusion models of EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_guidance.denoisers.base import Predict, Prediction, at_step
from calib_guidance.denoisers.discrete import NetworkDenoiser
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule, ScheduleName, named_betas
from calib_guidance.errors import check_numbers
from calib_guidance.networks.adm import UNet


class EDMDenoiser(NetworkDenoiser):
    """A network F under EDM's preconditioning, D(x; σ) = c_skip·x + c_out·F(c_in·x, ln σ/4) with x = x0 + σ·ε (Table 1).

    c_skip = σ_d²/(σ² + σ_d²), c_out = σ·σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²). The network runs in its own number format
    and F is float32, whatever the type of the sample.

    Args:
        network: the UNet; or a name of :mod:`calib_guidance.weights.registry` (``edm_imagenet64``); or None, for the one that the
            weights' names and shapes tell.
        checkpoint: weights file, by EDM's names or by those of :class:`~calib_guidance.networks.UNet`; None keeps the network
            as it is.
        sigma_data: σ_d, standard deviation of the images in [-1, 1] that it was trained for.
        noise_schedule: ``linear`` or ``cosine``, of 1000 steps: what t means to classifiers, and what discrete samplers
            respace. The network itself knows σ alone.

    Examples:
        >>> network = UNet(image_size=8, in_channels=1, model_channels=32, out_channels=1, channel_mult=(1,))
        >>> denoiser = EDMDenoiser(network, sigma_data=0.5)  # untrained: F = 0, so D = c_skip·x
        >>> predict = denoiser.prepare(denoiser.schedule.at_sigmas([1.0]), None)
        >>> x = torch.ones(1, 1, 8, 8)
        >>> round(float(predict(x / 2**0.5, 0).x0.mean()), 4)  # x_t = x/√(1 + σ²); c_skip = 0.25/(1 + 0.25)
        0.2
    """

    kind = "edm"

    def __init__(
        self,
        network: UNet | str | None = None,
        checkpoint: str | None = None,
        sigma_data: float = 0.5,
        noise_schedule: ScheduleName = "linear",
        **kwargs: Any,
    ):
        check_numbers(above=0, sigma_data=sigma_data)
        super().__init__({"sigma_data": sigma_data}, network, checkpoint, **kwargs)
        if self.has_learned_variance:
            own, found = self.network.in_channels, self.network.out_channels
            raise ValueError(f"out_channels must be in_channels ({own}), got {found}")
        self.sigma_data = sigma_data
        self.schedule = NoiseSchedule(named_betas(noise_schedule))

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        network, sigma, data = self.network, levels.sigmas, self.sigma_data
        device = next(network.parameters()).device
        time = network.embed_time(torch.tensor(np.log(sigma) / 4, device=device))
        label = None if y is None or self.num_classes is None else network.embed_labels(y)
        total = sigma**2 + data**2
        preconditioning = (data**2 / total, sigma * data / np.sqrt(total), 1 / np.sqrt(total))
        skip, out, scale_in = (torch.tensor(c, device=device).float() for c in preconditioning)
        to_ve = torch.tensor(1 / np.sqrt(levels.alphas_cumprod), device=device)

        def predict(x_t: Tensor, i: int | Tensor) -> Prediction:
            emb = time[i].expand(len(x_t), -1) if label is None else time[i] + label
            x = (x_t * at_step(to_ve, i).to(x_t.dtype)).float()
            output = self._decode(at_step(scale_in, i) * x, emb)
            return Prediction((at_step(skip, i) * x + at_step(out, i) * output).to(x_t.dtype))

        return predict
