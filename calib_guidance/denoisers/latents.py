"""Latents of an autoencoder, decoded a few at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from calib_guidance.denoisers.decoders import DecoderDtype, VAEDecoder
from calib_guidance.errors import check_numbers


class DecodesLatents:
    """Part of a denoiser whose x̂0 may be latents: :meth:`set_decoder` at the end of ``__init__``."""

    decode_batch: int | None
    vae: nn.Module | None

    def set_decoder(
        self,
        vae: str | nn.Module | dict[str, Any] | None,
        decode_batch: int | None,
        vae_dtype: DecoderDtype | None,
        **latents: Any,
    ) -> None:
        """Keep the decoder of ``vae``: an autoencoder, whose latents are as ``latents`` says, or any module.

        ``latents`` are the further arguments of :class:`~calib_guidance.denoisers.decoders.VAEDecoder`.
        """
        check_numbers(least=1, null="all at once", decode_batch=decode_batch)
        self.decode_batch = decode_batch
        if isinstance(vae, str | dict) or (vae is not None and hasattr(vae, "quant_conv")):
            vae = VAEDecoder(vae, dtype=vae_dtype or "float32", **latents)
        elif vae_dtype is not None:
            raise ValueError("vae_dtype is for an autoencoder (vae); a decoder of your own has its own (init_args)")
        self.vae = None if vae is None else vae.eval().requires_grad_(False)

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Images ``(N, 3, f·h, f·w)`` of latents ``(N, C, h, w)``, in about [-1, 1]."""
        if self.vae is None:
            raise ValueError("this denoiser has no decoder of latents: set vae to the autoencoder's folder")
        *parts, last = x0.split(self.decode_batch or len(x0))
        if not (torch.is_grad_enabled() and x0.requires_grad):
            return torch.cat([*map(self.vae, parts), self.vae(last)])
        # The backward pass starts with the part that was decoded last. Its activations are kept.
        images = [recomputed(self.vae, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat([*images, self.vae(last)])
