"""Running means and deviations of values that come in batches; standard errors by bootstrap and jackknife (Efron 1979)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from calib_guidance.backend.distributed import DistributedContext


class Moments:
    """Mean and covariance of rows ``(N, width)`` that come in batches, in float64.

    Batches and processes are merged about their own means (Chan, Golub & LeVeque 1983), so that nothing cancels.
    """

    def __init__(self, width: int, device: torch.device):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows ``(N, D)``, N ≥ 1."""
        rows = rows.to(self.mean)
        mean = rows.mean(0)
        centred, shift, count = rows - mean, mean - self.mean, self.count + len(rows)
        # What the means are apart is one row more: a product of matrices, without (D, D) beside the sums.
        centred = torch.cat([centred, (shift * (self.count * len(rows) / count).sqrt())[None]])
        self.scatter.addmm_(centred.T, centred)
        self.mean += shift * (len(rows) / count)
        self.count = count

    def gather(self, processes: DistributedContext) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and covariance ``(D, D)``, divisor n − 1, of all rows of all processes, on the CPU."""
        count = processes.sum(self.count)
        mean = processes.sum(self.mean * self.count) / count
        shift = self.mean - mean
        scatter = processes.sum(self.scatter + self.count * torch.outer(shift, shift))
        return mean.cpu(), ((scatter + scatter.T) / (2 * (count - 1))).cpu()


class StepMoments(Metric):
    """Mean and standard deviation of a quantity at each step, from its count, sum and sum of squares."""

    full_state_update = False
    sums: Tensor

    def __init__(self, num_steps: int, **kwargs: object):
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(num_steps, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, step: int, values: Tensor, counts: Tensor | None = None) -> None:
        """Count the values ``(N,)`` of a batch at one step, where ``counts`` ``(N,)`` is 1 and not 0; None counts all."""
        values = values.double()
        counts = torch.ones_like(values) if counts is None else counts.double()
        self.sums[step] += torch.stack([counts, counts * values, counts * values.square()]).sum(1)

    def compute(self) -> Tensor:
        """Mean and standard deviation at each step, ``(2, num_steps)``; NaN where nothing was counted."""
        count, total, squares = self.sums.unbind(1)
        mean = total / count
        # One tensor: torchmetrics squeezes those of a single number, and one step would lose its axis.
        return torch.stack([mean, (squares / count - mean.square()).clamp(min=0).sqrt()])


def bootstrap_sums(terms: Tensor, resamples: int = 200, seed: int = 0) -> Tensor:
    """Sums ``(resamples, C)`` float64 over N samples drawn with replacement, of what each adds, ``(N, C)``, N ≥ 1.

    Means, accuracies and binned errors are functions of them, whose standard deviation over the resamples is the standard error.
    """
    n = len(terms)
    if not n:
        raise ValueError("bootstrap_sums needs at least one sample, got none")
    rng, terms = np.random.RandomState(seed), terms.double()
    times = (torch.from_numpy(np.bincount(rng.randint(n, size=n), minlength=n)) for _ in range(resamples))
    return torch.stack([t.to(terms) @ terms for t in times])


def jackknife_std(without: Tensor) -> Tensor:
    """Standard error ``(…)`` float64 of a value over G ≥ 2 blocks of samples, from the values ``(G, …)`` of all but block g.

    For values that are kept as sums over blocks of about equal size. It is known to about 1/√(2·(G − 1)) of its value.
    """
    without = without.double()
    return (len(without) - 1) ** 0.5 * without.std(0, correction=0)
