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
_ROOM = 256.0  # where gradients start: far from the least number of float16, 6e-8, and from its largest, 65504


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


def wide_gradient(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a network in float16 whose gradients do not vanish: those of a sure classifier are below the least of float16.

    The way back is linear and samples do not meet on it. Each sample's gradient starts at one size, and gets its own back in
    float32.

    Args:
        network: maps float32 images ``(N, …)``, which it casts itself, to float32 logits ``(N, K)``.
        x: the images.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return network(x)
    size: Tensor | None = None  # of each sample, from the start of the way back to its end

    def start(gradient: Tensor) -> Tensor:
        nonlocal size
        largest = gradient.abs().amax(dim=1)
        size = torch.where(largest > 0, largest, torch.ones_like(largest))
        return gradient * (_ROOM / size)[:, None]

    def end(gradient: Tensor) -> Tensor:
        return gradient * (size / _ROOM).view(-1, *[1] * (gradient.ndim - 1))

    images = x.view_as(x)
    images.register_hook(end)
    logits = network(images)
    logits.register_hook(start)
    return logits.view_as(logits)
