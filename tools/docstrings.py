"""An extension of Griffe for the site: docstrings as help() prints them, in Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

_PROMPT = re.compile(r"((?:^[ \t]*(?:>>>|\.\.\.)[^\n]*\n?)+(?:^[ \t]*(?!>>>|\.\.\.)\S[^\n]*\n?)*)", re.MULTILINE)
_SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+)(?P<text>: (?:.|\n(?P=indent) )*)", re.MULTILINE
)


def as_markdown(text: str) -> str:
    """Make a code block of every prompt, and an entry for each of several arguments that share a line."""
    return _SHARED.sub(_one_each, _PROMPT.sub(_fenced, text))


def _fenced(found: re.Match[str]) -> str:
    indent = found[1][: len(found[1]) - len(found[1].lstrip())]
    return f"{indent}```pycon\n{found[1].rstrip()}\n{indent}```\n"


def _one_each(found: re.Match[str]) -> str:
    return "\n".join(f"{found['indent']}{name}{found['text']}" for name in found["names"].split(", "))


class Docstrings(griffe.Extension):
    """Replace docstrings that a decorator makes at import, then write all as Markdown."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.decorators and not cls.has_labels("dataclass"):
            module = importlib.import_module(cls.module.path)
            text = inspect.getdoc(getattr(module, cls.name))
            if text and (cls.docstring is None or cls.docstring.value != text):
                cls.docstring = griffe.Docstring(text, parent=cls, lineno=cls.lineno)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
