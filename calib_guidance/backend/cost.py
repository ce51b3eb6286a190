"""A cost model: the operations of code, and the time that they take on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators by what limits them. All others read and write, at the speed of the memory.
_KINDS = {"convolution": "conv", "_convolution_pointwise": "conv", "convolution_backward": "conv_backward"}
_KINDS |= {"_convolution_transpose_pointwise": "conv_backward"}
_KINDS |= dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "linear"), "matmul")
_KINDS |= dict.fromkeys(
    ("silu", "silu_", "silu_backward", "gelu", "softplus", "softplus_backward", "exp", "sigmoid", "tanh", "cos", "sin"),
    "transcendental",
)
_KINDS |= dict.fromkeys(("native_group_norm", "native_layer_norm", "_softmax", "_log_softmax"), "normalization")
_FREE = {"empty", "empty_strided", "empty_like", "detach", "_unsafe_view", "alias", "lift_fresh", "new_empty"}


class Work(NamedTuple):
    """One operator."""

    kind: str  # conv, conv_backward, matmul, attention, transcendental, normalization or memory
    flops: float  # a multiplication with its addition is two
    bytes: float  # read and written
    half: bool  # whether it computes in 16 bits
    rows: float  # pixels or rows of the output
    width: float  # output channels, or columns


class WorkCounter(TorchDispatchMode):
    """Collects the operators that run while it is on; on the meta device, too."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def take(self) -> list[Work]:
        """What ran since the last call."""
        taken, self.works = self.works, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in _FREE:
            return result
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not outputs or not outputs[0].numel():
            return result
        counts = flop_registry.get(func._overloadpacket)
        flops = counts(*args, **(kwargs or {}), out_val=result) if counts else 0
        kind = _KINDS.get(name, "attention" if "attention" in name else "memory")
        main = outputs[0]
        width = main.shape[1] if main.ndim == 4 and "conv" in kind else main.shape[-1] if main.ndim else 1
        moved = sum(value.numel() * value.element_size() for value in (*inputs, *outputs))
        half = main.element_size() == 2
        self.works.append(Work(kind, float(flops), float(moved), half, main.numel() / max(width, 1), float(width)))
        return result


class Machine(NamedTuple):
    """What operators take on a device: each launch + max(FLOPs/rate, bytes/bandwidth).

    Attributes:
        half, single: FLOP/s in 16 and in 32 bits.
        bandwidth: bytes/s.
        launch: seconds.
        reached: fraction of the peaks that is expected.
        rate, speed: FLOP/s and bytes/s of an operator, where they were measured; they replace the peaks.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    launch: float
    reached: float = 1.0
    rate: Callable[[Work], float] | None = None
    speed: Callable[[Work], float] | None = None

    def seconds(self, works: Iterable[Work]) -> float:
        """The time of operators, one after the other."""
        return sum(self.launch + max(self._computing(work), self._moving(work)) for work in works)

    def _computing(self, work: Work) -> float:
        if not work.flops:
            return 0.0
        if self.rate is not None:
            return work.flops / self.rate(work)
        # Convolutions of float32 are TF32 on GPUs unless that is switched off, half as fast as in 16 bits.
        peak = self.half if work.half else self.half / 2 if work.kind.startswith("conv") else self.single
        return work.flops / (self.reached * peak)

    def _moving(self, work: Work) -> float:
        return work.bytes / (self.speed(work) if self.speed is not None else 0.8 * self.bandwidth)


# Public peaks: dense 16-bit tensor cores with float32 sums, float32 without them, memory. Launches are those of eager PyTorch.
_LAUNCH, _REACHED = 6e-6, 0.5
GPUS: Mapping[str, Machine] = {
    name: Machine(name, half * 1e12, single * 1e12, memory * 1e9, _LAUNCH, _REACHED)
    for name, half, single, memory in (
        ("A100", 312, 19.5, 2039),
        ("H100", 989, 67, 3350),
        ("H200", 989, 67, 4800),
        ("B200", 2250, 80, 8000),
        ("L40S", 362, 91.6, 864),
        ("RTX 4090", 165, 82.6, 1008),
        ("RTX 3090", 71, 35.6, 936),
    )
}


class Measured(NamedTuple):
    """Speeds of one kind of operator that were measured at some sizes."""

    places: list[tuple[float, ...]]  # log2 of the sizes
    speeds: list[float]

    @classmethod
    def of(cls, sizes: Iterable[Sequence[float]], speeds: Iterable[float]) -> Measured:
        return cls([tuple(math.log2(max(size, 1)) for size in each) for each in sizes], list(speeds))

    def at(self, *sizes: float) -> float:
        """Between the measured sizes: the mean of their logarithms, weighted by the inverse of the squared distance."""
        place = [math.log2(max(size, 1)) for size in sizes]
        weights = [1 / (0.05 + sum((a - b) ** 2 for a, b in zip(place, p, strict=True))) for p in self.places]
        mean = sum(w * math.log(s) for w, s in zip(weights, self.speeds, strict=True)) / sum(weights)
        return math.exp(mean)


def machine_of(rates: Mapping[str, Measured], speeds: Mapping[str, Measured], launch: float, name: str) -> Machine:
    """A machine with measured speeds: ``rates`` by rows, width and depth of products, ``speeds`` by bytes."""

    def rate(work: Work) -> float:
        depth = work.flops / (2 * work.rows * work.width)
        kind = work.kind if work.kind in rates else "matmul"
        return rates[kind].at(work.rows, work.width, depth)

    def speed(work: Work) -> float:
        return speeds[work.kind if work.kind in speeds else "memory"].at(work.bytes)

    return Machine(name, 1.0, 1.0, 1.0, launch, 1.0, rate, speed)
