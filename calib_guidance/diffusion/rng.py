"""One random stream per sample, so that a sample depends on (seed, index) and on nothing that runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# The counter's top word keeps streams apart: a label policy never moves the noise, and what a training image is diffused with
# is not what the sample of the same number starts from.
SAMPLING, _LABEL, _STEP, DIFFUSION = range(4)


def _bit_generator(seed: int, index: int, stream: int) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([seed, index], dtype=np.uint64), counter=np.array([0, 0, 0, stream], np.uint64)
    )


# Where a sampler gets its random numbers from: the next standard normal images, (N, C, H, W), at every call.
Noise = Callable[[], Tensor]


class SampleStreams:
    """Standard normal images, each from the Philox stream keyed by its own (seed, index).

    The numbers are made on the CPU, whatever the device: they are the same bit for bit on every machine, at every batch
    size and in every order.

    Args:
        seeds: ``(N,)`` seed of each sample, ≥ 0.
        indices: ``(N,)`` index of each sample, ≥ 0.
        shape: of one sample.
        device: where the numbers go.
        stream: ``SAMPLING``, the noise of samplers, or ``DIFFUSION``, that of x_t ~ q(x_t | x0).
        ahead: make the next numbers on a thread of its own while these are used, one set ahead of them. None does where the
            device is a GPU, which computes meanwhile; a CPU would only be kept from it. The numbers are the same.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        stream: int = SAMPLING,
        ahead: bool | None = None,
    ):
        pairs = zip(seeds, indices, strict=True)
        self.generators = [np.random.Generator(_bit_generator(int(s), int(i), stream)) for s, i in pairs]
        self.shape, self.device = tuple(shape), torch.device(device)
        ahead = self.device.type == "cuda" if ahead is None else ahead
        # Its thread ends with this object.
        self._thread = ThreadPoolExecutor(1, "noise") if ahead else None
        self._next: Future[Tensor] | None = None

    def _draw(self) -> Tensor:
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=self.device.type == "cuda")
        rows = noise.numpy()
        for generator, row in zip(self.generators, rows, strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        return noise

    def __call__(self) -> Tensor:
        """The next numbers of every stream, ``(N, *shape)`` float32: one copy to the device for all samples."""
        if self._thread is None:
            noise = self._draw()
        else:
            noise = self._draw() if self._next is None else self._next.result()
            self._next = self._thread.submit(self._draw)
        # From pinned memory, which PyTorch does not hand out anew before the copy is done: the host does not wait for it.
        return noise.to(self.device, non_blocking=True)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The uniform random label of sample ``index``, in 0 … num_classes − 1."""
    return int(np.random.Generator(_bit_generator(seed, index, _LABEL)).integers(num_classes))


def random_steps(seed: int, indices: Sequence[int]) -> np.ndarray:
    """One uniform number in [0, 1) per sample, ``(N,)`` float64, from which its diffusion step is drawn."""
    return np.array([np.random.Generator(_bit_generator(seed, int(i), _STEP)).random() for i in indices])
