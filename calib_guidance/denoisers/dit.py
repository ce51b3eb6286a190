"""Diffusion transformers over the latents of an autoencoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from calib_guidance.denoisers.decoders import DecoderDtype, VAEDecoder
from calib_guidance.denoisers.discrete import DiscreteDenoiser
from calib_guidance.diffusion.parameterization import Parameterization
from calib_guidance.diffusion.schedules import ScheduleName
from calib_guidance.errors import check_numbers
from calib_guidance.networks.dit import DiT


class DiTDenoiser(DiscreteDenoiser):
    """A DiT with a learned variance, and the decoder that makes images of its latents.

    Args:
        network: the transformer, or its name, such as ``dit_xl_2_256`` (see :func:`~calib_guidance.weights.dit.named_dit`);
            None takes what a diffusers folder's configuration says, or the published network that has the checkpoint's shapes.
        checkpoint: weights: an official ``.pt``, safetensors by the names of the official files, of diffusers or of
            :class:`~calib_guidance.networks.DiT`, a diffusers folder (of the model or its pipeline) or ``hf://OWNER/NAME``.
        vae: as for :class:`~calib_guidance.denoisers.decoders.VAEDecoder`; or any module from latents to images. None is for a
            model whose latents are never decoded, such as the negative of autoguidance.
        latent_scale: what the autoencoder's latents were multiplied with for the diffusion model.
        decode_batch: latents that are decoded at a time; None decodes all.
        noise_schedule, num_steps, prediction: see :class:`~calib_guidance.denoisers.discrete.DiscreteDenoiser`.
        class_conditional: false hands the null class to the network always.
        vae_dtype: ``float32`` (None) or ``bfloat16`` of an autoencoder's decoder. Another module has a dtype of its own.
    """

    kind = "dit"
    clip = False

    def __init__(
        self,
        network: DiT | str | None = None,
        checkpoint: str | None = None,
        vae: str | nn.Module | dict[str, Any] | None = None,
        latent_scale: float = 0.18215,
        decode_batch: int | None = 4,
        noise_schedule: ScheduleName = "linear",
        num_steps: int = 1000,
        prediction: Parameterization = "epsilon",
        vae_dtype: DecoderDtype | None = None,
        **kwargs: Any,
    ):
        check_numbers(least=1, null="all at once", decode_batch=decode_batch)
        super().__init__(network, checkpoint, noise_schedule, num_steps, prediction, image_size=None, **kwargs)
        self.decode_batch = decode_batch
        if isinstance(vae, str | dict) or hasattr(vae, "quant_conv"):
            vae = VAEDecoder(vae, latent_scale, vae_dtype or "float32")
        elif vae_dtype is not None:
            raise ValueError("vae_dtype is for an autoencoder (vae); a decoder of your own has its own (init_args)")
        self.vae = None if vae is None else vae.eval().requires_grad_(False)

    def decode(self, x0: Tensor) -> Tensor:
        """Images ``(N, 3, 8h, 8w)`` of latents ``(N, C, h, w)``, in about [-1, 1]."""
        if self.vae is None:
            raise ValueError("this denoiser has no decoder of latents: set vae to the autoencoder's folder")
        *parts, last = x0.split(self.decode_batch or len(x0))
        if not (torch.is_grad_enabled() and x0.requires_grad):
            return torch.cat([*map(self.vae, parts), self.vae(last)])
        # The way back begins with the part that was decoded last, so that its activations may stay.
        images = [recomputed(self.vae, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat([*images, self.vae(last)])
