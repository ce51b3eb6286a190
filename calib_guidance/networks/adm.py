"""The UNet and the noise-aware classifier of ADM (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233).

Parameter names and shapes are those of the published guided-diffusion checkpoints, which therefore load without
conversion. What differs is how they run: channels-last, fused attention, no gradient checkpointing, and embeddings that
can be computed once per trajectory (:meth:`UNet.embed`) instead of once per step.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend import tuning
from calib_guidance.backend.precision import Dtype, dtype_of
from calib_guidance.backend.tuning import pointwise

_GROUPS = 32


@lru_cache(maxsize=32)
def _frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    """``(half,)`` float32: made once, where a network is called at every step."""
    with torch.inference_mode(False):  # tensors of inference mode could not be part of a gradient later
        steps = torch.arange(half, dtype=torch.float32, device=device)
        return torch.exp(-math.log(max_period) * steps / half)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding ``(N, dim)`` float32, cosines first, of ``timesteps`` ``(N,)``; the longest wave is 2π·max_period."""
    # The compiler makes constants of its own, and warns of a cache.
    frequencies = _frequencies.__wrapped__ if torch.compiler.is_compiling() else _frequencies
    angles = timesteps[:, None].float() * frequencies(dim // 2, max_period, timesteps.device)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class GroupNorm(nn.GroupNorm):
    """32 groups, or fewer where they would be narrower than ``min_group_channels``, as ``tuning.group_norm`` computes it."""

    def __init__(self, channels: int, min_group_channels: int | None = None):
        groups = min(_GROUPS, channels // min_group_channels) if min_group_channels else _GROUPS
        if groups == 0 or channels % groups:
            least = groups or min_group_channels
            raise ValueError(f"widths must be a multiple of {least}, got {channels}: set model_channels, channel_mult")
        super().__init__(groups, channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return tuning.group_norm(self, x, scale, shift)


class SiLU(nn.SiLU):
    """SiLU of a tensor that nothing else reads, see :func:`~calib_guidance.backend.tuning.silu`."""

    def forward(self, x: Tensor) -> Tensor:
        return tuning.silu(x)


def _upsample(channels: int, with_conv: bool = True) -> nn.Module:
    """Nearest-neighbor doubling, then a 3×3 convolution where ``with_conv``."""
    conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def _downsample(channels: int, with_conv: bool = True) -> nn.Module:
    """Halving by a strided 3×3 convolution where ``with_conv``, by 2×2 averaging otherwise."""
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2)
    return nn.Sequential(OrderedDict(op=conv))


class ResBlock(nn.Module):
    """GroupNorm–SiLU–convolution twice, with the embedding between, around a skip connection.

    With ``use_scale_shift_norm`` the embedding scales and shifts the second normalization; otherwise it is added before it.
    ``up`` and ``down`` double and halve the resolution inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
        min_group_channels: int | None = None,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm(channels, min_group_channels), SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2) if down else nn.Identity()
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels, min_group_channels),
            SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        _zero(self.out_layers[-1])
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        x = self.resample(x)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            h = self.out_layers[1:](self.out_layers[0](h, *emb.chunk(2, dim=1)))
        else:
            h = self.out_layers(h + emb)
        if isinstance(self.skip_connection, nn.Conv2d):
            # In channels-last memory the permutations are views.
            x = pointwise(self.skip_connection, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + h


def _attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Multi-head attention over tokens: ``(N, T, 3C)`` to ``(N, T, C)``.

    The channels of ``qkv`` are [head][q,k,v][channel] in the legacy order and [q,k,v][head][channel] in the new one.
    """
    n, tokens, width = qkv.shape
    channels = width // (3 * heads)
    if new_order:
        q, k, v = qkv.view(n, tokens, 3, heads, channels).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = qkv.view(n, tokens, heads, 3, channels).permute(3, 0, 2, 1, 4)
    out = tuning.attention(q, k, v)
    return out.transpose(1, 2).reshape(n, tokens, heads * channels)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, around a skip connection.

    ``num_heads`` counts where ``num_head_channels`` is -1. Weights load in either ``use_new_attention_order`` of the qkv
    channels; with the wrong one every output is wrong.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_new_attention_order: bool = False,
        min_group_channels: int | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if self.num_heads < 1 or channels % self.num_heads or num_head_channels not in (-1, channels // self.num_heads):
            raise ValueError(f"num_heads={num_heads}, num_head_channels={num_head_channels} do not split {channels}")
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm(channels, min_group_channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        _zero(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # In channels-last memory these two are views, and a 1×1 convolution is a matrix product over them.
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        out = _attend(pointwise(self.qkv, tokens), self.num_heads, self.use_new_attention_order)
        out = pointwise(self.proj_out, out)
        return x + out.view(n, height, width, c).permute(0, 3, 1, 2)


class AttentionPool2d(nn.Module):
    """Attention pooling of ``(N, C, spatial_size, spatial_size)``: a mean token attends to the pixels and becomes the output."""

    def __init__(self, spatial_size: int, channels: int, num_head_channels: int, output_dim: int):
        super().__init__()
        self.num_heads = channels // num_head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, spatial_size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, output_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.t().to(x.dtype)
        # New order whatever the other blocks use.
        pooled = _attend(pointwise(self.qkv_proj, tokens), self.num_heads, new_order=True)[:, 0]
        return pointwise(self.c_proj, pooled)


class _EmbedSequential(nn.Sequential):
    """A Sequential that hands the embedding to the layers that take one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class _Encoder(nn.Module):
    """What the UNet and the classifier share: embedding, downward path and middle block.

    Args:
        image_size: height (= width) that the network was made for, in pixels.
        in_channels: image channels.
        model_channels: base width.
        out_channels: of the UNet ``in_channels``, or twice that where the variance is learned; of the classifier its classes.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors at which there is attention (1 = full resolution).
        dropout: rate, while training.
        channel_mult: width of each level over ``model_channels``.
        conv_resample: resampling has a convolution where it is not done by residual blocks.
        num_heads: attention heads, where ``num_head_channels`` is -1.
        num_head_channels: channels per attention head, or -1.
        use_scale_shift_norm: the embedding scales and shifts the normalization instead of being added.
        resblock_updown: residual blocks do the resampling.
        use_new_attention_order: order of the qkv channels, see :class:`AttentionBlock`.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``, of the convolutions of the body.
        channel_mult_emb: width of the embedding over ``model_channels``.
        min_group_channels: channels that a group of the normalizations has at least, so that layers of fewer than 32 times
            that have fewer groups (EDM's networks: 4); None gives every layer 32 groups (ADM's).
        middle_attention: attention in the middle block; EDM's networks narrower than one head have none.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        out_channels: int = 6,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        dtype: Dtype = "float32",
        channel_mult_emb: int = 4,
        min_group_channels: int | None = None,
        middle_attention: bool = True,
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_res_blocks = model_channels, num_res_blocks
        self.dtype = dtype_of(dtype)
        # The coarsest level halves once per level after the first, and skip connections need an integer number of pixels.
        self.size_multiple = 2 ** (len(channel_mult) - 1)
        self.emb_channels = emb_channels = channel_mult_emb * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self._norm = partial(GroupNorm, min_group_channels=min_group_channels)
        self._res = res = partial(
            ResBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            min_group_channels=min_group_channels,
        )
        self._attention = attention = partial(
            AttentionBlock,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
            min_group_channels=min_group_channels,
        )
        self._down = partial(res, down=True) if resblock_updown else partial(_downsample, with_conv=conv_resample)
        self._up = partial(res, up=True) if resblock_updown else partial(_upsample, with_conv=conv_resample)
        # Width of each level, and whether it has attention.
        self._levels = [(int(m * model_channels), 2**i in attention_resolutions) for i, m in enumerate(channel_mult)]
        channels = self._levels[0][0]
        self.input_blocks = nn.ModuleList([_EmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self._skips = [channels]
        for level, (width, attends) in enumerate(self._levels):
            for _ in range(num_res_blocks):
                layers = [res(channels, out_channels=width), *([attention(width)] if attends else [])]
                self.input_blocks.append(_EmbedSequential(*layers))
                channels = width
                self._skips.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(_EmbedSequential(self._down(channels)))
                self._skips.append(channels)
        middle = attention(channels) if middle_attention else nn.Identity()
        self.middle_block = _EmbedSequential(res(channels), middle, res(channels))

    def _cast(self) -> None:
        """Set the number formats, once every block exists."""
        # As in the published half-precision models: convolutions of the body are half, norms and linear layers are not.
        for name in ("input_blocks", "middle_block", "output_blocks"):
            for module in getattr(self, name, nn.Module()).modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(self.dtype)
        self.to(memory_format=torch.channels_last)

    def check_image(self, shape: Sequence[int]) -> None:
        """Raise ValueError if images of ``(C, H, W)`` do not fit the network."""
        (channels, height, width), n = shape, self.size_multiple
        if channels != self.in_channels or height % n or width % n:
            raise ValueError(f"images of {tuple(shape)} do not fit the network: ({self.in_channels}, multiples of {n})")

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Time part of the embedding: ``(N,)`` on the 0 … 999 scale to ``(N, emb_channels)``."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        states = [x.to(self.dtype, memory_format=torch.channels_last)]
        for block in self.input_blocks:
            states.append(block(states[-1], emb))
        return [*states[1:], self.middle_block(states[-1], emb)]


class UNet(_Encoder):
    """The diffusion network of ADM.

    Args:
        num_classes: number of classes, or None for a network without labels.
        num_heads_upsample: heads on the upward path, or -1 for ``num_heads``.

    Examples:
        >>> network = UNet(image_size=8, in_channels=1, model_channels=32, out_channels=1, channel_mult=(1,), num_classes=10)
        >>> network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, -1])).shape  # -1: no class
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, *args: Any, num_classes: int | None = None, num_heads_upsample: int = -1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)
        skips, heads = list(self._skips), {} if num_heads_upsample == -1 else {"num_heads": num_heads_upsample}
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level, (width, attends) in reversed(list(enumerate(self._levels))):
            for block in range(self.num_res_blocks + 1):
                layers = [self._res(channels + skips.pop(), out_channels=width)]
                channels = width
                if attends:
                    layers.append(self._attention(width, **heads))
                if level and block == self.num_res_blocks:
                    layers.append(self._up(width))
                self.output_blocks.append(_EmbedSequential(*layers))
        self.out = nn.Sequential(self._norm(channels), SiLU(), nn.Conv2d(channels, self.out_channels, 3, padding=1))
        _zero(self.out[-1])
        self._cast()

    def embed_labels(self, y: Tensor) -> Tensor:
        """Class part of the embedding: ``(N,)`` to ``(N, emb_channels)``; a label of -1 means no class, all zeros."""
        if self.num_classes is None:
            raise ValueError("labels were given to a network without classes (num_classes: null)")
        return self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        """The network on ``x`` ``(N, C, H, W)`` with a ready embedding ``(N, emb_channels)``."""
        *states, h = self._encode(x, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, states.pop()], dim=1), emb)
        return self.out(h.float())

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Output ``(N, out_channels, H, W)`` float32 for noisy images ``(N, C, H, W)`` at ``timesteps`` ``(N,)``, 0 … 999;
        ``y`` are ``(N,)`` classes, -1 for none; None for all none.
        """
        emb = self.embed_time(timesteps)
        return self.decode(x, emb if y is None else emb + self.embed_labels(y))


class EncoderUNet(_Encoder):
    """The noise-aware classifier of ADM: the downward half of the UNet and attention pooling.

    The pooling's positional table fixes the size of the images.

    Examples:
        >>> sizes = {"in_channels": 1, "model_channels": 32, "channel_mult": (1,), "num_head_channels": 32}
        >>> EncoderUNet(image_size=8, out_channels=10, **sizes)(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        out_channels: int = 1000,
        *args: Any,
        num_heads: int = 1,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            *args,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            **kwargs,
        )
        self.num_classes, channels = out_channels, self._skips[-1]
        head = num_head_channels if num_head_channels != -1 else channels // num_heads
        side = image_size // self.size_multiple
        self.out = nn.Sequential(self._norm(channels), SiLU(), AttentionPool2d(side, channels, head, out_channels))
        self._cast()

    def check_image(self, shape: Sequence[int]) -> None:
        super().check_image(shape)
        size = self.image_size
        if tuple(shape[1:]) != (size, size):
            raise ValueError(f"images of {shape[1]}×{shape[2]} do not fit this classifier, made for {size}×{size}")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Class logits ``(N, out_channels)``, float32, of noisy images ``(N, C, H, W)`` at ``timesteps`` ``(N,)``."""
        return self.out(self._encode(x, self.embed_time(timesteps))[-1].float())
