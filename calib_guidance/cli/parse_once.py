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

try:
    from jsonargparse import _core, _subcommands

    _FINDS = [*inspect.signature(_core.find_action_and_subcommand).parameters] == ["parser", "dest", "exclude"]
    _FINDS = _FINDS and _core.find_action_and_subcommand is _subcommands.find_action_and_subcommand
except (ImportError, AttributeError):
    _FINDS = False

try:
    from jsonargparse import _namespace

    _PLAIN_NAMES = Namespace(a=Namespace(b=1))._parse_key("b")[0::2] == ("b", "") and all(
        [*inspect.signature(function).parameters] == names
        for function, names in (
            (Namespace._parse_key, ["self", "key"]),
            (_namespace.recreate_branches, ["data", "skip_keys"]),
            (_namespace.add_clash_mark, ["key"]),
        )
    )
except (ImportError, AttributeError, TypeError):
    _PLAIN_NAMES = False

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
    if not _KNOWN or hasattr(_typehints.adapt_class_type, "known"):
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

    vars(adapt)["known"] = known
    with plain_names_found_directly(), unittest.mock.patch.object(_typehints, "adapt_class_type", adapt):
        yield


@contextlib.contextmanager
def options_found_once() -> Iterator[None]:
    """While a configuration is read, each parser remembers where its options are; jsonargparse looks at all for each name."""
    if not _FINDS:
        yield
        return
    original = _core.find_action_and_subcommand

    def find(parser: Any, dest: str, exclude: Any = None) -> Any:
        count, found = vars(parser).get("_found", (0, None))
        if count != len(parser._actions):
            vars(parser)["_found"] = len(parser._actions), (found := {})
        if (dest, exclude) not in found:
            found[dest, exclude] = original(parser, dest, exclude)
        return found[dest, exclude]

    with contextlib.ExitStack() as patches:
        for module in (_core, _subcommands):
            patches.enter_context(unittest.mock.patch.object(module, "find_action_and_subcommand", find))
        yield


@contextlib.contextmanager
def plain_names_found_directly() -> Iterator[None]:
    """Options without a dot in their name are looked up, and copied, at once: a fifth of the time that a configuration takes."""
    if not _PLAIN_NAMES or hasattr(Namespace._parse_key, "by_path"):
        yield
        return
    by_path, mark, copied = Namespace._parse_key, _namespace.add_clash_mark, _namespace.recreate_branches

    def parse(self: Namespace, key: str) -> tuple[str, Namespace | None, str]:
        return (mark(key), self, "") if type(key) is str and key.isidentifier() else by_path(self, key)

    vars(parse)["by_path"] = by_path

    def recreate(data: Any, skip_keys: Any = None) -> Any:
        if type(data) is Namespace and not skip_keys:
            copy = Namespace()
            vars(copy).update({name: recreate(value) for name, value in vars(data).items()})
            return copy
        return data if type(data) in _PLAIN else copied(data, skip_keys)

    with (
        unittest.mock.patch.object(Namespace, "_parse_key", parse),
        unittest.mock.patch.object(_namespace, "recreate_branches", recreate),
    ):
        yield
