"""Flow models: SiT (arXiv 2401.08740), REPA (arXiv 2410.06940) and others that predict a velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_guidance.denoisers.base import Predict, Prediction, at_step
from calib_guidance.denoisers.decoders import DecoderDtype
from calib_guidance.denoisers.discrete import NetworkDenoiser
from calib_guidance.denoisers.latents import DecodesLatents
from calib_guidance.diffusion.paths import PathName, TimeDirection, network_time, path_coefficients, path_time
from calib_guidance.diffusion.schedules import NoiseLevels, NoiseSchedule, ScheduleName, named_betas
from calib_guidance.weights.ldm_vae import latent_statistics


class FlowDenoiser(DecodesLatents, NetworkDenoiser):
    """A network that predicts the velocity dx/dt on a path x_τ = α·x0 + σ·ε, τ = 0 the image and τ = 1 noise.

    x̂0 = (σ'·x − σ·v)/(σ'·α − σ·α'), on the linear path x − τ·v, is finite at pure noise. Where a network has twice as many output
    as input channels, as the published SiT, the second half is dropped.

    Args:
        network: the network (:class:`~calib_guidance.networks.DiT`, or a :class:`~calib_guidance.networks.UNet`); or a published
            name (``sit_xl_2_256``, ``repa_xl_2_256``); or None, for the one that the checkpoint's shapes tell.
        checkpoint: weights: a ``.pt`` of SiT or REPA (averages are preferred, projectors dropped), or by the names of the
            network; None keeps the network as it is.
        path: ``linear``, ``gvp`` or ``vp``; None takes what the weights were trained with.
        time_direction: ``noise_to_data``: the network's t is 1 − τ (SiT); ``data_to_noise``: τ (REPA). The velocity is that of
            growing t. None takes what the weights were trained with.
        time_scale: what t in [0, 1] is multiplied with for the network; None as for ``path``, 1 in SiT and REPA.
        vae, latent_scale, decode_batch, vae_dtype: see :class:`~calib_guidance.denoisers.dit.DiTDenoiser`; without ``vae``, x̂0
            is decoded only where ``is_latent`` is false.
        latent_stats: file with mean and standard deviation of the autoencoder's latents by channel, in place of ``latent_scale``
            (:func:`~calib_guidance.weights.ldm_vae.latent_statistics`; LightningDiT, REPA-E).
        internal_guidance: w of Internal Guidance, of a network with a head in the middle; None keeps the network's.
            :class:`~calib_guidance.denoisers.MiddleHead` has an interval too.
        is_latent: whether x̂0 are latents; false for models of images, whose x̂0 samplers may clip.
        noise_schedule: ``linear`` or ``cosine``, of 1000 steps: what t means to classifiers, and what discrete samplers
            respace. The network itself knows τ alone.

    Examples:
        >>> from calib_guidance.networks import UNet
        >>> network = UNet(image_size=8, in_channels=1, model_channels=32, out_channels=1, channel_mult=(1,))
        >>> denoiser = FlowDenoiser(network, is_latent=False)  # untrained: v = 0, so x̂0 = x_τ
        >>> predict = denoiser.prepare(denoiser.schedule.at_sigmas([1.0]), None)  # τ = 1/2: x_τ = (x0 + ε)/2
        >>> round(float(predict(torch.ones(1, 1, 8, 8) / 2**0.5, 0).x0.mean()), 4)  # x0 = ε = 1/2
        0.5
    """

    kind = "flow"

    def __init__(
        self,
        network: nn.Module | str | None = None,
        checkpoint: str | None = None,
        path: PathName | None = None,
        time_direction: TimeDirection | None = None,
        time_scale: float | None = None,
        vae: str | nn.Module | dict[str, Any] | None = None,
        latent_scale: float = 0.18215,
        decode_batch: int | None = 4,
        vae_dtype: DecoderDtype | None = None,
        is_latent: bool = True,
        latent_stats: str | None = None,
        internal_guidance: float | None = None,
        noise_schedule: ScheduleName = "linear",
        **kwargs: Any,
    ):
        time_scale = None if time_scale is None else float(time_scale)
        stated = {"prediction": "velocity", "path": path, "time_direction": time_direction, "time_scale": time_scale}
        super().__init__(stated, network, checkpoint, **kwargs)
        if internal_guidance is not None:
            if getattr(self.network, "mid_depth", None) is None:
                raise ValueError("internal_guidance needs a network with a head in the middle (mid_depth)")
            self.network.internal_guidance = internal_guidance
        self.has_learned_variance, self.clip = False, not is_latent
        self.path, self.time_direction = self.settings["path"], self.settings["time_direction"]
        self.time_scale = float(self.settings["time_scale"])
        network_time(path_coefficients(self.path, 0.5).sigma, self.time_direction)  # checks the names
        self.schedule = NoiseSchedule(named_betas(noise_schedule))
        latents: dict[str, Any] = {"latent_scale": latent_scale}
        if latent_stats is not None:
            mean, std = latent_statistics(latent_stats)
            latents = {"latent_scale": (1 / std).tolist(), "latent_mean": mean.tolist()}
        self.set_decoder(vae, decode_batch, vae_dtype, **latents)

    @property
    def max_sigma(self) -> float:
        return float(path_coefficients(self.path, 1.0).ratio) if self.path == "vp" else math.inf

    def decode(self, x0: Tensor) -> Tensor:
        return x0 if self.clip else self.decode_latents(x0)

    def prepare(self, levels: NoiseLevels, y: Tensor | None) -> Predict:
        predict = self.prepare_heads(levels, y, lambda x, emb: (self._decode(x, emb),))
        return lambda x_t, i: predict(x_t, i)[0]

    def prepare_heads(
        self, levels: NoiseLevels, y: Tensor | None, velocities: Callable[[Tensor, Tensor], Sequence[Tensor]]
    ) -> Callable[[Tensor, int | Tensor], list[Prediction]]:
        """:meth:`prepare` of a network with several outputs, ``velocities(x, emb)``."""
        network = self.network
        device = next(network.parameters()).device
        tau = path_time(self.path, levels.alphas_cumprod)
        c = path_coefficients(self.path, tau)
        time = torch.tensor(self.time_scale * network_time(tau, self.time_direction), device=device)
        time = network.embed_time(time.float())
        if y is None or self.num_classes is None:
            y = torch.full((1,), -1, device=device)
        label = 0.0 if network.num_classes is None else network.embed_labels(y)
        sign = 1 if self.time_direction == "data_to_noise" else -1
        divisor = c.d_sigma * c.alpha - c.sigma * c.d_alpha
        # In float64: a sampler that wants the velocity back divides by σ.
        tables = (c.scale, c.d_sigma * c.scale / divisor, -sign * c.sigma / divisor)
        scale, from_x, from_velocity = (torch.tensor(table, device=device) for table in tables)

        def predict(x_t: Tensor, i: int | Tensor) -> list[Prediction]:
            emb = (time[i] + label).expand(len(x_t), -1)
            to_path, a, b = (at_step(table, i).to(x_t.dtype) for table in (scale, from_x, from_velocity))
            outputs = velocities((to_path * x_t).float(), emb)
            return [Prediction(a * x_t + b * output[:, : x_t.shape[1]].to(x_t.dtype)) for output in outputs]

        return predict
