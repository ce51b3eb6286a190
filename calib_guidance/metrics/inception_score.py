"""Inception score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> Tensor:
    """exp(mean_n Σ_c p(c|x_n)·log(p(c|x_n)/p̄(c))) of each split; reported as their mean ± standard deviation.

    Samples are shuffled as by torch-fidelity with the same seed; split i holds the places ⌊i·N/splits⌋ … ⌊(i+1)·N/splits⌋ − 1.

    Args:
        logits: ``(N, K)``, for the field's numbers those of the Inception of 2015 without its bias.
        splits: how many, in [1, N].
        seed: of the shuffle.

    Returns:
        ``(splits,)`` float64 in [1, K].
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"the Inception score of {n} samples cannot have {splits} splits")
    place = torch.bucketize(torch.arange(n), torch.arange(1, splits) * n // splits, right=True)
    split = torch.empty_like(place).scatter_(0, torch.from_numpy(np.random.RandomState(seed).permutation(n)), place)
    p = logits.double().softmax(1)
    terms = torch.cat([torch.ones_like(p[:, :1]), -torch.special.entr(p).sum(1, keepdim=True), p], dim=1)
    sums = torch.zeros(splits, terms.shape[1], dtype=torch.float64, device=p.device)
    sums.index_add_(0, split.to(p.device), terms)
    count, negative_entropy, total = sums[:, :1], sums[:, 1], sums[:, 2:]
    return (negative_entropy / count.squeeze(1) + torch.special.entr(total / count).sum(1)).exp()
