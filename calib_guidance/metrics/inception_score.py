"""Inception score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calib_guidance.metrics.base import RankMetric

ORDERS = ("shuffled", "given")


def split_of_samples(
    num_samples: int, splits: int = 10, rows: int | None = None, order: str = "shuffled", seed: int = 2020
) -> Tensor:
    """Which split each sample is in.

    Args:
        num_samples: n.
        splits: how many, split i being the places ⌊i·n/splits⌋ … ⌊(i+1)·n/splits⌋ − 1 of the order.
        rows: places of one split, instead of ``splits``; the last split has what is left. 5,000 in OpenAI's evaluator.
        order: ``shuffled`` as by torch-fidelity with the same seed, or ``given``, as in OpenAI's evaluator, which makes
            the score of samples sorted by class meaningless.
        seed: of the shuffle.

    Returns:
        ``(num_samples,)`` int64.

    Raises:
        ValueError: another order, or splits without samples.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if not 1 <= (splits if rows is None else rows) <= num_samples:
        raise ValueError(
            f"the Inception score of {num_samples} samples cannot have "
            + (f"{splits} splits" if rows is None else f"splits of {rows} rows")
        )
    if rows is None:
        edges = torch.arange(1, splits) * num_samples // splits
        split = torch.bucketize(torch.arange(num_samples), edges, right=True)
    else:
        split = torch.arange(num_samples) // rows
    if order == "given":
        return split
    permutation = torch.from_numpy(np.random.RandomState(seed).permutation(num_samples))
    return torch.empty_like(split).scatter_(0, permutation, split)


def _sums(logits: Tensor, split: Tensor, num_splits: int) -> Tensor:
    """``(num_splits, K + 2)`` float64: the count, Σ Σ_c p·log p and Σ p of each split."""
    p = logits.double().softmax(1)
    terms = torch.cat([torch.ones_like(p[:, :1]), -torch.special.entr(p).sum(1, keepdim=True), p], dim=1)
    return torch.zeros(num_splits, terms.shape[1], dtype=torch.float64, device=p.device).index_add_(0, split, terms)


def _scores(sums: Tensor) -> Tensor:
    count, negative_entropy, p = sums[:, :1], sums[:, 1], sums[:, 2:]
    return (negative_entropy / count.squeeze(1) + torch.special.entr(p / count).sum(1)).exp()


def inception_score(
    logits: Tensor, splits: int = 10, rows: int | None = None, order: str = "shuffled", seed: int = 2020
) -> Tensor:
    """exp(mean_n Σ_c p(c|x_n)·log(p(c|x_n)/p̄(c))) of each split; reported as their mean ± standard deviation.

    Args:
        logits: ``(N, K)``, for the field's numbers those of the Inception of 2015 without its bias.
        splits, rows, order, seed: see :func:`split_of_samples`.

    Returns:
        ``(splits,)`` float64 in [1, K].

    Raises:
        ValueError: another order, or splits without samples.
    """
    split = split_of_samples(len(logits), splits, rows, order, seed).to(logits.device)
    return _scores(_sums(logits, split, int(split.max()) + 1))


class InceptionScore(RankMetric):
    """:func:`inception_score` from fixed-size sums, exact over ranks.

    Args:
        num_samples: of all ranks together.
        num_classes: K.
        splits, rows, order, seed: see :func:`split_of_samples`.

    Raises:
        ValueError: another order, or splits without samples.
    """

    higher_is_better = True

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        splits: int = 10,
        rows: int | None = None,
        order: str = "shuffled",
        seed: int = 2020,
        **kwargs: object,
    ):
        super().__init__(**kwargs)
        split = split_of_samples(num_samples, splits, rows, order, seed)
        self.register_buffer("split", split, persistent=False)
        sums = torch.zeros(int(split.max()) + 1, num_classes + 2, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Count a batch.

        Args:
            logits: ``(N, K)``.
            index: ``(N,)`` places of the samples in the given order, in [0, num_samples).

        Raises:
            ValueError: other shapes, or an index out of range (of a tensor on the CPU: reading one elsewhere would wait
                for the device).
        """
        num_classes = self.sums.shape[1] - 2
        if logits.ndim != 2 or logits.shape[1] != num_classes or index.shape != logits.shape[:1]:
            raise ValueError(
                f"InceptionScore needs logits (N, {num_classes}) and indices (N,), "
                f"got {tuple(logits.shape)} and {tuple(index.shape)}"
            )
        if (
            index.device.type == "cpu"
            and len(index)
            and not 0 <= int(index.min()) <= int(index.max()) < len(self.split)
        ):
            raise ValueError(
                f"InceptionScore of num_samples = {len(self.split)}: "
                f"index {int(index.min())} … {int(index.max())} is out of range"
            )
        split = self.split[index.to(self.split.device)]
        self.sums = self.sums + _sums(logits, split, len(self.sums))

    def compute(self) -> dict[str, Tensor]:
        """``inception_score``, the mean over splits with samples, and ``inception_score_sd``; NaN without samples."""
        scores = _scores(self.sums[self.sums[:, 0] > 0])
        if not len(scores):
            nan = torch.full((), torch.nan, dtype=torch.float64)
            return {"inception_score": nan, "inception_score_sd": nan}
        return {"inception_score": scores.mean(), "inception_score_sd": scores.std(correction=0)}
