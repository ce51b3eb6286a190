"""One random stream per sample, so that a sample depends on (seed, index) and on nothing that runs beside it."""

import math
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
        ahead: make the next numbers on a thread while these are used; None does for a GPU. The numbers are the same.

    Examples:
        >>> both = SampleStreams(seeds=[0, 0], indices=[3, 7], shape=(1, 2, 2))()
        >>> one = SampleStreams(seeds=[0], indices=[7], shape=(1, 2, 2))()
        >>> bool((both[1] == one[0]).all())  # a sample depends on its seed and index alone
        True
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
        # A GPU computes meanwhile; a CPU would only be kept from it. The thread ends with this object.
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
        noise = self._draw() if self._next is None else self._next.result()
        if self._thread is not None:
            self._next = self._thread.submit(self._draw)
        # From pinned memory, which PyTorch does not reuse before the copy is done: the host does not wait for it.
        return noise.to(self.device, non_blocking=True)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The uniform random label of sample ``index``, in 0 … num_classes − 1."""
    return int(np.random.Generator(_bit_generator(seed, index, _LABEL)).integers(num_classes))


def random_steps(seed: int, indices: Sequence[int]) -> np.ndarray:
    """One uniform number in [0, 1) per sample, ``(N,)`` float64, from which its diffusion step is drawn."""
    return np.array([np.random.Generator(_bit_generator(seed, int(i), _STEP)).random() for i in indices])


def _mix(z: Tensor) -> Tensor:
    """A bijection of 64-bit numbers that scatters them (splitmix64, Steele et al. 2014); ``z`` int64, which wraps."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ ((z >> shift) & (1 << (64 - shift)) - 1)) * factor  # a logical shift
    return z


class KeyedNumbers:
    """Random numbers of each sample that follow from its x_T alone, which itself follows from (seed, index).

    For parts that are not told seeds. Integer arithmetic on the device: nothing waits, and batches do not matter.
    """

    def __init__(self, x_T: Tensor):
        bits = x_T.detach().double().contiguous().view(torch.int64).flatten(1)
        places = _mix(torch.arange(1, bits.shape[1] + 1, device=x_T.device)) | 1
        self._keys = _mix((bits * places).sum(1))
        self._counters: dict[int, Tensor] = {}

    def uniform(self, *shape: int, stream: int = 0) -> Tensor:
        """``(N, *shape)`` float64 in [0, 1): the same at every call with this stream, and others with another."""
        count = math.prod(shape)
        if count not in self._counters:
            self._counters[count] = _mix(torch.arange(1, count + 1, device=self._keys.device))
        z = _mix(_mix(self._keys + stream)[:, None] + self._counters[count])
        return (((z >> 11) & (1 << 53) - 1).double() / (1 << 53)).view(-1, *shape)

    def normal(self, *shape: int, stream: int = 0) -> Tensor:
        """``(N, *shape)`` float64 standard normal (Box and Muller 1958), as :meth:`uniform`."""
        radius, angle = self.uniform(2, *shape, stream=stream).unbind(1)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
