"""Reading many configurations that share most of their parts."""

from __future__ import annotations

import contextlib
import inspect
import os
import unittest.mock
from collections.abc import Hashable, Iterator
from typing import Any

from jsonargparse import Namespace

try:  # not public: where a version differs, parts are parsed as often as it does
    from jsonargparse import _typehints
    from jsonargparse._common import lenient_check

    _KNOWN = [*inspect.signature(_typehints.adapt_class_type).parameters][:5] == [
        *("value", "serialize", "instantiate_classes", "sub_add_kwargs", "prev_val")
    ] and hasattr(_typehints, "sub_defaults")
except (ImportError, AttributeError):
    _KNOWN = False

_PLAIN = (str, int, float, bool, type(None))


def _key(node: object) -> Hashable:
    """What a value is told apart by; TypeError where it may not be copied."""
    if type(node) in _PLAIN or (isinstance(node, str) and not vars(node)):
        return type(node), node
    if isinstance(node, Namespace | dict):
        items = vars(node) if isinstance(node, Namespace) else node
        return type(node), *((name, _key(value)) for name, value in items.items())
    if type(node) in (list, tuple):
        return type(node), *map(_key, node)
    raise TypeError(type(node))


def _copy(node: Any) -> Any:
    if isinstance(node, Namespace):
        copy = type(node)()
        vars(copy).update({name: _copy(value) for name, value in vars(node).items()})
        return copy
    if isinstance(node, dict):
        return type(node)((name, _copy(value)) for name, value in node.items())
    return type(node)(map(_copy, node)) if type(node) in (list, tuple) else node


@contextlib.contextmanager
def parts_parsed_once() -> Iterator[None]:
    """While configurations are read, remembers what became of each class with its arguments.

    jsonargparse parses a part again at every level around it, and for each of the settings of an experiment, which mostly differ
    in one option.
    """
    if not _KNOWN:
        yield
        return
    original, known = _typehints.adapt_class_type, {}

    def adapt(
        value: Any, serialize: bool, instantiate: bool, options: dict[str, Any], prev_val: Any = None, **more: Any
    ) -> Any:
        def parsed() -> Any:
            return original(value, serialize, instantiate, options, prev_val=prev_val, **more)

        if serialize or instantiate or options.get("linked_targets"):
            return parsed()
        try:
            mode = lenient_check.get(), _typehints.sub_defaults.get(), os.getcwd()
            key = _key(value), _key(prev_val), repr(options), repr(more), mode
        except TypeError:
            return parsed()
        if key not in known:
            result = parsed()
            known[key] = _copy(result), _copy(prev_val)
            return result
        result, after = known[key]
        if isinstance(prev_val, Namespace):  # what does not go with another class was taken from it
            vars(prev_val).clear()
            vars(prev_val).update(vars(_copy(after)))
        return _copy(result)

    with unittest.mock.patch.object(_typehints, "adapt_class_type", adapt):
        yield
