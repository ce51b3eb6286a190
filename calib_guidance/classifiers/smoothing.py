"""Softplus smoothing of a classifier's activations (arXiv 2310.11311, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FUNCTIONAL_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class _SoftplusForReLU(TorchFunctionMode):
    """Computes Softplus wherever a ReLU is called as a function."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _FUNCTIONAL_RELUS:
            return F.softplus((args or tuple(kwargs.values()))[0], self.beta)
        return func(*args, **(kwargs or {}))


def _calls_functional_relu(module: nn.Module) -> bool:
    """Whether the module's own code names a ReLU that is not one of its submodules."""
    codes = [f.__code__ for f in vars(type(module)).values() if hasattr(f, "__code__")]
    names = {name for code in codes for name in code.co_names}
    return any(name in names and not hasattr(module, name) for name in ("relu", "relu_"))


def smooth_activations(model: nn.Module, beta: float, activations: Sequence[str] = ("ReLU",)) -> nn.Module:
    """Replace activations by Softplus(β)(x) = log(1 + exp(βx))/β, in place; returns the model.

    ReLU modules are replaced, and ReLUs that a model calls as functions (torchvision's DenseNet, GoogLeNet, Inception)
    are intercepted. β → ∞ is ReLU again; the paper uses 3 (DDPM) and 5 (EDM). ``activations`` are class names of ``torch.nn``.
    """
    if not beta > 0:
        raise ValueError(f"softplus_beta must be above 0 (null keeps the activations), got {beta}")
    kinds = tuple(getattr(nn, name, None) for name in activations)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        raise ValueError(f"activations: expected class names of torch.nn such as ReLU or GELU, got {list(activations)}")
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds:
                setattr(module, name, nn.Softplus(beta))
                replaced += 1
    if nn.ReLU in kinds and any(_calls_functional_relu(module) for module in model.modules()):
        plain_forward = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _SoftplusForReLU(beta):
                return plain_forward(*args, **kwargs)

        model.forward = forward
        replaced += 1
    if not replaced:
        raise ValueError(
            f"softplus_beta is set, but {type(model).__name__} has none of the activations {list(activations)}; name "
            "those that it has, or set softplus_beta to null"
        )
    return model
