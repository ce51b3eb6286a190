"""How well images fit the prompts that they were made for (Hessel et al. 2021, https://arxiv.org/abs/2104.08718)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_guidance.metrics.base import RankMetric


def _of_own(similarity: Tensor, y: Tensor) -> Tensor:
    if similarity.ndim != 2 or y.shape != similarity.shape[:1]:
        raise ValueError(
            f"the CLIP score needs similarities (N, K) and prompts (N,), got {tuple(similarity.shape)} and {tuple(y.shape)}"
        )
    return similarity.double().gather(1, y[:, None]).squeeze(1)


def clip_score(similarity: Tensor, y: Tensor) -> Tensor:
    """Mean cosine between each image and its own prompt; the paper multiplies by 2.5 and cuts below 0.

    Args:
        similarity: ``(N, K)`` cosines to all prompts, of :meth:`~calib_guidance.classifiers.CLIPClassifier.similarity`.
        y: ``(N,)`` the prompt that each image was made for.

    Returns:
        Scalar float64 in [−1, 1]; NaN without images.

    Raises:
        ValueError: other shapes.
    """
    return _of_own(similarity, y).mean()


class CLIPScore(RankMetric):
    """:func:`clip_score` from two sums, exact over ranks."""

    higher_is_better = True

    def __init__(self, **kwargs: object):
        super().__init__(**kwargs)
        for name in ("count", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, similarity: Tensor, y: Tensor) -> None:
        """Add images by their cosines ``(N, K)`` to the prompts, of which ``y`` ``(N,)`` are their own.

        Raises:
            ValueError: other shapes.
        """
        own = _of_own(similarity, y)
        self.count = self.count + len(own)
        self.total = self.total + own.sum()

    def compute(self) -> Tensor:
        """Scalar float64; NaN without images."""
        return self.total / self.count
