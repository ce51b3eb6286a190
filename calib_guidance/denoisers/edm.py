"""The diffusion models of EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calib_guidance.backend.compilation import Compiled
from calib_guidance.backend.precision import Dtype
from calib_guidance.denoisers.base import Denoiser, Predict, Prediction, at_step
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule, ScheduleName, named_betas
from calib_guidance.networks.adm import UNet
from calib_guidance.weights.loading import load_network


class EDMDenoiser(Denoiser):
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
        class_conditional: false hands no label to the network, which makes an unconditional model of one that was trained
            with label dropout.
        image_size: side in pixels of what is sampled; None takes the network's.
        dtype: ``float32``, ``float16`` or ``bfloat16``, of the body of a network that is built here; None takes the one that a
            named network was published with (float16), and float32 for others.
        compile: compile the network, see :class:`~calib_guidance.backend.compilation.Compiled`.
    """

    def __init__(
        self,
        network: UNet | str | None = None,
        checkpoint: str | None = None,
        sigma_data: float = 0.5,
        noise_schedule: ScheduleName = "linear",
        class_conditional: bool = True,
        image_size: int | None = None,
        dtype: Dtype | None = None,
        compile: bool = False,
    ):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, got {sigma_data}")
        network, _, self.provenance = load_network(network, "edm", checkpoint, dtype, sigma_data=sigma_data)
        size = network.image_size if image_size is None else image_size
        self.image_shape = (network.in_channels, size, size)
        network.check_image(self.image_shape)
        if network.out_channels != network.in_channels:
            raise ValueError(
                f"EDM's networks predict the image alone: out_channels must be in_channels ({network.in_channels}), got "
                f"{network.out_channels}"
            )
        self.network = network
        self.sigma_data = sigma_data
        self.schedule = NoiseSchedule(named_betas(noise_schedule))
        self.num_classes = network.num_classes if class_conditional else None
        self.is_compiled = compile
        self._decode = Compiled(network.decode) if compile else network.decode

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        network, sigma, data = self.network, levels.sigmas, self.sigma_data
        device = network.time_embed[0].weight.device
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
