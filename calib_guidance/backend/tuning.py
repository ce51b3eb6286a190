"""Arithmetic tuned for CPUs, with one switch that turns it off.

The plain path is PyTorch's own operators, and agrees within float32 rounding. ``CALIB_GUIDANCE_TUNED=0`` in the environment takes
it everywhere, :func:`plain` for a block. The switch also covers :mod:`calib_guidance.backend.convolutions`.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function

from calib_guidance.backend.precision import bfloat16_instructions

_QUERIES = 256  # at a time: their scores stay in the processor's cache
_on = os.environ.get("CALIB_GUIDANCE_TUNED", "1") != "0"


def enabled() -> bool:
    """Whether the tuned arithmetic is used."""
    return _on


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Use PyTorch's own operators inside the block."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def silu(x: Tensor) -> Tensor:
    """SiLU; tuned, it overwrites its input, which nothing else may read, unless gradients are on."""
    return F.silu(x, inplace=_on and not torch.is_grad_enabled())


def pointwise(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution of pixels ``(N, …, C)``; tuned, the matrix product that it is."""
    if _on:
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    if x.ndim == 2:  # (N, C): one pixel
        return conv(x.view(*x.shape, *[1] * (conv.weight.ndim - 2))).flatten(1)
    return conv(x.movedim(-1, 1)).movedim(1, -1)


@functools.cache
def _multiplies_halves() -> bool:
    return bfloat16_instructions() is not None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of ``(N, heads, T, C)``; tuned, half precision on CPUs avoids PyTorch's kernel.

    That kernel takes as long for bfloat16 as for float32, where the processor's instructions multiply twice as fast, and its
    gradient takes three times as long. What looks for calls of ``F.scaled_dot_product_attention`` finds them.
    """
    tuned, dtype = _on and q.device.type == "cpu", q.dtype
    if tuned and torch.is_grad_enabled() and (dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(*(part.float().contiguous() for part in (q, k, v))).to(dtype)
    multiplies = tuned and dtype == torch.bfloat16 and _multiplies_halves()
    if not multiplies or torch.is_grad_enabled() or has_torch_function((q,)) or torch.compiler.is_compiling():
        # Strided inputs make it fall back to its slow path.
        return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    (*batch, tokens, channels), scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    parts = [torch.bmm(torch.bmm(rows, k).softmax(-1), v) for rows in q.split(_QUERIES, dim=1)]
    return torch.cat(parts, dim=1).view(*batch, tokens, channels)


def group_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Group normalization, computed in float32 and returned in the type of ``x`` ``(N, C, H, W)``.

    With ``scale`` and ``shift`` ``(N, C, 1, 1)`` the result is multiplied by 1 + scale and shifted.
    """
    if _on and _is_slow(norm, x):
        return _by_channel(norm, x, scale, shift)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # The kernel takes half precision with weights in float32: nothing is cast on its own.
        h = _accurate(x if _on else x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)
    else:
        h = F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)
    return h if scale is None else torch.addcmul(shift, h, 1 + scale)


def _accurate(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.group_norm`` of ``x`` ``(N, C, H, W)``, from which large means are subtracted first.

    For channels-last memory, PyTorch's CPU kernel takes the variance as the mean square minus the squared mean. Where the mean is
    1,000 standard deviations, nothing of the variance is left, and its results are wrong by a factor of 1,000.
    """
    n, channels, pixels = len(x), x.shape[1], x[0, 0].numel()
    h, mean, inverse_std = torch.native_group_norm(x, weight, bias, n, channels, pixels, groups, eps)
    far = ~(mean.abs() * inverse_std < 4)  # NaN is far too
    if not far.numpy().any():  # on the CPU: nothing waits for it
        return h
    centered = x.float() - torch.where(far, mean, 0).repeat_interleave(channels // groups, 1)[:, :, None, None]
    return F.group_norm(centered, groups, weight, bias, eps).to(x.dtype)


def _is_slow(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Whether PyTorch's kernel reads channels-last memory number by number: on CPUs, for small feature maps in narrow groups."""
    narrow = norm.num_channels <= 4 * norm.num_groups and x.shape[-1] * x.shape[-2] < 1024
    return narrow and x.device.type == "cpu"


def _by_channel(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """From the sums of each channel, in two passes: several times as fast there."""
    n, groups, each, dtype = len(x), norm.num_groups, norm.num_channels // norm.num_groups, x.dtype
    x = x.float()

    def group_means(pixels: Tensor) -> Tensor:
        sums = pixels.permute(0, 2, 3, 1).reshape(n, -1, norm.num_channels).sum(1)
        return sums.view(n, groups, each).sum(-1) / (each * x.shape[2] * x.shape[3])

    centered = x - group_means(x).repeat_interleave(each, 1)[:, :, None, None]
    inverse = (group_means(centered * centered) + norm.eps).rsqrt()
    times, plus = (inverse[:, :, None] * norm.weight.view(groups, each)).view(n, -1, 1, 1), norm.bias[:, None, None]
    if scale is not None:
        factor = 1 + scale.float()
        times, plus = times * factor, torch.addcmul(shift.float(), plus, factor)
    return torch.addcmul(plus, centered, times).to(dtype)
