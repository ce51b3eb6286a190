"""Number formats."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calib_guidance.errors import check_choice

Dtype = Literal["float32", "float16", "bfloat16", "auto"]
DTYPES = ("float32", "float16", "bfloat16", "auto")
HALVES = (torch.float16, torch.bfloat16)
_CAPABILITY = 8, 0  # of NVIDIA's GPUs with bfloat16 tensor cores, from Ampere on


class FastDtype(NamedTuple):
    """The number format that networks run fastest in, and why."""

    name: str
    reason: str


def bfloat16_instructions() -> str | None:
    """The instructions for bfloat16 that the CPU has; None where it has none, or PyTorch does not tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for name in ("amx_bf16", "avx512_bf16") if known.get(name)), None)


def fast_dtype() -> FastDtype:
    """bfloat16 on a GPU with tensor cores for it, or where there is no GPU on a CPU with instructions for it; else float32."""
    if torch.cuda.is_available():
        capable, device = torch.cuda.get_device_capability() >= _CAPABILITY, torch.cuda.get_device_name()
        return FastDtype("bfloat16" if capable else "float32", f"the GPU is {device}")
    found = bfloat16_instructions()
    return FastDtype(*(("bfloat16", f"the CPU has {found}") if found else ("float32", "the CPU has no avx512_bf16")))


def dtype_of(name: str, known: Iterable[str] = DTYPES) -> torch.dtype:
    """The type of a name; of ``auto`` that of :func:`fast_dtype`."""
    check_choice("dtype", name, known)
    return getattr(torch, fast_dtype().name if name == "auto" else name)


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
