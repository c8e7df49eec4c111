"""What a chat template does to texts that it cannot see: the skeleton of all conversations of one shape.

The template runs with an opaque `Text` in place of every message's content. A Text is no string: Python and Jinja can do nothing
to it that is not written here. It may be written out, joined with strings, stripped, and asked whether it is empty or a string;
everything else (comparing, searching, measuring, iterating, formatting, hashing, passing it to any function of strings) raises
`Looked`. So a render that ends has treated every text of that shape alike, and what it wrote is the skeleton.

Strings that are only known to Jinja's compiled code (output, `~`, captured blocks) come here through the environment's own code
generator; operators and attributes through the sandbox's hooks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from trainers.sandbox import Environment
from trainers.template import Blank, Skeleton, fill

_MOST_PARTS = 10_000

# Any of these texts would show a template that looks at texts after all: the tracer checks itself with them, shape by shape.
_SAMPLES = (" \n a b \u2003", "x", "</think> {{ x }} <|im_end|>[INST]\n", "Zoë's “answer”: {'a': 1}", "0", " ", "none", "system")


class Looked(BaseException):
    """The template looks at a text. No `except Exception` on the way may swallow it."""


def _look(*args: Any, **kwargs: Any) -> Any:
    raise Looked


class Text:
    """A string of literal parts and blanks, at least one blank; every blank stands for a text that is not empty."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[str | Blank]) -> None:
        self._parts = parts

    def __bool__(self) -> bool:
        if any(part if isinstance(part, str) else not part.stripped for part in self._parts):
            return True
        raise Looked  # nothing but stripped texts, which may have been blank

    def __eq__(self, other: object) -> bool:
        if type(other) in (type(None), bool, int, float, list, dict, tuple):
            return False
        if type(other) is str and not other:
            return not self
        raise Looked

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = __str__ = __repr__ = __format__ = __len__ = __length_hint__ = __iter__ = __reversed__ = __contains__ = _look
    __getitem__ = __index__ = __int__ = __float__ = __complex__ = __round__ = __abs__ = __neg__ = __pos__ = __bytes__ = _look
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __sub__ = __rsub__ = _look
    __getattr__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _look


def _strip(text: Text) -> str | Text:
    """`text.strip()`, where that is the same expression for every text."""
    parts = list(text._parts)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while parts and isinstance(part := parts[end], str):
            parts[end] = strip(part)
            if parts[end]:
                break
            parts.pop(end)
    ends = parts[0], parts[-1]  # blanks are never all gone
    if isinstance(ends[0], str) and isinstance(ends[1], str):
        return Text(parts)
    if len(parts) == 1 and isinstance(ends[0], Blank):
        return Text([ends[0]._replace(stripped=True)])
    raise Looked  # where the white space of one text ends another begins, or does not


def _join(values: Iterable[Any]) -> Any:
    """`"".join(map(str, values))`."""
    parts = [part for value in values for part in (value._parts if isinstance(value, Text) else [str(value)])]
    if len(parts) > _MOST_PARTS:
        raise Looked
    merged: list[str | Blank] = []
    for is_blank, run in itertools.groupby(parts, key=lambda part: isinstance(part, Blank)):
        if is_blank:
            merged.extend(run)
        elif literal := "".join(run):  # type: ignore[arg-type]
            merged.append(literal)
    if any(isinstance(part, Blank) for part in merged):
        return Text(merged)
    return "".join(merged)  # type: ignore[arg-type]


class _Code(CodeGenerator):
    """Jinja's code with our `str` and our join, so that a Text may pass through output, `~` and captured blocks."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.written(")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")


class _Tracing(Environment):
    code_generator_class = _Code
    concat = staticmethod(_join)  # type: ignore[assignment]
    intercepted_binops = frozenset(Environment.default_binop_table)

    def __init__(self) -> None:
        super().__init__()
        self.filters |= {"trim": _filter_trim, "string": _filter_string}
        self.tests |= {name: functools.partial(_is, TESTS[name]) for name in ("string", "iterable", "sequence")} | {"sameas": _is_same}

    @staticmethod
    def written(value: Any) -> str | Text:
        return value if isinstance(value, Text) else str(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, Text) or isinstance(right, Text):
            if operator == "+" and type(left) in (str, Text) and type(right) in (str, Text):
                return _join((left, right))
            raise Looked
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Text):
            return _method(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Text):
            return _method(obj, argument)
        if isinstance(argument, Text):
            raise Looked
        return super().getitem(obj, argument)


def _method(text: Text, name: Any) -> Any:
    if isinstance(name, str) and name == "strip":
        return functools.partial(_strip, text)
    raise Looked


def _filter_trim(value: Any, chars: str | None = None) -> Any:
    if isinstance(value, Text) and chars is None:
        return _strip(value)
    return FILTERS["trim"](value, chars)


def _filter_string(value: Any) -> Any:
    return value if isinstance(value, Text) else FILTERS["string"](value)


def _is(test: Any, value: Any) -> bool:
    return isinstance(value, Text) or test(value)


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Text) or isinstance(other, Text):
        raise Looked
    return value is other


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[jinja2.Template, jinja2.Template]:
    return _Tracing().from_string(source), Environment().from_string(source)


def trace(source: str, special: dict[str, str], slots: Sequence[tuple[str, bool]], generation_prompt: bool) -> Skeleton | None:
    """The skeleton of this shape; None if the template looks at a text, leaves one out, or refuses the shape."""
    tracing, real = _compiled(source)

    def variables(contents: Iterable[Any]) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for (role, _), content in zip(slots, contents, strict=True)]
        return {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation_prompt, **special}

    texts = ["" if empty else Text([Blank(index, False)]) for index, (_, empty) in enumerate(slots)]
    try:
        written = _join(tracing.root_render_func(tracing.new_context(variables(texts))))
    except Looked:
        return None
    except MemoryError:
        raise
    except Exception:  # it refuses the shape, or does to a Text what only a str bears
        return None
    skeleton = tuple(written._parts) if isinstance(written, Text) else (written,)
    if {part.message for part in skeleton if isinstance(part, Blank)} != {index for index, (_, empty) in enumerate(slots) if not empty}:
        return None
    for first in range(len(_SAMPLES)):
        contents = ["" if empty else _SAMPLES[(first + index) % len(_SAMPLES)] for index, (_, empty) in enumerate(slots)]
        if real.render(variables(contents)) != fill(skeleton, contents):
            return None
    return skeleton
