"""One random stream per sample, so that a sample depends on (seed, index) and on nothing that runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_LABEL_STREAM = 1  # the counter's top word keeps labels and noise apart, so that a label policy never moves the noise


def _bit_generator(seed: int, index: int, stream: int = 0) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([seed, index], dtype=np.uint64), counter=np.array([0, 0, 0, stream], np.uint64)
    )


class Noise(Protocol):
    """Where a sampler gets its random numbers from."""

    def __call__(self) -> Tensor:
        """The next standard normal images, ``(N, C, H, W)``."""
        ...


class SampleStreams:
    """Standard normal images, each from the Philox stream keyed by its own (seed, index).

    The numbers are made on the CPU, whatever the device: they are the same bit for bit on every machine, at every batch
    size and in every order.

    Args:
        seeds: ``(N,)`` seed of each sample, ≥ 0.
        indices: ``(N,)`` index of each sample, ≥ 0.
        shape: of one sample.
        device: where the numbers go.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        pairs = zip(seeds, indices, strict=True)
        self.generators = [np.random.Generator(_bit_generator(int(s), int(i))) for s, i in pairs]
        self.shape, self.device = tuple(shape), torch.device(device)

    def __call__(self) -> Tensor:
        """The next numbers of every stream, ``(N, *shape)`` float32."""
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=self.device.type == "cuda")
        rows = noise.numpy()
        for generator, row in zip(self.generators, rows, strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        return noise.to(self.device, non_blocking=True)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The uniform random label of sample ``index``, in 0 … num_classes − 1."""
    return int(np.random.Generator(_bit_generator(seed, index, _LABEL_STREAM)).integers(num_classes))
