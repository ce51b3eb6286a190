"""LightningDiT (Yao et al. 2025, arXiv 2501.01423): a DiT with rotary positions, SwiGLU and RMSNorm; with the head of Internal
Guidance (arXiv 2512.24176) where asked. Parameter names are those of the published files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend import tuning
from calib_guidance.backend.precision import Dtype, dtype_of
from calib_guidance.networks.adm import timestep_embedding

_FREQUENCIES = 256


class RMSNorm(nn.Module):
    """x/√(mean x² + 1e-6)·weight, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * self.weight


def make_norm(width: int, rms: bool) -> nn.Module:
    """RMSNorm, or a LayerNorm without parameters."""
    return RMSNorm(width) if rms else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor | float, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, of tokens ``(N, T, D)`` by one number per channel, or per token."""
    return x * (1 + scale) + shift


class Rotary(nn.Module):
    """Rotary positions on a square grid: half of a head's channels turn with the row, the others with the column.

    Neighboring channels 2j and 2j + 1 are a pair, with the angle position·10000^(−2j/(head_dim/2)).
    """

    def __init__(self, head_dim: int, grid: int):
        super().__init__()
        half = head_dim // 2
        rates = 10_000.0 ** -(torch.arange(0, half, 2).double() / half)
        angles = torch.outer(torch.arange(grid).double(), rates).repeat_interleave(2, dim=1)
        angles = torch.cat([angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)], dim=1).float()
        self.register_buffer("freqs_cos", angles.cos())  # part of the published files
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention with channels [q,k,v][head][channel] and rotary q and k.

    ``qk_norm`` normalizes both over the channels of a head before they turn, by RMSNorm where ``rms``, else LayerNorm.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, rms: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        norm = (RMSNorm if rms else nn.LayerNorm) if qk_norm else None
        self.q_norm, self.k_norm = (nn.Identity() if norm is None else norm(width // heads) for _ in "qk")

    def forward(self, x: Tensor, rope: nn.Module) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        return self.proj(tuning.attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class SwiGLU(nn.Module):
    """w3(SiLU(x1)·x2) with [x1, x2] = w12(x)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class MLP(nn.Module):
    """Two layers and a GELU (tanh) between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class AdaLN(nn.Sequential):
    """``parts`` modulations of ``width`` channels from a condition, ``(N, D)`` or ``(N, T, D)``; ``(N, 1 or T, width)`` each."""

    def __init__(self, condition: int, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(condition, parts * width))
        self.parts = parts

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        out = super().forward(c)
        return (out[:, None] if out.ndim == 2 else out).chunk(self.parts, dim=-1)


class LightningBlock(nn.Module):
    """Attention and MLP, each modulated and gated. ``shift`` false leaves the shifts out."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        swiglu: bool = True,
        rms: bool = True,
        shift: bool = True,
    ):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.shift = shift
        self.norm1, self.norm2 = make_norm(width, rms), make_norm(width, rms)
        self.attn = RotaryAttention(width, heads, qk_norm, rms)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if swiglu else MLP(width, hidden)
        self.adaLN_modulation = AdaLN(width, width, 6 if shift else 4)

    def forward(self, x: Tensor, c: Tensor, rope: nn.Module) -> Tensor:
        parts = self.adaLN_modulation(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (
            parts if self.shift else (0.0, *parts[:2], 0.0, *parts[2:])
        )
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rope)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm, and the pixels of every token."""

    def __init__(self, width: int, out: int, rms: bool = True):
        super().__init__()
        self.norm_final, self.linear = make_norm(width, rms), nn.Linear(width, out)
        self.adaLN_modulation = AdaLN(width, width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c)))


class Patches(nn.Module):
    """Tokens of patches, row by row."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatch(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Images ``(N, C, H, W)`` of square grids of tokens, each [py][px][channel]; the first ``channels`` of them."""
    n, count, _ = tokens.shape
    grid = round(count**0.5)
    images = tokens.view(n, grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(n, -1, grid * patch, grid * patch)[:, :channels]


def sine_positions(width: int, grid: int) -> Tensor:
    """Table ``(1, grid², width)``: the first half of the channels tells the column, the second the row; each [sin, cos]."""
    rates = 10_000.0 ** -(torch.arange(width // 4).double() / (width / 4))
    angles = torch.outer(torch.arange(grid).double(), rates)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([table.repeat(grid, 1), table.repeat_interleave(grid, dim=0)], dim=1).float()[None]


class LatentTransformer(nn.Module):
    """What LightningDiT and the networks of RAE share: sizes, labels and checks."""

    def __init__(self, sample_size: int, in_channels: int, num_classes: int, width: int, dtype: Dtype):
        super().__init__()
        self.dtype = dtype_of(dtype)
        self.image_size, self.in_channels, self.out_channels = sample_size, in_channels, in_channels
        self.num_classes = num_classes
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, width)

    def cast(self) -> None:
        """Set the number format of all but the embeddings, once every part exists."""
        for name, part in self.named_children():
            if name not in ("t_embedder", "y_embedder"):
                part.to(self.dtype)
        self.pos_embed = self.pos_embed.to(self.dtype)

    def check_image(self, shape: Sequence[int]) -> None:
        """Raise ValueError if latents of ``(C, H, W)`` do not fit the network."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(shape) != expected:
            raise ValueError(f"latents of {tuple(shape)} do not fit the network, which takes {expected}")

    def embed_labels(self, y: Tensor) -> Tensor:
        """Class part of the embedding; a label of -1 is the null class."""
        return self.y_embedder.embedding_table(torch.where(y < 0, self.num_classes, y))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity ``(N, C, H, W)`` of latents at ``t`` ``(N,)`` with labels ``(N,)``."""
        return self.decode(x, self.embed_time(t) + self.embed_labels(y))


class LightningDiT(LatentTransformer):
    """A diffusion transformer over latents; the published XL/1 by default.

    Args:
        sample_size: side of the latents.
        in_channels: of the latents.
        num_classes: K; label K of the table is the null class.
        hidden_size, depth, num_heads, patch_size: width, blocks, attention heads, side of a token.
        qk_norm: normalize queries and keys.
        swiglu, rope, rms: SwiGLU, rotary positions and RMSNorm, as published; else an MLP, none, and LayerNorm.
        shift: modulations have shifts.
        learn_sigma: the file has twice the output channels; the second half is dropped.
        mid_depth: block after which the head of Internal Guidance reads the tokens; None has no such head.
        internal_guidance: w of v_mid + w·(v − v_mid), where there is that head; 1 is v.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``, of all but the embeddings; the velocity is float32.

    Examples:
        >>> network = LightningDiT(sample_size=4, in_channels=4, num_classes=10, hidden_size=32, depth=1, num_heads=2)
        >>> network(torch.zeros(2, 4, 4, 4), torch.tensor([0.0, 1.0]), torch.tensor([3, 10])).shape  # 10: no class
        torch.Size([2, 4, 4, 4])
    """

    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 32,
        num_classes: int = 1000,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        patch_size: int = 1,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms: bool = True,
        shift: bool = True,
        learn_sigma: bool = False,
        mid_depth: int | None = None,
        internal_guidance: float = 1.0,
        dtype: Dtype = "float32",
    ):
        super().__init__(sample_size, in_channels, num_classes, hidden_size, dtype)
        if sample_size % patch_size or hidden_size % (4 * num_heads):
            raise ValueError(
                f"sample_size must be a multiple of patch_size ({patch_size}) and hidden_size of 4·num_heads, got {sample_size} "
                f"and {hidden_size}"
            )
        if mid_depth is None and internal_guidance != 1:
            raise ValueError("internal_guidance needs the head of mid_depth (8 in the published XL/1)")
        grid, out = sample_size // patch_size, patch_size**2 * in_channels * (1 + learn_sigma)
        self.patch_size, self.mid_depth, self.internal_guidance = patch_size, mid_depth, internal_guidance
        self.x_embedder = Patches(in_channels, hidden_size, patch_size)
        self.register_buffer("pos_embed", sine_positions(hidden_size, grid))
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.feat_rope = Rotary(hidden_size // num_heads, grid) if rope else nn.Identity()
        block = {"qk_norm": qk_norm, "swiglu": swiglu, "rms": rms, "shift": shift}
        self.blocks = nn.ModuleList([LightningBlock(hidden_size, num_heads, **block) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, out, rms)
        if mid_depth is not None:
            self.final_layer_xr = FinalLayer(hidden_size, out, rms)
        self.cast()

    def embed_time(self, t: Tensor) -> Tensor:
        """Time part of the embedding: t in [0, 1] ``(N,)`` to ``(N, hidden_size)``."""
        return self.t_embedder.mlp(timestep_embedding(t, _FREQUENCIES))

    def velocities(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor | None]:
        """v and v_mid, of the head of Internal Guidance; ``(N, C, H, W)`` each."""
        tokens, mid = self.x_embedder(x) + self.pos_embed, None
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, emb, self.feat_rope)
            if number == self.mid_depth:
                mid = unpatch(self.final_layer_xr(tokens, emb), self.patch_size, self.in_channels)
        return unpatch(self.final_layer(tokens, emb), self.patch_size, self.in_channels), mid

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        """The velocity of ``x`` ``(N, C, H, W)`` with a ready embedding ``(N, hidden_size)``."""
        v, mid = self.velocities(x.to(self.dtype), emb.to(self.dtype))
        guided = v if mid is None or self.internal_guidance == 1 else mid + self.internal_guidance * (v - mid)
        return guided.to(emb.dtype)
