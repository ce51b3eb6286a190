"""The magnitude-preserving UNet of EDM2 (Karras et al. 2024, https://arxiv.org/abs/2312.02696).

Every layer keeps the size of what goes through it: weights are normalized, sums and concatenations weighted, with neither biases
nor group norms. Parameter names are those of the published files, less ``unet.``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend import tuning
from calib_guidance.backend.precision import Dtype, dtype_of

_EPS = 1e-4


def normalize(x: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """x/(1e-4 + rms(x)), the root mean square over ``dim``, by default all axes but the first."""
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / torch.add(_EPS, norm, alpha=math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square of normal numbers."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 − t)·a + t·b over √((1−t)² + t²)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b, with the fractions 1 − t and t of the magnitude."""
    na, nb = a.shape[1], b.shape[1]
    c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(na)), b * (c * t / math.sqrt(nb))], dim=1)


class MPFourier(nn.Module):
    """√2·cos(x·freqs + phases) of ``x`` ``(N,)``: random numbers, which are part of the weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.outer(x.float(), self.freqs.float()) + self.phases.float()).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Linear layer (``kernel`` 0) or convolution, each row of whose weight is normalized, times gain/√fan_in.

    In training the stored weight is normalized at every call as well. :meth:`fold` does both once and for all.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel, kernel][: 2 * bool(kernel)]))
        self.is_folded = False

    def effective_weight(self, gain: Tensor | float = 1.0, half_gain: bool = False) -> Tensor:
        """Weight that is multiplied with, float32. ``half_gain``: gain/√fan_in is rounded to float16, as in published files."""
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
        factor = gain / math.sqrt(self.weight[0].numel())
        if half_gain and isinstance(factor, Tensor):
            factor = (gain.half() / math.sqrt(self.weight[0].numel())).float()
        return normalize(self.weight.float()) * factor

    @torch.no_grad()
    def fold(self, gain: Tensor | float = 1.0, half_gain: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Keep the effective weight in place of the stored one."""
        if not self.is_folded:
            self.weight.data = self.effective_weight(gain, half_gain).to(dtype)
            if self.weight.ndim == 4:
                self.weight.data = self.weight.data.to(memory_format=torch.channels_last)
            self.is_folded = True

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight if self.is_folded else self.effective_weight(gain).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class EDM2Block(nn.Module):
    """Residual block with optional resampling and attention.

    Args:
        in_channels, out_channels, emb_channels: widths.
        flavor: ``enc``: pixel norm on the way in; ``dec``: the residual branch reads the unnormalized input.
        resample: ``keep``, ``up`` or ``down``.
        attention: whether there is attention, with ``out_channels // channels_per_head`` heads, and none below one head.
        dropout: rate, while training.
        res_balance, attn_balance: fraction of the residual branch and of attention.
        clip_act: largest magnitude of the output; None does not clip.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: Literal["enc", "dec"],
        resample: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ):
        super().__init__()
        self.flavor, self.resample, self.dropout = flavor, resample, dropout
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.heads = out_channels // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Channels of ``qkv`` are [head][channel][q,k,v]; all three are normalized over the channels of a head."""
        n, _, height, width = qkv.shape
        q, k, v = normalize(qkv.reshape(n, self.heads, -1, 3, height * width), dim=2).permute(3, 0, 1, 4, 2)
        out = tuning.attention(q, k, v)
        return out.transpose(2, 3).reshape(n, -1, height, width)


class EDM2UNet(nn.Module):
    """The network F of EDM2, and the uncertainty that it is trained with.

    Args:
        image_size: side of images or latents.
        in_channels: of the images or latents.
        num_classes: number of classes, or None.
        model_channels: base width: 128 (XS), 192 (S), 256 (M), 320 (L), 384 (XL), 448 (XXL).
        channel_mult: width of each level over ``model_channels``.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with attention.
        channels_per_head: channels of an attention head; narrower layers have none.
        label_balance, concat_balance, res_balance, attn_balance: fraction of labels, skips, residual branches and attention.
        clip_act: see :class:`EDM2Block`.
        dropout: rate, while training.
        logvar_channels: features of the uncertainty.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``, of the convolutions, once weights are folded.

    Examples:
        >>> network = EDM2UNet(image_size=8, in_channels=3, num_classes=10, model_channels=32, channel_mult=(1,), num_blocks=1)
        >>> network(torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]), torch.tensor([3, -1])).shape  # of ln σ/4; -1: no class
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        num_classes: int | None = None,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        dropout: float = 0.0,
        logvar_channels: int = 128,
        dtype: Dtype = "float32",
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, in_channels
        self.num_classes, self.label_balance, self.concat_balance = num_classes, label_balance, concat_balance
        self.dtype, self.size_multiple = dtype_of(dtype), 2 ** (len(channel_mult) - 1)
        widths = [model_channels * m for m in channel_mult]
        emb_channels = max(widths)
        shared = {"channels_per_head": channels_per_head, "dropout": dropout, "clip_act": clip_act}
        shared |= {"res_balance": res_balance, "attn_balance": attn_balance}

        def block(source: int, target: int, flavor: str, resample: str = "keep", attention: bool = False) -> EDM2Block:
            return EDM2Block(source, target, emb_channels, flavor, resample, attention, **shared)

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], emb_channels)
        self.emb_label = MPConv(num_classes, emb_channels) if num_classes else None
        self.enc, self.dec, skips = nn.ModuleDict(), nn.ModuleDict(), []
        now = in_channels + 1  # a channel of ones stands for biases
        for level, width in enumerate(widths):
            r = image_size >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = MPConv(now, width, 3)
                now = width
            else:
                self.enc[f"{r}x{r}_down"] = block(now, now, "enc", "down")
            skips.append(now)
            for n in range(num_blocks):
                self.enc[f"{r}x{r}_block{n}"] = block(now, width, "enc", attention=r in attn_resolutions)
                now = width
                skips.append(now)
        for level, width in reversed(list(enumerate(widths))):
            r = image_size >> level
            if level == len(widths) - 1:
                self.dec[f"{r}x{r}_in0"] = block(now, now, "dec", attention=True)
                self.dec[f"{r}x{r}_in1"] = block(now, now, "dec")
            else:
                self.dec[f"{r}x{r}_up"] = block(now, now, "dec", "up")
            for n in range(num_blocks + 1):
                self.dec[f"{r}x{r}_block{n}"] = block(now + skips.pop(), width, "dec", attention=r in attn_resolutions)
                now = width
        self.out_conv = MPConv(now, in_channels, 3)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    def check_image(self, shape: Sequence[int]) -> None:
        """Raise ValueError if images of ``(C, H, W)`` do not fit the network."""
        channels, height, width = shape
        if channels != self.in_channels or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"images of {channels}×{height}×{width} do not fit the network, which takes {self.in_channels} channels and "
                f"sides that are multiples of {self.size_multiple}"
            )

    def fold(self, half_gains: bool = False) -> EDM2UNet:
        """Normalize all weights once, gains included, for sampling. The state dict is then not that of the file any more.

        ``half_gains``: gains over √fan_in are rounded to float16, as where published files run without conversion.
        """
        gains = {id(b.emb_linear): b.emb_gain for b in self.modules() if isinstance(b, EDM2Block)}
        gains[id(self.out_conv)] = self.out_gain
        for layer in self.eval().modules():
            if isinstance(layer, MPConv):
                # Embeddings stay in float32.
                layer.fold(
                    gains.get(id(layer), 1.0), half_gains, self.dtype if layer.weight.ndim == 4 else torch.float32
                )
        return self

    def embed_time(self, c_noise: Tensor) -> Tensor:
        """Noise part of the embedding: ln(σ)/4 ``(N,)`` to ``(N, emb_channels)``."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        t = self.label_balance
        return emb if self.emb_label is None else emb * ((1 - t) / math.hypot(1 - t, t))

    def embed_labels(self, y: Tensor) -> Tensor:
        """Class part of the embedding: ``(N,)`` to ``(N, emb_channels)``; a label of -1 means no class, zeros."""
        if self.emb_label is None:
            raise ValueError("labels were given to a network without classes (num_classes: null)")
        one_hot = F.one_hot(y.clamp(min=0), self.num_classes) * (y >= 0)[:, None]
        t = self.label_balance
        return self.emb_label(one_hot.float() * math.sqrt(self.num_classes)) * (t / math.hypot(1 - t, t))

    def decode(self, x: Tensor, emb: Tensor) -> Tensor:
        """F of ``x`` ``(N, C, H, W)``, scaled by c_in, with a ready embedding ``(N, emb_channels)``."""
        emb, x = mp_silu(emb), x.to(self.dtype if self.out_conv.is_folded else x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).to(memory_format=torch.channels_last)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, EDM2Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), self.concat_balance) if "block" in name else x, emb)
        return self.out_conv(x, self.out_gain).float()

    def logvar(self, c_noise: Tensor) -> Tensor:
        """Log of the variance that training expects of the loss at ln(σ)/4 ``(N,)``; ``(N, 1, 1, 1)``."""
        return self.logvar_linear(self.logvar_fourier(c_noise)).view(-1, 1, 1, 1)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """F ``(N, C, H, W)`` float32 of c_in·x at ln(σ)/4 ``(N,)``; ``y`` are ``(N,)`` classes, -1 or None for none."""
        emb = self.embed_time(c_noise)
        return self.decode(x, emb if y is None or self.emb_label is None else emb + self.embed_labels(y))
