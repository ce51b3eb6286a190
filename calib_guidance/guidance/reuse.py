"""Classifier gradients that serve for several steps."""

from typing import final

import numpy as np
import torch
from torch import Tensor

from calib_guidance.diffusion.schedules import NoiseLevels
from calib_guidance.errors import check_numbers
from calib_guidance.guidance.norms import rms


@final
class GradientReuse:
    """Reuse of classifier gradients over several steps.

    A new gradient is computed at some guided steps only; in between, the last one is applied again.

    A reused ∇S is what the classifier would have returned: each step scales it by its own variance, sine factor or residual, so
    that k steps together are as strong as k guided steps. With a constant gradient, samples are the same for every k.

    With ``skip_below``, a sample whose ‖∇S‖ is below that fraction of the mean of its own norms so far keeps this weak gradient
    for ``skip_every`` steps. Each sample follows its own norms, so it does not depend on its batch. The classifier runs for a
    batch where one of its samples is due (of a score over groups, one of a group makes all of it due): time is saved only at
    steps where none is.

    Args:
        every: k; 1 takes a gradient at every guided step. Within a step (Heun, recurrence) all evaluations compute a gradient, or
            all reuse it.
        skip_below: fraction of the running mean, between 0 and 1; None skips nothing.
        skip_every: steps for which a weak gradient serves.

    Examples:
        >>> from calib_guidance.diffusion import NoiseSchedule
        >>> levels = NoiseSchedule(np.full(4, 0.5)).levels  # index 3 is the first step
        >>> GradientReuse(every=2).runs(levels, active=np.ones(4, dtype=bool))
        array([False,  True, False,  True])
    """

    def __init__(self, every: int = 1, skip_below: float | None = None, skip_every: int = 4):
        check_numbers(least=1, every=every, skip_every=skip_every)
        check_numbers(above=0, below=1, null="no skipping", skip_below=skip_below)
        if skip_below is not None and skip_every <= every:
            raise ValueError(f"skip_every must exceed every ({every}), got {skip_every}: nothing would be skipped")
        self.every, self.skip_below, self.skip_every = every, skip_below, skip_every

    def runs(self, levels: NoiseLevels, active: np.ndarray) -> np.ndarray:
        """Whether a classifier runs at each level ``(T,)`` of the ``active`` ones: with skipping, the most that it may."""
        steps = np.unique(levels.executed[active])
        return active & np.isin(levels.executed, steps[:: self.every])

    def start(self, group_size: int = 1) -> "HeldGradient":
        """The gradients of one trajectory."""
        return HeldGradient(self, group_size)


class HeldGradient:
    """Gradients ``(N, C, H, W)`` of one trajectory, and when new ones are due."""

    def __init__(self, reuse: GradientReuse, group_size: int):
        self.reuse, self.group_size = reuse, group_size
        self.gradient: Tensor | None = None
        self._step, self._count, self._is_due = -1, -1, True  # of the current step; guided steps before it
        self._due = self._fresh = self._norms = self._taken = None  # (N,) each, of samples that may skip
        self._soonest: _OnHost | None = None

    def is_due(self, step: int) -> bool:
        """Whether a gradient is due at a step, of any sample; ``step`` counts the steps executed before."""
        if step != self._step:
            self._step, self._count, self._fresh = step, self._count + 1, None
            if self.gradient is None:
                self._is_due = True
            elif self._soonest is None:
                self._is_due = self._count % self.reuse.every == 0
            else:
                self._is_due = self._soonest.read() <= self._count
        return self._is_due

    @property
    def applied(self) -> Tensor:
        """Of each sample the last gradient that was taken."""
        assert self.gradient is not None
        return self.gradient

    def take(self, gradient: Tensor) -> Tensor | None:
        """Keep the new gradient of every sample that is due; returns whether a sample was, ``(N,)``, None where all were."""
        if self.reuse.skip_below is None:
            self.gradient = gradient
            return None
        if self.gradient is None:
            self.gradient = gradient
            self._due = torch.zeros(len(gradient), dtype=torch.long, device=gradient.device)
            self._norms = self._taken = torch.zeros_like(self._due, dtype=torch.float32)
        assert self._due is not None
        assert self._norms is not None
        assert self._taken is not None
        if self._fresh is None:
            groups = (self._due <= self._count).view(-1, self.group_size)
            self._fresh = groups.any(1, keepdim=True).expand_as(groups).reshape(-1)
        fresh, norm = self._fresh, rms(gradient).flatten().float()
        self._norms, self._taken = self._norms + norm * fresh, self._taken + fresh
        weak = norm * self._taken < self.reuse.skip_below * self._norms
        cycle = weak * (self.reuse.skip_every - self.reuse.every) + self.reuse.every
        self._due = torch.where(fresh, cycle + self._count, self._due)
        self._soonest = _OnHost(self._due.min())
        self.gradient = torch.where(fresh.view(-1, 1, 1, 1), gradient, self.gradient)
        return fresh


class _OnHost:
    """A number of the device that the host reads later. A GPU keeps working meanwhile."""

    def __init__(self, value: Tensor):
        self.value, self.copied = value, None
        if value.device.type == "cuda":
            self.value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> int:
        if self.value.device.type == "meta":  # no numbers: due at once
            return 0
        if self.copied is not None:
            self.copied.synchronize()
        return int(self.value.numpy())
