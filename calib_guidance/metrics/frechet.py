"""Fréchet distance between feature distributions (Heusel et al. 2017, https://arxiv.org/abs/1706.08500)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ROWS = 4096  # in float64 at a time


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)``, divisor n − 1, in float64 of features ``(N, D)``.

    By blocks: beside the features, memory does not grow with N.
    """
    n, d = features.shape
    mean = features.mean(0, dtype=torch.float64)
    covariance = torch.zeros(d, d, dtype=torch.float64, device=features.device)
    for rows in features.split(_ROWS):
        centered = rows.double() - mean
        covariance.addmm_(centered.T, centered)
    return mean, covariance.div_(n - 1) if n > 1 else covariance.fill_(torch.nan)


def covariance_root(covariance: Tensor) -> Tensor:
    """R ``(D, D)`` float64 with R·Rᵀ = Σ, of a symmetric ``(D, D)`` that may be singular."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(
    mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor, root1: Tensor | None = None
) -> Tensor:
    """Fréchet distance between two normal distributions.

    ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^{1/2}, by eigenvalues of the symmetric Rᵀ·Σ₂·R, where R·Rᵀ = Σ₁.

    Those are the eigenvalues of Σ₁Σ₂, whatever the root R. Scalar float64, ≥ 0 up to rounding, of means ``(D,)`` and symmetric
    covariances ``(D, D)``. ``root1`` is :func:`covariance_root` of ``covariance1``, half of the work, where it is known.

    Examples:
        >>> eye, zero = torch.eye(2), torch.zeros(2)
        >>> round(float(frechet_distance(zero, eye, zero + 3, 4 * eye)), 4)  # 2·3² + 2·(2 − 1)²
        20.0
    """
    covariance1, covariance2 = covariance1.double(), covariance2.double()
    root = covariance_root(covariance1) if root1 is None else root1
    eigenvalues = torch.linalg.eigvalsh(root.T @ covariance2 @ root).clamp(min=0)
    mean_term = (mean1.double() - mean2.double()).square().sum()
    return mean_term + covariance1.trace() + covariance2.trace() - 2 * eigenvalues.sqrt().sum()


def frechet_distance_std(
    reference: tuple[Tensor, Tensor],
    generated: Tensor,
    root1: Tensor | None = None,
    strata: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Standard deviation of a Fréchet distance over draws of the generated samples, to first order (delta method).

    One sample x moves the distance by 2·(μ₂ − μ₁)·δ + δᵀ(I − R·(RᵀΣ₂R)^{−1/2}·Rᵀ)δ less its mean, over N, where δ = x − μ₂
    and R·Rᵀ = Σ₁ (its influence function). The reference is taken as fixed, and what few samples add to the distance (its
    bias) is not in it. It costs one eigendecomposition, where a bootstrap costs one for each draw and adds a bias of its own.

    Scalar float64 of the mean ``(D,)`` and covariance ``(D, D)`` of the reference and features ``(N, D)``; NaN with D samples or
    fewer, where the distance has no derivative. ``root1`` is as of :func:`frechet_distance`. ``strata`` are classes ``(N,)`` of
    which each draw has the same number, so that only what varies within classes counts; None for draws in which they vary too.
    ``moments`` are :func:`mean_and_covariance` of ``generated``, where they are known.
    """
    n, d = generated.shape
    if n <= d:
        return torch.full((), torch.nan, dtype=torch.float64, device=generated.device)
    mean1, covariance1 = (value.double() for value in reference)
    root = covariance_root(covariance1) if root1 is None else root1
    mean, covariance = mean_and_covariance(generated) if moments is None else moments
    values, vectors = torch.linalg.eigh(root.T @ covariance @ root)
    # Directions that the reference does not have take no part.
    inverse = values.clamp(min=0).rsqrt().where(values > values[-1] * d * torch.finfo(values.dtype).eps, 0)
    moved = root @ vectors
    gradient = torch.eye(d, dtype=moved.dtype, device=moved.device) - (moved * inverse) @ moved.T
    influence = []
    for rows in generated.split(_ROWS):
        delta = rows.double() - mean
        influence.append(2 * delta @ (mean - mean1) + ((delta @ gradient) * delta).sum(1))
    moves = torch.cat(influence)
    groups = torch.zeros_like(moves).long() if strata is None else strata.unique(return_inverse=True)[1]
    count = groups.bincount().double()
    means = torch.zeros_like(count).index_add_(0, groups, moves) / count
    if n <= len(count):
        return torch.full((), torch.nan, dtype=torch.float64, device=moves.device)
    return ((moves - means[groups]).square().sum() / (n - len(count)) / n).sqrt()


def sample_count_note(num_samples: int, width: int) -> str | None:
    """What so few samples (of the smaller set) do to a Fréchet distance of ``width`` features; None from 10,000 on."""
    if num_samples <= width:
        return (
            f"{num_samples} samples of {width} features: covariance without full rank, distance far above that of many "
            "samples; comparable only at the same number"
        )
    if num_samples < 10_000:
        return f"{num_samples} samples: biased upwards, comparable only at the same number"
    return None


class Extrapolation(NamedTuple):
    """A Fréchet distance over the number of samples, and where it tends; float64."""

    value: Tensor  # scalar, the distance at infinitely many samples, and its standard error
    std: Tensor
    slope: Tensor  # scalar, its fall with 1/N
    sizes: Tensor  # (points,) numbers of samples N
    distances: Tensor  # (points,) of N samples


def extrapolated_frechet_distance(
    reference: tuple[Tensor, Tensor], generated: Tensor, smallest: int, points: int = 15, seed: int = 2020
) -> Extrapolation:
    """Fréchet distance at infinitely many generated samples (Chong & Forsyth 2020, https://arxiv.org/abs/1911.07023).

    The distance of N samples falls as FID∞ + slope/N; a straight line in 1/N through ``points`` random subsets is read off at 0.
    What the finite reference adds stays. The subsets are of sizes at equal distances from ``smallest``, more than D and fewer
    than N (5,000 of 50,000 in the paper), to N. The reference is a mean ``(D,)`` and covariance ``(D, D)``.
    """
    n, d = generated.shape
    if points < 2 or not d < smallest < n:
        raise ValueError(
            f"extrapolation needs 2 points or more and a smallest subset of more than {d} (the width of the features) and "
            f"fewer than {n} (the samples), got {points} and {smallest}"
        )
    sizes, rng = np.linspace(smallest, n, points).astype(int), np.random.RandomState(seed)
    root, distances = covariance_root(reference[1]), []
    for size in sizes:
        rows = torch.from_numpy(rng.choice(n, size, replace=False)).to(generated.device)
        distances.append(frechet_distance(*reference, *mean_and_covariance(generated[rows]), root))
    found = torch.stack(distances)
    n_of = torch.from_numpy(sizes).to(found)
    x = 1 / n_of - (1 / n_of).mean()
    slope = (x * found).sum() / x.square().sum()
    value = found.mean() - slope * (1 / n_of).mean()
    variance = (found - value - slope / n_of).square().sum() / (points - 2)
    std = (variance * (1 / points + (1 / n_of).mean().square() / x.square().sum())).sqrt()
    return Extrapolation(value, std, slope, n_of, found)
