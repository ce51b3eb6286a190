"""Fréchet distance between feature distributions (Heusel et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)``, divisor n − 1, in float64 of features ``(N, D)``."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^{1/2}, by eigenvalues of the symmetric √Σ₁·Σ₂·√Σ₁.

    Args:
        mean1, mean2: ``(D,)``.
        covariance1, covariance2: ``(D, D)``, symmetric.

    Returns:
        Scalar float64, ≥ 0 up to rounding.
    """
    covariance1, covariance2 = covariance1.double(), covariance2.double()
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt()  # root·rootᵀ is Σ₁, and any such root has the same eigenvalues below
    eigenvalues = torch.linalg.eigvalsh(root.T @ covariance2 @ root).clamp(min=0)
    mean_term = (mean1.double() - mean2.double()).square().sum()
    return mean_term + covariance1.trace() + covariance2.trace() - 2 * eigenvalues.sqrt().sum()


class FrechetDistance(Metric):
    """Fréchet distance of generated features to a reference, from fixed-size float64 sums, exact over ranks.

    Args:
        reference: ``(M, D)`` features of the reference, the same on every rank.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, reference: Tensor, **kwargs: object):
        super().__init__(**kwargs)
        mean, covariance = mean_and_covariance(reference)
        self.register_buffer("reference_mean", mean, persistent=False)
        self.register_buffer("reference_covariance", covariance, persistent=False)
        d = reference.shape[1]
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add generated features ``(N, D)``."""
        # About the reference mean, so that the subtraction in compute cancels few digits.
        centred = features.double() - self.reference_mean
        self.count += len(features)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred

    def compute(self) -> Tensor:
        """Scalar float64; NaN with fewer than two samples."""
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        if self.count < 2:
            return torch.full((), torch.nan, dtype=torch.float64)
        return frechet_distance(torch.zeros_like(mean), self.reference_covariance, mean, covariance)
