"""Docstrings as a terminal shows them."""

import contextlib
import re
import unittest.mock
from collections.abc import Iterator
from typing import Any

import jsonargparse

# Of reStructuredText, and what a terminal shows instead.
_MARKS = (
    (r":\w+:`(?:[^`<]*<)?~[\w.]*?(\w+)>?`", r"\1"),  # :class:`~package.module.Name`
    (r":\w+:`([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1"),
    (r"`([^`<]+?)\s*<([^`>]+)>`__?", r"\1 (\2)"),
    (r"``(.+?)``", r"\1"),
    (r"::(?=\s|$)", ":"),
)


def plain(text: str | None) -> str | None:
    """A docstring's text as a terminal shows it."""
    for pattern, replacement in _MARKS if text else ():
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


@contextlib.contextmanager
def plain_docstrings() -> Iterator[None]:
    """Lets jsonargparse take plain texts from docstrings, for ``--help`` and for comments of ``--print_config``."""
    original = jsonargparse._optionals.parse_docstring

    def parse(*args: Any, **kwargs: Any) -> Any:
        docstring = original(*args, **kwargs)
        if docstring is not None:
            docstring.short_description = plain(docstring.short_description)
            for each in docstring.params:
                each.description = plain(each.description)
        return docstring

    with unittest.mock.patch("jsonargparse._optionals.parse_docstring", parse):
        yield
