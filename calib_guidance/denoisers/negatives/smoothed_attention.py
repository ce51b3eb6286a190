"""Smoothed energy guidance, SEG (Hong 2024, arXiv 2408.00760)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.denoisers.negatives.attention import AttentionNegative
from calib_guidance.errors import check_numbers


class SmoothedAttention(AttentionNegative):
    """The denoiser with blurred queries in the attention of some layers.

    The queries are an image of tokens, blurred by a Gaussian of std b. Its size is 6b, rounded up to an odd number, and at most
    half the side to each side; borders reflect. Published for the middle block, with classifier-free weight 4 and b tuned.

    Args:
        layers: as for :class:`~calib_guidance.denoisers.negatives.attention.AttentionNegative`.
        blur: b in tokens; None is infinite, all positions attend alike.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)  # 16 tokens
        >>> attended = SmoothedAttention(["middle_block.1"], blur=None).attend(query, key, value)
        >>> torch.allclose(attended, attended[:, :, :1].expand_as(attended), atol=1e-6)  # all positions attend alike
        True
    """

    weights: Tensor

    def __init__(self, layers: Sequence[str], blur: float | None = None):
        super().__init__(layers)
        check_numbers(above=0, null="an infinite one", blur=blur)
        self.blur = blur
        half = 0 if blur is None else math.ceil(6 * blur) // 2
        weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / (blur or 1)) ** 2)
        self.register_buffer("weights", weights, persistent=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.blur is None:
            query = query.mean(dim=2, keepdim=True).expand_as(query)
        else:
            n, heads, tokens, channels = query.shape
            side = math.isqrt(tokens)
            if side**2 != tokens:
                raise ValueError(
                    f"layers: SmoothedAttention needs square images, and one has {tokens} tokens: name others"
                )
            image = query.transpose(2, 3).reshape(n, heads * channels, side, side)
            query = self.smooth(image).reshape(n, heads, channels, tokens).transpose(2, 3)
        return F.scaled_dot_product_attention(query.contiguous(), key.contiguous(), value.contiguous())

    def smooth(self, image: Tensor) -> Tensor:
        """``(N, C, H, H)``, blurred."""
        middle = len(self.weights) // 2
        half = min(middle, image.shape[-1] // 2)
        weights = self.weights[middle - half : middle + half + 1]
        weights = (weights / weights.sum()).to(image.dtype)
        kernel = torch.outer(weights, weights).expand(image.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(image, (half,) * 4, mode="reflect"), kernel, groups=image.shape[1])
