"""Kernel distances: of Inception (KID, Bińkowski et al. 2018, arXiv 1801.01401) and of CLIP (CMMD, Jayasumana et al. 2023)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 4096  # of rows and of columns: 128 MB of kernel values


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij k(a_i, b_j), k(x, y) = (x·y/D + 1)³, in float64 of features ``(N, D)`` and ``(M, D)``."""
    return (a.double() @ b.double().T).div_(a.shape[1]).add_(1).pow_(3).sum()


def _mean_within(features: Tensor) -> Tensor:
    """Mean of k over pairs of different rows."""
    n, blocks = len(features), features.split(_BLOCK)
    # k is symmetric: a block beside the diagonal counts for its mirror image too.
    pairs = ((rows, columns) for i, rows in enumerate(blocks) for columns in blocks[i:])
    total = sum((1 if columns is rows else 2) * _kernel_sum(rows, columns) for rows, columns in pairs)
    diagonal = sum((rows.double().square().mean(1) + 1).pow(3).sum() for rows in blocks)
    return torch.as_tensor(total - diagonal) / (n * (n - 1))


def kernel_distance(reference: Tensor, generated: Tensor) -> Tensor:
    """Squared maximum mean discrepancy with the kernel (x·y/D + 1)³, estimated without bias from complete sets.

    E k(x, x′) + E k(y, y′) − 2·E k(x, y), over pairs of different samples. Scalar float64, which may be below zero.
    """
    m, n = len(reference), len(generated)
    if min(m, n) < 2:
        raise ValueError(f"the kernel distance needs two samples or more in each set, got {m} and {n}")
    between = sum(_kernel_sum(a, b) for a in reference.split(_BLOCK) for b in generated.split(_BLOCK)) / (m * n)
    return _mean_within(reference) + _mean_within(generated) - 2 * between


def kernel_distance_subsets(
    reference: Tensor, generated: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Tensor:
    """:func:`kernel_distance` of random subsets: how the field reports it, as their mean ± standard deviation.

    ``(subsets,)`` float64. That deviation is of one subset, above that of the complete sets. ``subset_size`` is from 2 to
    min(M, N). The same seed draws torch-fidelity's subsets.
    """
    if min(len(reference), len(generated)) < subset_size:
        raise ValueError(
            f"subsets of {subset_size} cannot be drawn from {len(reference)} reference and {len(generated)} generated "
            "samples: lower subset_size"
        )
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        rows = [torch.from_numpy(rng.choice(len(x), subset_size, replace=False)) for x in (reference, generated)]
        subset = (x[each.to(x.device)] for x, each in zip((reference, generated), rows, strict=True))
        values.append(kernel_distance(*subset))
    return torch.stack(values)


def clip_mmd(reference: Tensor, generated: Tensor, bandwidth: float = 10.0) -> Tensor:
    """CMMD (arXiv 2401.09603): 1000·MMD² with the kernel exp(−‖a − b‖²/(2·bandwidth²)) of embeddings, scaled here to norm 1.

    Mean k(x, x′) + mean k(y, y′) − 2·mean k(x, y) with the diagonals, which is biased upwards by the number of samples. Scalar
    float64 of embeddings ``(M, D)`` and ``(N, D)``. Published numbers are of CLIP ViT-L/14 at 336 pixels.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(float(clip_mmd(a, -a)), 4)  # 1000·(1 − e^−0.02)
        19.8013
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        total = sum(
            (-torch.cdist(rows, columns).square() / (2 * bandwidth**2)).exp().sum()
            for rows in a.split(_BLOCK)
            for columns in b.split(_BLOCK)
        )
        return torch.as_tensor(total) / (len(a) * len(b))

    x, y = (F.normalize(each.double(), dim=1) for each in (reference, generated))
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
