"""Number formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from calib_guidance.errors import check_choice

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
HALVES = (torch.float16, torch.bfloat16)
_ROOM = (
    256.0  # by which gradients start above 1: far from the least number of float16, 6e-8, and from its largest, 65504
)


def dtype_of(name: str, known: Iterable[str] = DTYPES) -> torch.dtype:
    """The type of a name."""
    check_choice("dtype", name, known)
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to a type, or none even inside of another; the meta device, where memory is counted, knows neither."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def exact_float32() -> Iterator[None]:
    """While inside, GPUs multiply float32 as float32, and not by halves of its digits (TF32)."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class _Enter(torch.autograd.Function):
    """The image, whose gradient gets back the size that :class:`_Leave` took from it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, sizes: list[Tensor]) -> Tensor:
        ctx.sizes = sizes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (size,) = ctx.sizes
        return gradient * (size / _ROOM).view(-1, *[1] * (gradient.ndim - 1)), None


class _Leave(torch.autograd.Function):
    """The logits, whose gradient starts its way back at one size for all samples."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor, sizes: list[Tensor]) -> Tensor:
        ctx.sizes = sizes
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        size = gradient.abs().amax(dim=1)
        size = torch.where(size > 0, size, torch.ones_like(size))
        ctx.sizes[:] = [size]
        return gradient * (_ROOM / size)[:, None], None


def wide_gradient(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a network in float16 whose gradients do not vanish: a sure classifier's are below what float16 can tell from 0.

    The way back is linear and samples do not meet on it, so that each one's gradient may start at its own size and get that back
    in float32. Costs nothing where no gradient is taken.

    Args:
        network: maps float32 images ``(N, …)``, which it casts itself, to float32 logits ``(N, K)``.
        x: the images.
    """
    sizes: list[Tensor] = []
    return _Leave.apply(network(_Enter.apply(x, sizes)), sizes)
