"""Number formats."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from calib_guidance.errors import check_choice

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
HALVES = (torch.float16, torch.bfloat16)


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


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most ``x`` ≥ 0, float32 or float64, and a normal number: dividing by it is exact."""
    bits, exponent = (torch.int64, 0x7FF << 52) if x.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (x.view(bits) & exponent).view(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
