"""Sliding window guidance, SWG (Kaiser et al. 2024, arXiv 2411.10257)."""

import torch
from torch import Tensor

from calib_guidance.denoisers.base import Denoiser, Prediction
from calib_guidance.denoisers.negatives.base import Negative, Pair, PredictAlone, PredictPair
from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers


class SlidingWindows(Negative):
    """The mean of the denoiser's predictions for overlapping crops of x_t, which see no further than their crop.

    n×n crops of side k, (H − k)/(n − 1) apart, with the level and label of the sample. For networks that take samples of other
    sizes. Every crop counts as an evaluation.

    Args:
        size: k.
        per_side: n ≥ 2.
        masked: M-SWG: no guidance where only one crop lies.

    Published for EDM2-512: k 40 of 64, n 2, masked, with classifier-free weight 1.2 (FID).

    Examples:
        >>> [*SlidingWindows(size=40, per_side=2).corners(64)]  # of EDM2-512's latents
        [0, 24]
    """

    def __init__(self, size: int, per_side: int = 2, masked: bool = True):
        super().__init__()
        check_numbers(least=1, size=size)
        check_numbers(least=2, per_side=per_side)
        self.size, self.per_side, self.masked = size, per_side, masked

    def corners(self, side: int) -> range:
        """First rows, or columns, of the crops of a sample of this side."""
        stride, rest = divmod(side - self.size, self.per_side - 1)
        if not 0 < stride <= self.size or rest:
            raise ValueError(
                f"{self.per_side} crops a side of size {self.size} do not tile a side of {side}: side − size must be a multiple "
                "of per_side − 1, and at most size × (per_side − 1)"
            )
        return range(0, side - self.size + 1, stride)

    def check(self, denoiser: Denoiser) -> None:
        channels, height, width = denoiser.image_shape
        for side in (height, width):
            self.corners(side)
        for module in denoiser.modules():
            if callable(check := getattr(module, "check_image", None)):
                check((channels, self.size, self.size))

    def nfe(self, denoiser: Denoiser) -> int:
        return (1 + self.per_side**2) * denoiser.nfe

    def prepare(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictPair:
        full, crops = denoiser.prepare(levels, y), self.prepare_alone(denoiser, levels, y)

        def predict_pair(x_t: Tensor, i: int | Tensor) -> Pair:
            cond = full(x_t, i)
            return cond, crops(x_t, i, cond)

        return predict_pair

    def prepare_alone(self, denoiser: Denoiser, levels: NoiseLevels, y: Tensor) -> PredictAlone:
        crop = denoiser.prepare(levels, y.repeat(self.per_side**2))
        _, height, width = denoiser.image_shape
        corners = [(top, left) for left in self.corners(width) for top in self.corners(height)]
        count = self.add_up(torch.ones(len(corners), 1, self.size, self.size, device=y.device), corners, height, width)

        def predict(x_t: Tensor, i: int | Tensor, cond: Prediction) -> Prediction:
            crops = torch.cat([x_t[..., top : top + self.size, left : left + self.size] for top, left in corners])
            x0 = crop(crops, i.repeat(len(corners)) if isinstance(i, Tensor) else i).x0
            mean = self.add_up(x0, corners, height, width) / count
            return cond._replace(x0=torch.where(count > 1, mean, cond.x0) if self.masked else mean)

        return predict

    def add_up(self, crops: Tensor, corners: list[tuple[int, int]], height: int, width: int) -> Tensor:
        """Sum ``(N, C, H, W)`` of crops ``(n²·N, C, k, k)`` in their places, one corner after the other."""
        parts = crops.chunk(len(corners))
        total = parts[0].new_zeros(len(parts[0]), crops.shape[1], height, width)
        for (top, left), part in zip(corners, parts, strict=True):
            total[..., top : top + self.size, left : left + self.size] += part
        return total
