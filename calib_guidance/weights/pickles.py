"""The pickles of EDM and EDM2 (Karras et al. 2022, 2024), read without executing anything in them.

Such a file is a pickle of ``{"ema": network, …}`` whose classes bring their own source code, which unpickling would run. Every
object of such a class is stored as a call of ``_reconstruct_persistent_obj`` with one dictionary: source code, name of the
class and attributes. Here that call makes an inert :class:`_Record` of name and attributes, and the source code stays text.
"""

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_MOST_MODULES = 100_000
_CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")


class _Record:
    """An object of the pickle: the attributes that it was stored with."""


class _Dict(dict):
    """A dictionary that may have attributes, as EDM's EasyDict has."""


class _NumpyArray(_Record):
    """An array beside the network, as EDM2's encoder has: not kept."""

    def __setstate__(self, state: tuple) -> None:
        """Shape, type and numbers."""


class _KeptArray(_Record):
    """An array of numbers, kept."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, columns_first, data = state
        self.array = _array(data, kind, shape, "F" if columns_first else "C")


class _NumpyType(_Record):
    """Type of a numpy scalar: a number type, little-endian."""

    def __init__(self, name: str, *_: object):
        if name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise pickle.UnpicklingError(f"a numpy value of it has the type {name}")
        self.name = f"<{name}"

    def __setstate__(self, state: tuple) -> None:
        """Byte order and the like, which the name already says."""


class _Restricted(pickle.Unpickler):
    """Makes tensors, plain containers and inert records, and refuses every other name.

    What :meth:`find_class` gives is either immutable (built-in types, bound methods) or made for this one file, so that a pickle
    that sets attributes on what it finds changes nothing outside.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.nn.modules.container" and name in _CONTAINERS:
            return type(name, (_Record,), {})
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        known: dict[tuple[str, str], Callable[[], Any]] = {
            ("collections", "OrderedDict"): lambda: OrderedDict,
            ("builtins", "set"): lambda: set,
            ("__builtin__", "set"): lambda: set,  # protocol 2
            ("dnnlib.util", "EasyDict"): lambda: type("EasyDict", (_Dict,), {}),
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda: self._persistent,
            ("torch._utils", "_rebuild_tensor_v2"): lambda: self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda: lambda data, *_: data,
            ("torch.storage", "_load_from_bytes"): lambda: self._storage,
            ("numpy", "dtype"): lambda: type("dtype", (_NumpyType,), {}),
            ("numpy.core.multiarray", "_reconstruct"): lambda: lambda *_: _NumpyArray(),
            ("numpy._core.multiarray", "_reconstruct"): lambda: lambda *_: _NumpyArray(),
            ("numpy", "ndarray"): lambda: type("ndarray", (_NumpyArray,), {}),
            ("numpy.core.multiarray", "scalar"): lambda: self._numpy_scalar,
            ("numpy._core.multiarray", "scalar"): lambda: self._numpy_scalar,
            ("_codecs", "encode"): lambda: _encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no network needs")
        return known[module, name]()

    def _persistent(self, meta: Mapping[str, Any]) -> _Record:
        if meta.get("type") != "class" or not isinstance(meta.get("state"), Mapping):
            raise pickle.UnpicklingError("a persistent object of it is not a class with its attributes")
        record = type(str(meta["class_name"]), (_Record,), {})()
        vars(record).update(meta["state"])
        return record

    def _storage(self, blob: bytes) -> torch.storage.TypedStorage:
        storage = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        if not isinstance(storage, torch.storage.TypedStorage):
            raise pickle.UnpicklingError(f"a storage of it is a {type(storage).__name__}")
        return storage

    def _tensor(
        self, storage: torch.storage.TypedStorage, offset: int, size: tuple, stride: tuple, *_: object
    ) -> Tensor:
        # as_strided refuses what lies outside of the storage.
        return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage).as_strided(size, stride, offset)

    def _numpy_scalar(self, kind: _NumpyType, data: bytes) -> object:
        return np.frombuffer(data, dtype=kind.name, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text of it is encoded as {encoding}")
    return codecs.latin_1_encode(text)[0]


def _array(data: object, kind: object, shape: tuple, order: str) -> np.ndarray:
    """Numbers in the layout of numpy's pickles."""
    if not isinstance(kind, _NumpyType) or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array of it does not hold numbers")
    return np.frombuffer(data, kind.name).reshape(shape, order=order)


class _Statistics(pickle.Unpickler):
    """Makes numbers, arrays of numbers and plain containers, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        core = module.replace("numpy._core", "numpy.core")
        known: dict[tuple[str, str], Callable[[], Any]] = {
            ("numpy", "dtype"): lambda: type("dtype", (_NumpyType,), {}),
            ("numpy", "ndarray"): lambda: type("ndarray", (_KeptArray,), {}),
            ("numpy.core.multiarray", "_reconstruct"): lambda: lambda *_: _KeptArray(),
            ("numpy.core.numeric", "_frombuffer"): lambda: _array,  # protocol 5
            ("_codecs", "encode"): lambda: _encode,  # protocol 2
        }
        if (core, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no statistics need")
        return known[core, name]()


def read_edm2_statistics(file: BinaryIO) -> dict[str, dict[str, np.ndarray]]:
    """``mu`` and ``sigma`` by metric (``fid``, ``fd_dinov2``) of EDM2's reference pickles, and ``num_images`` beside them."""
    content = _Statistics(file).load()
    if not isinstance(content, dict) or not {"fid", "fd_dinov2"} & content.keys():
        raise pickle.UnpicklingError("expected a pickle of EDM2's statistics, with fid or fd_dinov2")
    found: dict[str, dict[str, np.ndarray]] = {}
    for metric in {"fid", "fd_dinov2"} & content.keys():
        moments = content[metric]
        if not isinstance(moments, dict):
            raise pickle.UnpicklingError(f"{metric} of it is a {type(moments).__name__} where mu and sigma belong")
        arrays = {name: getattr(value, "array", value) for name, value in moments.items()}
        found[metric] = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
    if isinstance(count := content.get("num_images"), int):
        found["num_images"] = {"num_images": np.array(count)}
    return found


def _tensors(record: object, prefix: str, visits: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module and the modules within, as many as there are ``visits``."""
    if next(visits, None) is None:  # modules that hold modules twice, or themselves, never end
        raise pickle.UnpicklingError(f"its network has more than {_MOST_MODULES:,} modules")
    parts = vars(record)
    passing = parts.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in parts[kind].items():
            if value is not None and name not in passing:
                if not isinstance(value, Tensor):
                    raise pickle.UnpicklingError(f"{prefix}{name} is a {type(value).__name__} where a tensor belongs")
                yield prefix + name, value
    for name, module in parts["_modules"].items():
        if module is not None:
            yield from _tensors(module, f"{prefix}{name}.", visits)


def read_edm_pickle(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and arguments of the weight-averaged network (``ema``) of an EDM pickle."""
    content = _Restricted(file).load()
    if not isinstance(content, Mapping) or "ema" not in content:
        found = (
            f"with {', '.join(map(str, content))}" if isinstance(content, Mapping) else f"of {type(content).__name__}"
        )
        raise pickle.UnpicklingError(f"expected a pickle with a network under 'ema', found one {found}")
    network = content["ema"]
    if not isinstance(network, _Record) or "_modules" not in vars(network):
        raise pickle.UnpicklingError(f"expected a network under 'ema', found {type(network).__name__}")
    return dict(_tensors(network, "", iter(range(_MOST_MODULES)))), dict(vars(network).get("_init_kwargs") or {})
