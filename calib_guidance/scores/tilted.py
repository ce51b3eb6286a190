"""Tilted score over groups of samples (arXiv 2511.05844)."""

import math

import torch
from torch import Tensor

from calib_guidance.scores.base import Score, TemperedLogProb


class Tilted(Score):
    """Tilted mean of a score over groups of samples.

    (1/t)·log(mean_j exp(t·S_j)) of a score over each group of samples, fixed by index (index // group_size).

    Every sample carries the value of its group. The gradient of the sum with respect to S_i is group_size·softmax_j(t·S_j)_i,
    which is 1, plain guidance, as t → 0.

    Args:
        tilt: t ≠ 0, −0.2 in the paper; negative gives the least likely samples of a group the most weight.
        group_size: samples per group, ≥ 2; the number of samples and the batch size must be multiples of it.
        score: the S_j; plain log-probability by default.

    Examples:
        >>> logits, y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
        >>> Tilted(tilt=-0.2, group_size=2)(logits, y).exp()  # equal scores: their own value
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(self, tilt: float = -0.2, group_size: int = 10, score: Score | None = None):
        super().__init__()
        if tilt == 0 or not math.isfinite(tilt):
            raise ValueError(f"tilt must be a number other than 0, got {tilt}; without tilting, use its `score` alone")
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {group_size}; without groups, use its `score` alone")
        self.tilt, self.group_size, self.score = tilt, group_size, score or TemperedLogProb()
        if self.score.group_size != 1:
            raise ValueError("a tilted score cannot be tilted again")

    def forward(self, logits: Tensor, y: Tensor, time: float = 1.0) -> Tensor:
        if len(logits) % self.group_size:
            raise ValueError(
                f"{len(logits)} samples are not complete groups of {self.group_size}: set data.batch_size and num_samples to "
                "multiples of it"
            )
        groups = self.score(logits, y, time).view(-1, self.group_size)
        value = (torch.logsumexp(self.tilt * groups, dim=1) - math.log(self.group_size)) / self.tilt
        return value.repeat_interleave(self.group_size)
