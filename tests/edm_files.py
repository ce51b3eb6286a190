"""Pickles in EDM's real format: the protocol by which its classes store their source code, without EDM."""

import pickle
import sys
import types
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

SOURCE = "raise SystemExit('the source code in the pickle ran')\n"


@contextmanager
def edm_modules():
    """EDM's modules, as far as its pickles name them, for as long as one is written."""

    class EasyDict(dict):
        pass

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("only named, never called")

    names = {"dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}, "torch_utils": {}}
    names["torch_utils.persistence"] = {"_reconstruct_persistent_obj": _reconstruct_persistent_obj}
    for name, members in names.items():
        sys.modules[name] = types.ModuleType(name)
        for member, value in members.items():
            value.__module__, value.__qualname__ = name, member
            setattr(sys.modules[name], member, value)
    try:
        yield EasyDict, _reconstruct_persistent_obj
    finally:
        for name in names:
            del sys.modules[name]


class _Persistent(nn.Module):
    """Reduced as EDM's persistent classes are."""

    class_name: str

    def __reduce__(self):
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name}
        return rebuild, (meta | {"state": object.__reduce__(self)[2]},), None


def edm_bytes(state, protocol=4, init_kwargs=None, **extra):
    """A pickle of ``{"ema": network, …}`` whose network has the tensors of ``state``, nested by the dots in their names.

    Modules without tensors of their own are torch's ModuleDict, the others persistent, as in EDM; names that end in
    ``resample_filter`` are buffers.
    """
    with edm_modules() as (easy_dict, _):
        tree = {}
        for name, value in state.items():
            *path, leaf = name.split(".")
            node = tree
            for word in path:
                node = node.setdefault(word, {})
            node[leaf] = value

        def build(node, name):
            own = {key: value for key, value in node.items() if isinstance(value, torch.Tensor)}
            inner = {key: build(value, key) for key, value in node.items() if key not in own}
            if name in ("enc", "dec"):
                return nn.ModuleDict(inner)
            module = _Persistent()
            module.class_name = {"": "EDMPrecond", "model": "DhariwalUNet"}.get(name, "Conv2d")
            for key, value in own.items():
                if key == "resample_filter":
                    module.register_buffer(key, value)
                else:
                    module.register_parameter(key, nn.Parameter(value))
            module.register_buffer("scratch", torch.ones(1), persistent=False)
            module.bias_that_is_not = None
            module.skip_scale = np.sqrt(0.5)
            for key, value in inner.items():
                module.add_module(key, value)
            return module

        network = build(tree, "")
        network._init_args, network._init_kwargs = (), easy_dict(init_kwargs or {})
        network.sigma_max, network.dtype = float("inf"), torch.float16
        return pickle.dumps({"ema": network, **extra}, protocol=protocol)
