"""Optimizers that replace another in a configuration."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

try:  # not public: where a version differs, optimizers keep what it hands over
    from jsonargparse import _typehints

    _KNOWN = [*inspect.signature(_typehints.discard_init_args_on_class_path_change).parameters][1:] == [
        "prev_val",
        "value",
    ]
except (ImportError, AttributeError):
    _KNOWN = False


def _defaults(class_path: str) -> dict[str, Any]:
    """Default of each option of an optimizer; empty for another class."""
    kind = pkgutil.resolve_name(class_path)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        return {}
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


@contextlib.contextmanager
def own_optimizer_defaults() -> Iterator[None]:
    """While a configuration is read, an optimizer in place of another has its own defaults.

    jsonargparse would hand over all options that both have: ``optimizer: Adam`` would get the weight decay of 0.01 of the
    default, AdamW, and divide it into every step.
    """
    if not _KNOWN:
        yield
        return
    original = _typehints.discard_init_args_on_class_path_change

    def discard(parser: Any, prev_val: Any, value: Any) -> None:
        original(parser, prev_val, value)
        if prev_val and prev_val.get("init_args") and prev_val["class_path"] != value["class_path"]:
            options = prev_val["init_args"]
            for name, default in _defaults(prev_val["class_path"]).items():
                kept = options.get(name)
                if (tuple(kept) if isinstance(kept, list) else kept) == default:
                    options.pop(name, None)

    with unittest.mock.patch.object(_typehints, "discard_init_args_on_class_path_change", discard):
        yield
