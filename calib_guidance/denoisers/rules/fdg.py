"""Frequency-decoupled guidance, FDG (Sadat et al. 2025, arXiv 2506.19713)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_guidance.denoisers.rules.base import Level, Rule
from calib_guidance.errors import check_numbers


class FDG(Rule):
    """Classifier-free guidance with a weight for each band of a Laplacian pyramid: u_b + w_b·(c_b − u_b) in band b.

    Linear in both predictions, so that x̂0, ε and v give the same. A band is x_k − up(x_{k+1}), the last what is left: half the
    side by a 5×5 binomial blur and bilinear halving, and back by bilinear doubling and the same blur.

    Args:
        weights: w_b from the highest frequencies to the lowest. Equal weights are classifier-free guidance. The source has
            ``[10, 5]`` for Stable Diffusion XL.
    """

    kernel: Tensor

    def __init__(self, weights: Sequence[float] = (10.0, 5.0)):
        super().__init__()
        if len(weights) < 2:
            raise ValueError(f"weights must be two or more, from high to low frequencies, got {list(weights)}")
        for weight in weights:
            check_numbers(weights=weight)
        self.weights = tuple(weights)
        binomial = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
        self.register_buffer("kernel", torch.outer(binomial, binomial), persistent=False)

    def _blur(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 3:
            raise ValueError(f"FDG cannot halve this sample {len(self.weights) - 1} times: give fewer weights")
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 5, 5)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])

    def forward(self, x0_cond: Tensor, x0_uncond: Tensor, level: Level, state: dict[str, Tensor]) -> Tensor:
        # What the bands of the difference add up to, from the high to the low ones.
        image, weighted, sizes = x0_cond - x0_uncond, [], []
        for weight in self.weights[:-1]:
            size = image.shape[2:]
            low = F.interpolate(self._blur(image), [(side + 1) // 2 for side in size], mode="bilinear")
            weighted.append(weight * (image - self._up(low, size)))
            sizes.append(size)
            image = low
        image = self.weights[-1] * image
        for band, size in zip(reversed(weighted), reversed(sizes), strict=True):
            image = band + self._up(image, size)
        return x0_uncond + image

    def _up(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self._blur(F.interpolate(x, list(size), mode="bilinear"))
