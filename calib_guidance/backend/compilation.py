"""Networks compiled for fixed shapes, forward and backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from calib_guidance.backend.light_imports import is_imported


def eager() -> AbstractContextManager:
    """Runs compiled functions as they were written. Where torch's compiler is not imported, there are none."""
    return torch.compiler.set_stance("force_eager") if is_imported("torch._dynamo") else nullcontext()


class _OwnGradient(torch.autograd.Function):
    """The same tensor, whose gradient gets memory of its own."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Compiled:
    """A function of tensors compiled by torch.compile for the shapes that it meets; on a GPU recorded as CUDA graphs.

    A graph writes to the same memory at every call. Output and input gradients are copied out of it, and may be kept; inputs are
    copied in by PyTorch. Every new shape costs a compilation: :class:`~calib_guidance.tasks.retry.FaultTolerant` pads short
    batches.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        # Of "reduce-overhead" CPUs take nothing: it is the CUDA graphs.
        self._fast = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].device.type != "cuda":
            return self._fast(*inputs)
        return self._fast(*(_OwnGradient.apply(x) if x.requires_grad else x for x in inputs)).clone()

    def __reduce__(self) -> tuple[type, tuple[Callable[..., Tensor]]]:
        """Copied and pickled without what was compiled, which is not to be had by others."""
        return Compiled, (self.function,)
