"""The diffusion models of EDM2 (Karras et al. 2024, https://arxiv.org/abs/2312.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from calib_guidance.denoisers.decoders import EDM2_MEAN, EDM2_STD, DecoderDtype
from calib_guidance.denoisers.edm import EDMDenoiser
from calib_guidance.denoisers.latents import DecodesLatents
from calib_guidance.networks.edm2 import EDM2UNet


class EDM2Denoiser(DecodesLatents, EDMDenoiser):
    """A network of EDM2 under EDM's preconditioning, of images (three channels) or of latents (four).

    Its weights are normalized once, here. Latents are (raw − mean)·0.5/std; the autoencoder's decoder is taken to give images
    in [0, 1], as EDM2 uses it.

    Args:
        network: the network; or a published name (``edm2_img64_s``, ``edm2_img512_xxl``); or None, for the one that the
            checkpoint tells.
        checkpoint: a ``.pkl`` of EDM2, or weights by its names; None keeps the network as it is.
        half_gains: round gains over √fan_in to float16, as where the published files run; without it the network's output differs
            by up to 5e-4 of itself. None does so for published files, and not for others.
        vae, decode_batch, vae_dtype: see :class:`~calib_guidance.denoisers.dit.DiTDenoiser`, of latents.
        latent_mean, latent_std: of the autoencoder's latents, by channel.

    See :class:`~calib_guidance.denoisers.edm.EDMDenoiser` for the others.

    Examples:
        >>> network = EDM2UNet(image_size=8, in_channels=3, model_channels=32, channel_mult=(1,), num_blocks=1)
        >>> denoiser = EDM2Denoiser(network)  # untrained: F = 0, so D = c_skip·x
        >>> predict = denoiser.prepare(denoiser.schedule.at_sigmas([1.0]), None)
        >>> round(float(predict(torch.ones(1, 3, 8, 8) / 2**0.5, 0).x0.mean()), 4)  # c_skip = 0.25/(1 + 0.25)
        0.2
    """

    kind = "edm2"

    def __init__(
        self,
        network: EDM2UNet | str | None = None,
        checkpoint: str | None = None,
        sigma_data: float = 0.5,
        half_gains: bool | None = None,
        vae: str | nn.Module | dict[str, Any] | None = None,
        decode_batch: int | None = 4,
        vae_dtype: DecoderDtype | None = None,
        latent_mean: Sequence[float] = EDM2_MEAN,
        latent_std: Sequence[float] = EDM2_STD,
        **kwargs: Any,
    ):
        own: Any = network  # not a UNet, as EDMDenoiser's
        super().__init__(own, checkpoint, sigma_data, **kwargs)
        self.network.fold(bool(self.provenance.get("published")) if half_gains is None else half_gains)
        self.clip = self.network.in_channels != len(latent_std)
        scale = [0.5 / std for std in latent_std]
        self.set_decoder(vae, decode_batch, vae_dtype, latent_scale=scale, latent_mean=latent_mean, unit_range=True)

    def decode(self, x0: Tensor) -> Tensor:
        return x0 if self.clip else self.decode_latents(x0)
