"""The network of RAE (Zheng et al. 2025, arXiv 2510.11690): a DiT and a wide, shallow head on the latents of a vision model.

Parameter names are those of the published files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend.precision import Dtype
from calib_guidance.networks.lightningdit import (
    FinalLayer,
    LatentTransformer,
    LightningBlock,
    Patches,
    Rotary,
    sine_positions,
    unpatch,
)

_FREQUENCIES = 256


class _FourierTime(nn.Module):
    """[sin, cos] of 2π·t·W, W random and part of the weights, then two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(_FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * torch.outer(t.float(), self.W)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class DiTDH(LatentTransformer):
    """An encoder that makes one condition per token, and a wide head that reads the latents again under them.

    Args:
        sample_size: side of the latents, 16 at 256×256 and 32 at 512×512.
        in_channels: of the latents, 768 of DINOv2-B.
        num_classes: K; label K of the table is the null class.
        hidden_size, depth, num_heads: of encoder and head; the published XL by default.
        dtype: ``float32`` (published), ``float16``, ``bfloat16`` or ``auto``, of all but the embeddings; the velocity is float32.

    Examples:
        >>> import torch
        >>> network = DiTDH(4, in_channels=8, num_classes=10, hidden_size=(32, 64), depth=(1, 1), num_heads=(2, 2))
        >>> network(torch.zeros(2, 8, 4, 4), torch.tensor([0.0, 1.0]), torch.tensor([3, 10])).shape  # 10: no class
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 768,
        num_classes: int = 1000,
        hidden_size: Sequence[int] = (1152, 2048),
        depth: Sequence[int] = (28, 2),
        num_heads: Sequence[int] = (16, 16),
        dtype: Dtype = "float32",
    ):
        width, wide = hidden_size
        super().__init__(sample_size, in_channels, num_classes, width, dtype)
        self.encoder_depth = depth[0]
        self.s_embedder, self.x_embedder = Patches(in_channels, width, 1), Patches(in_channels, wide, 1)
        self.s_projector = nn.Linear(width, wide) if width != wide else nn.Identity()
        self.register_buffer("pos_embed", sine_positions(width, sample_size))
        self.t_embedder = _FourierTime(width)
        self.enc_feat_rope = Rotary(width // num_heads[0], sample_size)
        self.dec_feat_rope = Rotary(wide // num_heads[1], sample_size)
        encoder = [LightningBlock(width, num_heads[0]) for _ in range(depth[0])]
        self.blocks = nn.ModuleList([*encoder, *(LightningBlock(wide, num_heads[1]) for _ in range(depth[1]))])
        self.final_layer = FinalLayer(wide, in_channels)
        self.cast()

    def embed_time(self, t: Tensor) -> Tensor:
        """The time embedding twice, ``(N, 2·width)``: labels are added to the first, and the head reads the second."""
        emb = self.t_embedder(t)
        return torch.cat([emb, emb], dim=1)

    def embed_labels(self, y: Tensor) -> Tensor:
        emb = super().embed_labels(y)
        return torch.cat([emb, torch.zeros_like(emb)], dim=1)

    def conditions(self, x: Tensor, emb: Tensor) -> Tensor:
        """One condition per token for the head, ``(N, T, wide)``."""
        with_label, time = emb.chunk(2, dim=1)
        s, c = self.s_embedder(x) + self.pos_embed, F.silu(with_label)
        for block in self.blocks[: self.encoder_depth]:
            s = block(s, c, self.enc_feat_rope)
        return self.s_projector(F.silu(time[:, None] + s))

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        """The velocity of ``x`` ``(N, C, H, W)`` with a ready embedding ``(N, 2·width)``."""
        x, kept = x.to(self.dtype), emb.dtype
        s, tokens = self.conditions(x, emb.to(self.dtype)), self.x_embedder(x)
        for block in self.blocks[self.encoder_depth :]:
            tokens = block(tokens, s, self.dec_feat_rope)
        return unpatch(self.final_layer(tokens, s), 1, self.in_channels).to(kept)
