"""MIND: distance of one-dimensional projections of two sets of features (arXiv 2605.06797, as torch-fidelity 0.4 computes it)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_AT_A_TIME = 64  # directions: 26 MB of projections of 50,000 samples


def mind(reference: Tensor, generated: Tensor, num_directions: int = 1000, seed: int = 2020) -> Tensor:
    """MIND (arXiv 2605.06797): a sliced Wasserstein distance between sets of features.

    3·D·mean over random unit directions of the squared 2-Wasserstein distance between projections.

    On a line that distance is the mean squared difference of sorted values. Two samples of one law give more than 0, less of it
    the more samples: values compare at equal numbers of samples only.

    Args:
        reference, generated: features ``(M, D)`` and ``(N, D)``; of the larger set min(M, N) random rows are taken.
        num_directions: M of the paper.
        seed: of rows and directions, drawn on the CPU.

    Returns:
        Scalar float64.

    Examples:
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> round(float(mind(x, x + 0.5)), 4)  # 3·1·0.5²: in one dimension every direction is ±1
        0.75
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(len(reference), len(generated))
    if not count:
        raise ValueError(f"MIND needs a sample in each set, got {len(reference)} and {len(generated)}")

    def rows(features: Tensor) -> Tensor:
        if len(features) == count:
            return features
        return features[torch.randperm(len(features), generator=generator)[:count].to(features.device)]

    reference, generated = rows(reference), rows(generated)
    directions = F.normalize(torch.randn(num_directions, reference.shape[1], generator=generator), dim=1)
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    for some in directions.to(reference.device).split(_AT_A_TIME):
        # float64, as differences of sorted values of large features are small
        ours, theirs = (features.double() @ some.double().T for features in (reference, generated))
        total += (ours.sort(0).values - theirs.sort(0).values).square().mean(0).sum()
    return 3 * reference.shape[1] * total / num_directions
