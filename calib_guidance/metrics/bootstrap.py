"""Standard errors by resampling: bootstrap and jackknife (Efron 1979)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bootstrap_sums(terms: Tensor, resamples: int = 200, seed: int = 0) -> Tensor:
    """Sums over resampled samples, N drawn with replacement: means, accuracies and binned errors are functions of them.

    The standard deviation over the resamples is the standard error.

    Args:
        terms: ``(N, C)`` what each sample adds, N ≥ 1.
        resamples: how many.
        seed: of the draw.

    Returns:
        ``(resamples, C)`` float64.
    """
    n = len(terms)
    if not n:
        raise ValueError("bootstrap_sums needs at least one sample, got none")
    rng, terms = np.random.RandomState(seed), terms.double()
    times = (torch.from_numpy(np.bincount(rng.randint(n, size=n), minlength=n)) for _ in range(resamples))
    return torch.stack([t.to(terms) @ terms for t in times])


def jackknife_std(without: Tensor) -> Tensor:
    """Standard error of a value over G blocks of samples, from its values without each block (Quenouille, Tukey).

    For values that are kept only as sums over blocks. It is itself known to about 1/√(2·(G − 1)) of its value.

    Args:
        without: ``(G, …)`` the value of all but block g, G ≥ 2; blocks of about equally many samples.

    Returns:
        ``(…)`` float64.
    """
    without = without.double()
    return (len(without) - 1) ** 0.5 * without.std(0, correction=0)
