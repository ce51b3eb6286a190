"""Docstrings as Markdown: roles of Sphinx become references, literal blocks become code."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([^`]+)`")
_LITERAL = re.compile(r"::\n(?=\n(?: {4}|\t))")
_BLOCK = re.compile(r"^::\n(?=\n {4})", re.MULTILINE)  # without a sentence before it
_SEVERAL = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {5,}\S.*)*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}\S.*)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring without reStructuredText: ``:class:`~a.b.C` `` to `` `C` ``, ``::`` before an indented block to ``:``.

    ``a, b: text`` below *Args* or *Attributes* becomes an entry for each name.
    """

    def name(match: re.Match[str]) -> str:
        return f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`"

    def each(match: re.Match[str]) -> str:
        return "\n".join(f"{match[1]}{one}: {match[3]}" for one in match[2].split(", "))

    return _SEVERAL.sub(each, _LITERAL.sub(":\n", _BLOCK.sub("", _ROLE.sub(name, text))).replace("``", "`"))


def arguments(text: str) -> dict[str, str]:
    """What a cleaned docstring says of each argument, as Markdown."""
    section = as_markdown(text).partition("\nArgs:\n")[2]
    return dict(_ARGUMENT.findall(re.split(r"\n(?=\S)", section)[0]))


class Docstrings(griffe.Extension):
    """Converts every docstring that the API reference shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
