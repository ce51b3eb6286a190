"""The decoder of representation autoencoders (Zheng et al. 2025, arXiv 2510.11690): images of the latents of a vision model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.errors import CheckpointError
from calib_guidance.networks.lightningdit import unpatch
from calib_guidance.weights.io import Weights, load_weights, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rae_statistics(source: str | dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents, ``(C, h, w)`` each, of ``stat.pt`` (``mean`` and ``var``); None is 0 and 1."""
    if source is None:
        return torch.zeros(1), torch.ones(1)
    tables = source if isinstance(source, dict) else read_weights(source).state
    if not {"mean", "var"} <= tables.keys():
        raise CheckpointError(f"{source}: expected mean and var of latents")
    return tables["mean"].float(), (tables["var"].float() + 1e-5).sqrt()


def register_statistics(
    module: nn.Module,
    latents: str | dict[str, Tensor] | None,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> None:
    """Buffers ``latent_mean``, ``latent_std``, ``image_mean`` and ``image_std``, which are not in the files of weights."""
    latent_mean, latent_std = rae_statistics(latents)
    buffers = {"latent_mean": latent_mean, "latent_std": latent_std}
    buffers |= {
        "image_mean": torch.tensor(image_mean).view(3, 1, 1),
        "image_std": torch.tensor(image_std).view(3, 1, 1),
    }
    for name, value in buffers.items():
        module.register_buffer(name, value.float(), persistent=False)


def attend(x: Tensor, heads: int, query: nn.Module, key: nn.Module, value: nn.Module, out: nn.Module) -> Tensor:
    """Self-attention of tokens ``(N, L, C)``."""
    q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (query, key, value))
    return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def depth_of(state: dict[str, Tensor], prefix: str) -> int:
    """Number of layers ``prefix.0``, ``prefix.1`` … in a state dict."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in state if name.startswith(f"{prefix}.")})


class _Layer(nn.Module):
    """A layer of a vision transformer, by the names of transformers' ViT."""

    attention: Any
    intermediate: Any
    output: Any

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention, self.intermediate, self.output = nn.Module(), nn.Module(), nn.Module()
        self.attention.attention, self.attention.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention.attention, name, nn.Linear(width, width))
        self.attention.output.dense = nn.Linear(width, width)
        self.intermediate.dense, self.output.dense = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y, inner = self.layernorm_before(x), self.attention.attention
        x = x + attend(y, self.heads, inner.query, inner.key, inner.value, self.attention.output.dense)
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class RAEDecoder(nn.Module):
    """Decoder of representation autoencoders (RAE).

    Latents ``(N, C, h, w)``, normalized at every position, to images ``(N, 3, p·h, p·w)`` in about [-1, 1].

    Args:
        checkpoint: ``model.pt`` of a decoder, which tells its sizes; None makes the ViT-XL of 256×256 with random weights.
        statistics: ``stat.pt`` with ``mean`` and ``var`` of the latents, ``(C, h, w)`` each; None takes 0 and 1.
        num_heads: attention heads, 16 of the published decoders.
        image_mean, image_std: of the pixels in [0, 1], ImageNet's.
        eps: of the layer norms.
    """

    latent_mean: Tensor
    latent_std: Tensor
    image_mean: Tensor
    image_std: Tensor
    decoder_pos_embed: Tensor

    def __init__(
        self,
        checkpoint: str | dict[str, Tensor] | None,
        statistics: str | dict[str, Tensor] | None = None,
        num_heads: int = 16,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        eps: float = 1e-12,
    ):
        super().__init__()
        state: dict[str, Tensor] = {}
        width, channels, depth, hidden, pixels, tokens = 1152, 768, 28, 4096, 3 * 16**2, 257
        if checkpoint is not None:
            read: Any = checkpoint if isinstance(checkpoint, dict) else read_weights(checkpoint).state
            state = {name.removeprefix("decoder."): value for name, value in read.items()}
            if not {"decoder_embed.weight", "decoder_pred.weight", "decoder_pos_embed"} <= state.keys():
                raise CheckpointError(f"{checkpoint}: expected a decoder of RAE, with decoder_embed and decoder_pred")
            width, channels = state["decoder_embed.weight"].shape
            depth = depth_of(state, "decoder_layers")
            hidden = len(state["decoder_layers.0.intermediate.dense.weight"])
            pixels, tokens = len(state["decoder_pred.weight"]), state["decoder_pos_embed"].shape[1]
        self.patch = round((pixels / 3) ** 0.5)
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, tokens, width))
        self.decoder_layers = nn.ModuleList([_Layer(width, hidden, num_heads, eps) for _ in range(depth)])
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(width, eps), nn.Linear(width, pixels)
        if checkpoint is not None:
            load_weights(self, Weights(checkpoint if isinstance(checkpoint, str) else "decoder", state))
        register_statistics(self, statistics, image_mean, image_std)

    def forward(self, latents: Tensor) -> Tensor:
        z = latents.float() * self.latent_std + self.latent_mean
        x = self.decoder_embed(z.flatten(2).transpose(1, 2))
        x = torch.cat([self.trainable_cls_token.expand(len(x), 1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        pixels = unpatch(self.decoder_pred(self.decoder_norm(x))[:, 1:], self.patch, 3)
        return (2 * (pixels * self.image_std + self.image_mean) - 1).to(latents.dtype)
