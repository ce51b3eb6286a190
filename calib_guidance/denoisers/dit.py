"""Diffusion transformers over the latents of an autoencoder."""

from typing import Any

from torch import Tensor, nn

from calib_guidance.denoisers.decoders import DecoderDtype
from calib_guidance.denoisers.discrete import DiscreteDenoiser
from calib_guidance.denoisers.latents import DecodesLatents
from calib_guidance.diffusion.parameterization import Parameterization
from calib_guidance.diffusion.schedules import ScheduleName
from calib_guidance.networks.dit import DiT


class DiTDenoiser(DecodesLatents, DiscreteDenoiser):
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

    Examples:
        >>> network = DiT(sample_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> denoiser = DiTDenoiser(network)  # untrained
        >>> denoiser.image_shape, denoiser.num_classes, denoiser.has_learned_variance
        ((4, 4, 4), 10, True)
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
        super().__init__(network, checkpoint, noise_schedule, num_steps, prediction, image_size=None, **kwargs)
        self.set_decoder(vae, decode_batch, vae_dtype, latent_scale=latent_scale)

    def decode(self, x0: Tensor) -> Tensor:
        return self.decode_latents(x0)
