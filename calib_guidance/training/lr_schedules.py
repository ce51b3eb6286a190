"""Learning-rate schedules that know the length of the run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up to the optimizer's rate, then half a cosine down (Loshchilov & Hutter 2017), stepped at every batch.

    Args:
        optimizer: whose rates are scaled.
        warmup_steps: optimizer steps of the warm-up.
        total_steps: optimizer steps of the run; None lets the training module fill in what the trainer is going to do.
        final: fraction of the rate that is left at the end, in [0, 1].

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule, rates = WarmupCosine(optimizer, warmup_steps=2, total_steps=6), []
        >>> for _ in range(7):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, final: float = 0.0):
        if warmup_steps < 0 or not 0 <= final <= 1:
            raise ValueError(f"warmup_steps must be at least 0 and final in [0, 1], got {warmup_steps} and {final}")
        self.warmup_steps, self.total_steps, self.final = warmup_steps, total_steps, final
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Fraction of the optimizer's rate at a step."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None:
            return 1.0  # only before training, while the length of the run is not known yet
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2

    def get_lr(self) -> list[float]:
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, object]:
        # A resumed run may be a longer one: its own length counts, not that of the run that was interrupted.
        return {key: value for key, value in super().state_dict().items() if key != "total_steps"}


class InverseSqrt(LRScheduler):
    """Linear warm-up, the optimizer's rate, then a decay with 1/√step (Karras et al. 2024, arXiv 2312.02696, Eq. 67).

    Args:
        optimizer: whose rates are scaled.
        warmup_steps: optimizer steps of the warm-up.
        constant_steps: optimizer steps up to the decay.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule, rates = InverseSqrt(optimizer, constant_steps=1), []
        >>> for _ in range(5):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 0.71, 0.58, 0.5]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, constant_steps: int = 70_000):
        if warmup_steps < 0 or constant_steps < 1:
            raise ValueError(
                f"warmup_steps must be at least 0 and constant_steps at least 1, got {warmup_steps} and {constant_steps}"
            )
        self.warmup_steps, self.constant_steps = warmup_steps, constant_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        step = self.last_epoch
        factor = min(1.0, (step + 1) / (self.warmup_steps + 1)) / math.sqrt(max(1.0, step / self.constant_steps))
        return [rate * factor for rate in self.base_lrs]
