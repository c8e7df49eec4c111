"""The Jinja environment that chat templates are written for, without what could harm.

As in transformers: trimmed blocks, `break` and `continue`, `tojson` without HTML escapes, `raise_exception`, `{% generation %}`.
Unlike there, the same conversation always renders to the same text: `strftime_now` stays undefined (templates that offer today's
date fall back to a fixed one), and so do the `random` filter and `lipsum`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.debug  # Jinja imports this when a template fails; by then no file can be opened
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's span for others; the text inside is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class PublicNamespace(Namespace):
    """Jinja reads attributes such as `__html__` of any object; a template may not forge them."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja: `self` is a name that templates may use
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class Environment(ImmutableSandboxedEnvironment):
    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = PublicNamespace
        del self.filters["random"], self.globals["lipsum"]

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Stop a template that reaches for what it must not have; Jinja's way is to write nothing in its place."""
        raise jinja2.exceptions.SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
