"""Inception score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
