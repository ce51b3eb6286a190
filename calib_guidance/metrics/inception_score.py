"""Inception score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _score(logits: Tensor) -> Tensor:
    """exp(mean_n Σ_c p(c|x_n)·log(p(c|x_n)/p̄(c))), scalar float64 in [1, K]."""
    p = logits.double().softmax(1)
    return (torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp()


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> Tensor:
    """Score of each of ``splits`` parts of the shuffled samples; reported as their mean ± standard deviation.

    Of logits ``(N, K)``, for the field's numbers those of the Inception of 2015 without its bias; ``(splits,)`` float64 in
    [1, K]. Samples are shuffled as by torch-fidelity with the same seed; split i holds the places from ⌊i·N/splits⌋ on.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"the Inception score of {n} samples cannot have {splits} splits")
    shuffled = torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)
    edges = [i * n // splits for i in range(1, splits)]
    return torch.stack([_score(logits[rows]) for rows in shuffled.tensor_split(edges)])


def inception_score_adm(logits: Tensor, block: int = 5000) -> Tensor:
    """Score of each block of logits ``(N, K)`` in their order, as ADM's evaluator cuts them; reported as the mean.

    ``(blocks,)`` float64 in [1, K]; the last block may have fewer samples.
    """
    return torch.stack([_score(rows) for rows in logits.split(block)])
