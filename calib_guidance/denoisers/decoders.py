"""From latents as the diffusion model has them ``(N, 4, h, w)`` to images ``(N, 3, 8h, 8w)`` in about [-1, 1]."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend.precision import dtype_of
from calib_guidance.errors import check_choice, check_numbers
from calib_guidance.weights.diffusers_folder import is_folder, load_model
from calib_guidance.weights.hub import FILES
from calib_guidance.weights.io import load_weights, save_weights
from calib_guidance.weights.ldm_vae import read_ldm_decoder

Upsampling = Literal["nearest", "bilinear"]
DecoderDtype = Literal["float32", "bfloat16"]
Latents = Literal["stable_diffusion", "edm2"]
# Of the latents of stabilityai/sd-vae-ft-mse that EDM2 was trained on, by channel.
EDM2_STD = (4.17, 4.62, 3.71, 3.28)
EDM2_MEAN = (5.81, 3.25, 0.12, -2.15)


class VAEDecoder(nn.Module):
    """The decoder of a variational autoencoder of Stable Diffusion's kind.

    Args:
        vae: diffusers folder or ``hf://OWNER/NAME`` of an ``AutoencoderKL``; a file by the names of latent diffusion's code
            (VA-VAE, REPA-E); one that is built already; or the arguments of one with random weights.
        latent_scale: what the autoencoder's latents were multiplied with for the diffusion model, one number or one per channel.
        latent_mean: what was subtracted from them before, by channel; None is nothing.
        unit_range: take what it decodes for images in [0, 1], as EDM2 does.
        dtype: ``float32`` or ``bfloat16``. float16 is not offered: the classifier's gradients underflow in it.

    Examples:
        >>> sizes = {"latent_channels": 4, "block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2,
        ...          "up_block_types": ["UpDecoderBlock2D"] * 2}
        >>> VAEDecoder(sizes, latent_scale=0.18215)(torch.zeros(1, 4, 4, 4)).shape  # random weights
        torch.Size([1, 3, 8, 8])
    """

    decoder: Any
    post_quant_conv: nn.Module
    scale: Tensor
    mean: Tensor

    def __init__(
        self,
        vae: str | nn.Module | dict[str, Any],
        latent_scale: float | Sequence[float] = 0.18215,
        dtype: DecoderDtype = "float32",
        latent_mean: Sequence[float] | None = None,
        unit_range: bool = False,
    ):
        super().__init__()
        check_numbers(above=0, latent_scale=min(np.atleast_1d(latent_scale).tolist()))
        scale = torch.as_tensor(latent_scale, dtype=torch.float32).view(-1, 1, 1)
        built: Any = vae
        if isinstance(vae, str) and Path(vae.split("@")[0]).suffix in FILES and not is_folder(vae):
            built = read_ldm_decoder(vae)
        elif not isinstance(vae, nn.Module):
            built = load_model(vae, "AutoencoderKL", "vae")
        # The encoder stays behind, 34 of 84 million parameters.
        self.post_quant_conv, self.decoder = built.post_quant_conv or nn.Identity(), built.decoder
        self.latent_scale, self.unit_range = latent_scale, unit_range
        self.to(dtype_of(dtype, get_args(DecoderDtype))).to(memory_format=torch.channels_last)
        mean = torch.zeros(1) if latent_mean is None else torch.as_tensor(latent_mean, dtype=torch.float32)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        z = (latents / self.scale + self.mean).to(self.decoder.conv_in.weight.dtype)
        images = self.decoder(self.post_quant_conv(z)).to(latents.dtype)
        return 2 * images - 1 if self.unit_range else images


class TinyDecoder(nn.Module):
    """The decoder of a tiny autoencoder (TAESD), a distilled stand-in for the full one.

    Args:
        source: of an ``AutoencoderTiny``, as for :class:`VAEDecoder`. Its ``scaling_factor`` divides latents.
        latents: those of the diffusion model: ``stable_diffusion``, which a tiny autoencoder decodes, or ``edm2``, whose mean,
            scale and range of pixels differ.

    Examples:
        >>> sizes = {"encoder_block_out_channels": [64] * 2, "decoder_block_out_channels": [64] * 2,
        ...          "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
        >>> TinyDecoder(sizes)(torch.zeros(1, 4, 4, 4)).shape  # random weights
        torch.Size([1, 3, 8, 8])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, source: str | nn.Module | dict[str, Any] = "hf://madebyollin/taesd", latents: Latents = "stable_diffusion"
    ):
        super().__init__()
        check_choice("latents", latents, get_args(Latents))
        model: Any = source if isinstance(source, nn.Module) else load_model(source, "AutoencoderTiny", "vae")
        self.decoder, self.unit_range = model.decoder, latents == "edm2"
        scale, shift = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        if self.unit_range:  # to Stable Diffusion's latents, 0.18215 times what the autoencoder encodes
            scale = 0.18215 * torch.tensor(EDM2_STD).view(-1, 1, 1) / 0.5
            shift = 0.18215 * torch.tensor(EDM2_MEAN).view(-1, 1, 1)
        self.register_buffer("scale", scale / model.config.scaling_factor, persistent=False)
        self.register_buffer("shift", shift / model.config.scaling_factor, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        images = self.decoder((latents * self.scale + self.shift).to(self.scale.dtype)).to(latents.dtype)
        return 2 * images - 1 if self.unit_range else images


class LinearDecoder(nn.Module):
    """Linear decoder: one map from the channels of latents to colors, upsampled. It has no textures and costs almost nothing.

    Args:
        checkpoint: what :meth:`save` wrote; None starts at zero.
        upsampling: ``nearest`` or ``bilinear``, with which the map was fitted.
        factor: pixels of the image to a latent's, along each side.
        channels: of the latents.

    Examples:
        >>> def decode(latents):  # to be approximated
        ...     return 2 * latents.repeat(1, 3, 1, 1) + 1
        >>> decoder, explained = fit_linear_decoder(decode, [torch.tensor([[[[0.0, 1.0]]]])])
        >>> decoder(torch.full((1, 1, 1, 1), 3.0)).flatten(), round(explained, 4)
        (tensor([7., 7., 7.], grad_fn=<ViewBackward0>), 1.0)
    """

    def __init__(
        self, checkpoint: str | None = None, upsampling: Upsampling = "bilinear", factor: int = 8, channels: int = 4
    ):
        super().__init__()
        check_choice("upsampling", upsampling, get_args(Upsampling))
        self.upsampling, self.factor = upsampling, factor
        self.map = nn.Conv2d(channels, 3, 1)
        for parameter in self.map.parameters():
            nn.init.zeros_(parameter)
        if checkpoint is not None:
            load_weights(self, checkpoint, upsampling=upsampling, factor=factor)

    def upsample(self, latents: Tensor) -> Tensor:
        """Latents at the size of the image. Goes before or after the map alike."""
        return F.interpolate(latents, scale_factor=self.factor, mode=self.upsampling)

    def forward(self, latents: Tensor) -> Tensor:
        return self.upsample(
            self.map(latents.to(self.map.weight.dtype)).to(latents.dtype)
        )  # the map first: fewer pixels

    def save(self, path: str) -> None:
        """Write the map, with the settings that it was fitted with."""
        save_weights(self, path, upsampling=self.upsampling, factor=self.factor)


@torch.no_grad()
def fit_linear_decoder(
    decode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], upsampling: Upsampling = "bilinear"
) -> tuple[LinearDecoder, float]:
    """The linear decoder nearest to ``decode``, such as a :class:`VAEDecoder`, in squared error, by the normal equations.

    Args:
        batches: latents ``(N, C, h, w)``, of images or of samples; some dozens are plenty for the 5 numbers of a color.

    Returns:
        The decoder, and the fraction of the images' variance about their mean color that it explains.
    """
    linear, zero = None, torch.zeros((), dtype=torch.float64)
    inner, cross, total, mean = zero, zero, zero, zero
    for latents in batches:
        images = decode(latents)
        if linear is None:
            factor = images.shape[-1] // latents.shape[-1]
            linear = LinearDecoder(None, upsampling, factor, latents.shape[1])
        # Upsampling is linear and keeps constants, so that pixels can be regressed on upsampled latents.
        a = linear.upsample(latents.double()).movedim(1, -1).reshape(-1, latents.shape[1])
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        b = images.double().movedim(1, -1).reshape(-1, 3)
        inner, cross = inner + a.T @ a, cross + a.T @ b
        total, mean = total + b.square().sum(), mean + b.sum(dim=0)
    if linear is None:
        raise ValueError("no latents to fit the linear decoder to")
    if torch.linalg.matrix_rank(inner) < len(inner):
        raise ValueError("these latents leave the linear decoder undetermined: give more, or more varied ones")
    solution = torch.linalg.solve(inner, cross)
    linear.map.load_state_dict({"weight": solution[:-1].T[..., None, None], "bias": solution[-1]})
    residual = total - (solution * cross).sum()
    spread = total - (mean.square() / inner[-1, -1]).sum()
    return linear.eval(), float(1 - residual / spread)
