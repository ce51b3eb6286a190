"""Packages that Lightning imports and few runs use, imported at first use: most of the seconds before a command starts.

Lightning imports torchmetrics for two base classes, which brings a hundred metrics, SciPy, torchvision and Matplotlib; and
torch's compiler (torch._dynamo, SymPy) to recognize compiled modules.
"""

import contextlib
import functools
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import FunctionType, ModuleType
from typing import Any

_lock = threading.RLock()


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Imports without garbage collection, a fifth of their time: it looks at a million objects again and again, all in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Deferred(ModuleType):
    """A module whose code runs once anything but its ``parts`` is asked for, also a submodule."""

    parts: Mapping[str, Callable[[], Any]]
    busy = held = False

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if type(self) is not _Deferred:  # another thread has run it meanwhile
                return getattr(self, name)
            if name in self.parts:
                return self.parts[name]()
            if self.busy or _Deferred.held or (name.startswith("__") and name != "__all__"):
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            self.run()
            return getattr(self, name)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While its submodules may be imported."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def run(self) -> None:
        with self.open(), collecting_later():
            self.__spec__.loader.exec_module(self)
            self.__class__ = ModuleType


class _Submodules(Loader):
    """Finds submodules of deferred modules: their package's code runs first, which may import them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if type(package) is not _Deferred or package.busy:
            return None
        package.run()
        return ModuleSpec(name, self) if name in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """While modules are only looked at: what is deferred stays so, and lacks what it would have."""
    _Deferred.held = True
    try:
        yield
    finally:
        _Deferred.held = False


def is_imported(name: str) -> bool:
    """Whether a module's code has run."""
    return name in sys.modules and type(sys.modules[name]) is not _Deferred


def _loaded(module: str, name: str) -> Any:
    """What a module has, if its code has run; else None."""
    return vars(sys.modules[module]).get(name)


class _Compiled(type):
    def __instancecheck__(cls, instance: object) -> bool:
        real = _loaded("torch._dynamo", "OptimizedModule")  # there are no instances before it is imported
        return real is not None and isinstance(instance, real)


class _OptimizedModule(metaclass=_Compiled):
    """In place of ``torch._dynamo.OptimizedModule`` in ``isinstance``."""


def _disable(fn: Any, recursive: bool = True, **options: Any) -> Any:
    """In place of ``torch._dynamo.disable``: nothing is compiled before torch._dynamo is imported."""
    if type(fn) is not FunctionType:
        sys.modules["torch._dynamo"].run()
        return _loaded("torch._dynamo", "disable")(fn, recursive, **options)

    @functools.cache
    def disabled() -> Callable[..., Any]:
        return _loaded("torch._dynamo", "disable")(fn, recursive, **options)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled() if _loaded("torch._dynamo", "disable") else fn)(*args, **kwargs)

    return call


class _TraceRules:
    """In place of ``torch._dynamo.trace_rules``, whose cache ``init_process_group`` empties: there is none before the import."""

    def clear_lru_cache(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        sys.modules["torch._dynamo"].run()
        return getattr(_loaded("torch._dynamo", "trace_rules"), name)


def _trace_rules() -> _TraceRules:
    if sys.modules["torch._dynamo"].busy:
        raise AttributeError("trace_rules is imported first")
    return _TraceRules()


def _graph_break(msg: str = "") -> None:
    """In place of ``torch._dynamo.graph_break``, which every step of an optimizer calls: nothing is compiled."""


def _of_torchmetrics(module: str, name: str) -> Any:
    package = sys.modules["torchmetrics"]
    with contextlib.nullcontext() if package.busy else package.open():
        if module != "__about__":
            import_module("torchmetrics.utilities")  # first, as in its __init__: they import each other
        return getattr(import_module(f"torchmetrics.{module}"), name)


def _plot(*args: Any, **kwargs: Any) -> Any:
    """In place of ``torchmetrics.utilities.plot.plot_single_or_multi_val``, which the base class imports."""
    module = sys.modules["torchmetrics.utilities.plot"]
    if type(module) is _Deferred:
        module.run()
    return module.plot_single_or_multi_val(*args, **kwargs)


_PARTS: dict[str, dict[str, Callable[[], Any]]] = {
    "torchmetrics": {
        "Metric": lambda: _of_torchmetrics("metric", "Metric"),
        "MetricCollection": lambda: _of_torchmetrics("collections", "MetricCollection"),
        "__version__": lambda: _of_torchmetrics("__about__", "__version__"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
    },
    "torchmetrics.utilities.plot": {
        "_AX_TYPE": lambda: Any,  # of annotations
        "_PLOT_OUT_TYPE": lambda: Any,
        "plot_single_or_multi_val": lambda: _plot,
    },
    "torch._dynamo": {
        "OptimizedModule": lambda: _OptimizedModule,
        "disable": lambda: _disable,
        "graph_break": lambda: _graph_break,
        "trace_rules": _trace_rules,
    },
}


def defer_imports() -> None:
    """Defer these modules. Without effect on those that are imported already."""
    import torch  # which torch._dynamo becomes an attribute of

    if not any(isinstance(finder, _Submodules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Submodules())
    for name, parts in _PARTS.items():
        root, *below = name.split(".")
        package = find_spec(root)
        if name in sys.modules or package is None:
            continue
        spec = package
        if below:  # without importing the packages between
            path = os.path.join(os.path.dirname(package.origin), *below[:-1])
            spec = PathFinder.find_spec(name, [path])
        module = module_from_spec(spec)
        module.__class__, module.parts = _Deferred, parts
        sys.modules[name] = module
    torch._dynamo = sys.modules["torch._dynamo"]
