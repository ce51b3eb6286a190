"""Speeds of this CPU, measured within a second or two."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from calib_guidance.backend.convolutions import PackedConv2d
from calib_guidance.backend.cost import Machine, Measured, WorkCounter, machine_of

# Channels, side and batch of 3×3 convolutions; rows, columns and depth of products; heads, tokens and channels of attention.
_CONVOLUTIONS = (
    (32, 32, 2),
    (64, 32, 2),
    (64, 64, 1),
    (128, 16, 2),
    (128, 32, 1),
    (256, 8, 2),
    (256, 16, 1),
    (512, 4, 2),
    (512, 1, 4),
)
_POINTWISE = ((64, 32, 2), (256, 16, 2), (512, 8, 2), (512, 2, 4), (2048, 1, 4))
_PRODUCTS = ((2, 512, 256), (64, 384, 384), (256, 384, 384), (256, 1536, 384), (512, 256, 256), (2048, 128, 128))
_ATTENTION = ((2, 64, 64), (8, 64, 64), (4, 256, 64), (16, 16, 64))
_FLOATS = (1 << 12, 1 << 16, 1 << 19, 1 << 22)
# A network's weights come from memory at every step, so each call of a microbenchmark has others: more than fit into the caches.
_CACHES, _MOST_WEIGHTS = 48 << 20, 64


def clock() -> float:
    """Seconds: of one thread its CPU time, which other programs do not lengthen; of several those on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _seconds(run: Callable[[], object], at_least: float = 0.008) -> float:
    """Least time of a call, of three or more within some milliseconds."""
    run()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 3 or spent < at_least:
        started = clock()
        run()
        taken = clock() - started
        best, spent, calls = min(best, taken), spent + taken, calls + 1
    return best


Form = tuple[tuple[float, ...], float, Callable[[], object]]


def _measured(forms: Iterable[Form], launch: float) -> Measured:
    """Of sizes, amount of work and a form: work per second, launch not counted."""
    places, speeds = [], []
    for sizes, work, run in forms:
        places.append(sizes)
        speeds.append(work / max(_seconds(run) - launch, 1e-7))
    return Measured.of(places, speeds)


def _in_turn(forms: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """Calls the next of some forms at every call."""
    turns = itertools.cycle(list(forms))
    return lambda: next(turns)()


def _copies(num_bytes: int) -> range:
    return range(min(_MOST_WEIGHTS, 1 + _CACHES // num_bytes))


def _images(*shape: int) -> torch.Tensor:
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return images.to(memory_format=torch.channels_last)


def _convolutions(backward: bool) -> Iterable[Form]:
    """Forward, or the gradient with respect to the input, with the weights as networks have them."""
    for kernel, sizes in ((3, _CONVOLUTIONS), (1, _POINTWISE)):
        for channels, side, n in sizes:
            x, weights = _images(n, channels, side, side), []
            for _ in _copies(4 * channels**2 * kernel**2):
                conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2).requires_grad_(False)
                weights.append(conv.to(memory_format=torch.channels_last))
            place, work = (n * side**2, channels, channels * kernel**2), 2 * n * side**2 * channels**2 * kernel**2
            if not backward:
                yield place, work, _in_turn([lambda conv=conv, x=x: conv(x) for conv in weights])
                continue
            leaf, gradients = x.clone().requires_grad_(), []
            with torch.enable_grad():
                outputs = [PackedConv2d.of(conv)(leaf) for conv in weights]
            ones = torch.ones_like(outputs[0])
            for out in outputs:
                gradients.append(
                    lambda out=out, leaf=leaf, ones=ones: torch.autograd.grad(out, leaf, ones, retain_graph=True)
                )
            yield place, work, _in_turn(gradients)


def _products() -> Iterable[Form]:
    for rows, columns, depth in _PRODUCTS:
        a, bias = torch.randn(rows, depth), torch.randn(columns)
        weights = [torch.randn(columns, depth) for _ in _copies(4 * columns * depth)]
        forms = [lambda a=a, weight=weight, bias=bias: F.linear(a, weight, bias) for weight in weights]
        yield (rows, columns, depth), 2 * rows * columns * depth, _in_turn(forms)


@torch.no_grad()
def _launch() -> float:
    """Time of an operator in a network so narrow that nothing else counts, Python included."""
    block = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.Linear(4, 4))
    network, x = nn.Sequential(*(block for _ in range(4))), torch.randn(1, 8, 4, 4)
    with WorkCounter() as counter:
        network(x)
    return _seconds(lambda: network(x)) / len(counter.works)


@torch.no_grad()
def this_cpu() -> Machine:
    """This CPU with the threads that PyTorch has now, in float32."""
    launch = _launch()
    attention = []
    for heads, tokens, channels in _ATTENTION:
        q = torch.randn(1, heads, tokens, channels)
        rows = heads * tokens
        attention.append(
            (
                (rows, channels, 2 * tokens),
                4 * rows * tokens * channels,
                lambda q=q: F.scaled_dot_product_attention(q, q, q),
            )
        )
    rates = {
        "conv": _convolutions(backward=False),
        "conv_backward": _convolutions(backward=True),
        "matmul": _products(),
        "attention": attention,
    }
    speeds: dict[str, list] = {"memory": [], "transcendental": [], "normalization": []}
    for count in _FLOATS:
        a, b = _images(1, 64, 8, count // 512), _images(1, 64, 8, count // 512)
        scale = torch.ones(64)
        speeds["memory"].append(((12 * count,), 12 * count, lambda a=a, b=b: a + b))
        speeds["transcendental"].append(((8 * count,), 8 * count, lambda a=a: F.silu(a)))
        speeds["normalization"].append(((8 * count,), 8 * count, lambda a=a, s=scale: F.group_norm(a, 32, s, s)))
    return machine_of(
        {kind: _measured(forms, launch) for kind, forms in rates.items()},
        {kind: _measured(forms, launch) for kind, forms in speeds.items()},
        launch,
        "this CPU",
    )
