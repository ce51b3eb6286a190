"""Activations without kinks (arXiv 2310.11311, section 4.2): Softplus(β)(x) = log(1 + exp(βx))/β in the place of each ReLU.

Piecewise linear activations are sums of ReLUs, and each of those is replaced: β → ∞ is the original. To add one, write it here
under its class name in ``SMOOTHED``.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _relu(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    return F.softplus(x, beta)


def _leaky_relu(x: Tensor, beta: float, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return negative_slope * x + (1 - negative_slope) * F.softplus(x, beta)


def _hardtanh(x: Tensor, beta: float, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return min_val + F.softplus(x - min_val, beta) - F.softplus(x - max_val, beta)


def _relu6(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    return _hardtanh(x, beta, 0.0, 6.0)


def _hardsigmoid(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    return _relu6(x + 3, beta) / 6


def _hardswish(x: Tensor, beta: float, inplace: bool = False) -> Tensor:
    return x * _hardsigmoid(x, beta)


class _Activation(NamedTuple):
    """How one activation is smoothed: ``functions`` are called instead of the module, ``options`` its attributes."""

    smooth: Callable[..., Tensor]
    functions: Collection[Callable[..., Tensor]]
    options: tuple[str, ...] = ()


SMOOTHED = {
    "ReLU": _Activation(_relu, (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)),
    "ReLU6": _Activation(_relu6, (F.relu6,)),
    "LeakyReLU": _Activation(_leaky_relu, (F.leaky_relu, F.leaky_relu_), ("negative_slope",)),
    "Hardtanh": _Activation(_hardtanh, (F.hardtanh, F.hardtanh_), ("min_val", "max_val")),
    "Hardsigmoid": _Activation(_hardsigmoid, (F.hardsigmoid,)),
    "Hardswish": _Activation(_hardswish, (F.hardswish,)),
}


class SmoothActivation(nn.Module):
    """An activation of ``SMOOTHED`` at β, with the options of the module that it replaces."""

    def __init__(self, name: str, beta: float, **options: float):
        super().__init__()
        self.name, self.beta, self.options = name, beta, options

    def forward(self, x: Tensor) -> Tensor:
        return SMOOTHED[self.name].smooth(x, self.beta, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([self.name, f"beta={self.beta:g}", *(f"{k}={v:g}" for k, v in self.options.items())])


class _SmoothFunctions(TorchFunctionMode):
    """Smooths activations that are called as functions."""

    def __init__(self, names: Sequence[str], beta: float):
        super().__init__()
        self.beta, self.smooth = beta, {f: SMOOTHED[name].smooth for name in names for f in SMOOTHED[name].functions}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in self.smooth:
            return func(*args, **kwargs)
        x, *options = args or (kwargs.pop("input"),)
        return self.smooth[func](x, self.beta, *options, **kwargs)


class Resmoothed(TorchFunctionMode):
    """Inside it, a network smoothed at one β computes as at another; None is what it did before: its Softplus(β) are ReLUs."""

    def __init__(self, beta: float, other: float | None):
        super().__init__()
        self.beta, self.other = beta, other

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.softplus and self.beta in (*args[1:], *(kwargs or {}).values()):
            return F.relu(args[0]) if self.other is None else F.softplus(args[0], self.other)
        return func(*args, **(kwargs or {}))


def _calls(module: nn.Module, name: str) -> bool:
    """Whether the module's own code names an activation's function that is not one of its submodules."""
    codes = [f.__code__ for f in vars(type(module)).values() if hasattr(f, "__code__")]
    called = {called for code in codes for called in code.co_names}
    functions = {function.__name__ for function in SMOOTHED[name].functions}
    return any(function in called and not hasattr(module, function) for function in functions)


def _activations_of(model: nn.Module) -> list[str]:
    """Class names of the activations that a model has."""
    kinds = {type(module) for module in model.modules()} - {nn.MultiheadAttention}
    modules = {kind.__name__ for kind in kinds if kind.__module__.rpartition(".")[2].startswith("activation")}
    return sorted(modules | {name for name in SMOOTHED if any(_calls(module, name) for module in model.modules())})


def smooth_activations(model: nn.Module, beta: float, activations: Sequence[str] = ("ReLU",)) -> nn.Module:
    """Smooth a model's activations in place; returns the model.

    Modules are replaced, and functions that the model's code calls (torchvision's DenseNet, GoogLeNet, Inception) intercepted.

    Args:
        model: a classifier.
        beta: β > 0; 3 (DDPM) and 5 (EDM) in the paper.
        activations: names of ``SMOOTHED``.
    """
    if not beta > 0:
        raise ValueError(f"softplus_beta must be above 0 (null keeps the activations), got {beta}")
    found = _activations_of(model)
    of_model = f"{type(model).__name__} has {', '.join(found) or 'no activations as modules'}"
    for name in activations:
        if name not in SMOOTHED:
            raise ValueError(
                f"activations: {name!r} cannot be smoothed; known: {', '.join(SMOOTHED)}. GELU, SiLU "
                f"and the like are smooth already: leave them out. {of_model}"
            )
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (kind := type(child).__name__) in activations and type(child) is getattr(nn, kind):
                options = {option: getattr(child, option) for option in SMOOTHED[kind].options}
                setattr(module, name, SmoothActivation(kind, beta, **options))
                replaced += 1
    called = [name for name in activations if any(_calls(module, name) for module in model.modules())]
    if called:
        plain_forward = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _SmoothFunctions(called, beta):
                return plain_forward(*args, **kwargs)

        model.forward = forward
    if not replaced and not called:
        raise ValueError(
            f"softplus_beta is set, but {of_model}, and activations: {list(activations)} names none of them; name those of "
            f"{', '.join(SMOOTHED)} that it has, or set softplus_beta to null"
        )
    return model
