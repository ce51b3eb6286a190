"""FLOPs and memory, counted while code runs, on the meta device, too; and the memory that is free."""

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


def _free_in_container(folder: str | os.PathLike[str] = "/sys/fs/cgroup") -> float:
    """Bytes that this process's container may still allocate; infinite where it has no limit."""
    try:
        limit, used = (int(Path(folder, name).read_text()) for name in ("memory.max", "memory.current"))
        lines = Path(folder, "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return math.inf
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(limit - used + cached, 0)


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)
    return min(free, _free_in_container())


class FlopCounter(FlopCounterMode):
    """torch's FLOP counter without its count by module, whose hooks break ``autograd.grad`` of a module's input.

    A multiplication with its addition is two operations.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = contextlib.nullcontext()
        self.mod_tracker.parents = {"Global"}


class PeakMemory(TorchDispatchMode):
    """Bytes in tensors that are alive at once, ``peak`` the most so far.

    Counted are those that are made while it is on: neither weights and their views, nor memory inside kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not tensor.is_mkldnn:
                self._known.setdefault(tensor.untyped_storage(), None)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.is_mkldnn:  # packed weights show no storage
                continue
            if (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result


class KnownShapes(TorchDispatchMode):
    """Remembers the shapes that operators gave on the meta device: PyTorch finds most of them in Python, again at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Hashable, tuple[bool, list[Callable[[], Tensor]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        try:
            key = func, _key(args), _key(kwargs)
            known = self._known.get(key)
        except TypeError:
            return func(*args, **kwargs)
        if known is not None:
            several, made = known
            return tuple(make() for make in made) if several else made[0]() if made else args[0]
        result = func(*args, **kwargs)
        if args and result is args[0] and isinstance(result, Tensor) and _key(args) == key[1]:
            self._known[key] = False, []  # written in place, of the same shape
            return result
        results = result if isinstance(result, tuple) else (result,)
        schema = func._schema
        if any(argument.alias_info for argument in (*schema.arguments, *schema.returns)) or not schema.returns:
            return result  # views, and what writes to others
        if all(type(t) is Tensor and t.is_meta and not t.storage_offset() for t in results):
            made = [partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device="meta") for t in results]
            self._known[key] = isinstance(result, tuple), made
        return result


def _key(value: Any) -> Hashable:
    """What an operator's argument is told apart by; TypeError for tensors of other devices."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_meta:
            raise TypeError(type(value))
        return value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return type(value), *map(_key, value)
    hash(value)
    return type(value), value
