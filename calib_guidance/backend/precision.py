"""Number formats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ROOM = (
    256.0  # by which gradients start above 1: far from the least number of float16, 6e-8, and from its largest, 65504
)


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


class WideGradient:
    """Keeps gradients through a network in float16 from vanishing: a sure classifier's are below what float16 can tell from 0.

    The way back is linear and samples do not meet on it, so that each one's gradient may start at its own size and get that back
    in float32. Costs nothing where no gradient is taken.

    ``enter`` takes the float32 images ``(N, …)`` before they are cast, ``leave`` the float32 logits ``(N, K)``.
    """

    def __init__(self) -> None:
        self._sizes: list[Tensor] = []

    def enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self._sizes)

    def leave(self, logits: Tensor) -> Tensor:
        return _Leave.apply(logits, self._sizes)
