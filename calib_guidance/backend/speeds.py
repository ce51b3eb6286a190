"""Speeds of this CPU, measured within a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable

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
)
_POINTWISE = ((64, 32, 2), (256, 16, 2), (512, 8, 2))
_PRODUCTS = ((2, 512, 256), (64, 384, 384), (256, 384, 384), (256, 1536, 384), (512, 256, 256), (2048, 128, 128))
_ATTENTION = ((2, 64, 64), (8, 64, 64), (4, 256, 64), (16, 16, 64))
_FLOATS = (1 << 12, 1 << 16, 1 << 19, 1 << 22)


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


def _measured(forms: list[tuple[tuple[float, ...], float, Callable[[], object]]], launch: float) -> Measured:
    """Of sizes, amount of work and a form: work per second, launch not counted."""
    speeds = [work / max(_seconds(run) - launch, 1e-7) for _, work, run in forms]
    return Measured.of((sizes for sizes, _, _ in forms), speeds)


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
    launch, generator = _launch(), torch.Generator().manual_seed(0)

    def images(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(memory_format=torch.channels_last)

    forward, backward = [], []
    for kernel, sizes in ((3, _CONVOLUTIONS), (1, _POINTWISE)):
        for channels, side, n in sizes:
            conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2).requires_grad_(False)
            conv, x = conv.to(memory_format=torch.channels_last), images(n, channels, side, side)
            place, work = (n * side**2, channels, channels * kernel**2), 2 * n * side**2 * channels**2 * kernel**2
            forward.append((place, work, lambda conv=conv, x=x: conv(x)))
            packed = PackedConv2d.of(conv)
            leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                out = packed(leaf)
            ones = torch.ones_like(out)
            backward.append(
                (
                    place,
                    work,
                    lambda out=out, leaf=leaf, ones=ones: torch.autograd.grad(out, leaf, ones, retain_graph=True),
                )
            )
    products = []
    for rows, columns, depth in _PRODUCTS:
        a, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
        products.append(
            ((rows, columns, depth), 2 * rows * columns * depth, lambda a=a, w=weight, b=bias: F.linear(a, w, b))
        )
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
    rates = {"conv": forward, "conv_backward": backward, "matmul": products, "attention": attention}
    speeds: dict[str, list] = {"memory": [], "transcendental": [], "normalization": []}
    for count in _FLOATS:
        a, b = images(1, 64, 8, count // 512), images(1, 64, 8, count // 512)
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
