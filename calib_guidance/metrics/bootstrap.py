"""Standard errors by resampling: bootstrap and jackknife (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def bootstrap(statistic: Callable[..., Tensor], *samples: Tensor, resamples: int = 200, seed: int = 0) -> Tensor:
    """A statistic of resampled samples; the standard deviation over the resamples is its standard error.

    Use the deviation only: a resample holds some samples more than once, which raises distances between sets. Statistics of sums
    are much faster by :func:`bootstrap_sums`.

    Args:
        statistic: of tensors like ``samples`` to a tensor of any one shape.
        samples: each ``(N, …)``; rows are drawn together, with replacement.
        resamples: how many.
        seed: of the draw.

    Returns:
        ``(resamples, …)``.

    Raises:
        ValueError: no samples, or not equally many.
    """
    n = _count(samples)
    rng, values = np.random.RandomState(seed), []
    for _ in range(resamples):
        rows = torch.from_numpy(rng.randint(n, size=n))
        values.append(statistic(*(s[rows.to(s.device)] for s in samples)))
    return torch.stack(values)


def bootstrap_sums(terms: Tensor, resamples: int = 200, seed: int = 0) -> Tensor:
    """Sums of resampled terms, of which accuracies, scores and errors with bins are functions.

    Args:
        terms: ``(N, C)`` what each sample adds.
        resamples: how many.
        seed: of the draw, the one of :func:`bootstrap`.

    Returns:
        ``(resamples, C)`` float64.

    Raises:
        ValueError: no samples.
    """
    n = _count((terms,))
    rng, terms = np.random.RandomState(seed), terms.double()
    times = (torch.from_numpy(np.bincount(rng.randint(n, size=n), minlength=n)) for _ in range(resamples))
    return torch.stack([t.to(terms) @ terms for t in times])


def jackknife_std(without: Tensor) -> Tensor:
    """Standard error of a value over G blocks of samples, from its values without each block (Quenouille, Tukey).

    For values of which only sums over blocks are kept. It is itself known to about 1/√(2·(G − 1)) of its value.

    Args:
        without: ``(G, …)`` the value of all but block g, G ≥ 2; blocks of about equally many samples.

    Returns:
        ``(…)`` float64.
    """
    without = without.double()
    return (len(without) - 1) ** 0.5 * without.std(0, correction=0)


def _count(samples: tuple[Tensor, ...]) -> int:
    counts = {len(s) for s in samples}
    if len(counts) != 1 or not min(counts):
        raise ValueError(f"bootstrap needs equally many rows of each, at least one, got {[len(s) for s in samples]}")
    return counts.pop()
