"""Jinja as chat templates need it, with an end to loops and sizes.

A template comes with a checkpoint and may have been written by anybody, and its loops run over what a client sends. No
signal can stop a thread, so the environment counts: every turn of a loop, every call and every filter spends from a
budget, and whatever makes text or lists longer is measured before it is made.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_STEPS = 2_000_000
"""Turns of loops, calls and filters in one rendering; a chat of 10,000 messages takes some 200,000."""
MOST_SECONDS = 5.0
MOST_CHARACTERS = 16 * 2**20
"""Of the prompt and of each text on the way."""
MOST_ITEMS = 1_000_000
"""Of a list that a template makes."""
WIDEST = 10_000
"""Columns that a template may pad or indent to."""
MOST_BITS = 4_096
"""Of an integer that a template computes."""


class LimitPassed(jinja2.TemplateError):
    """The template went on for too long or made too much."""


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = MOST_STEPS
        self.deadline = time.monotonic() + MOST_SECONDS

    def spend(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise LimitPassed(f"it takes more than {MOST_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise LimitPassed(f"it takes longer than {MOST_SECONDS:g} s")


class _Counted:
    """An iterable whose items are counted as they are taken."""

    def __init__(self, items: Iterable[Any], budget: _Budget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.spend()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type] # TypeError is what Jinja expects of those without


class _Count(NodeTransformer):
    """Sends what loops run over, and what ``~`` joins, through the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)  # type: ignore[assignment]
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "concatenated", [], [], None, None, lineno=node.lineno)


class _GenerationBlock(Extension):
    """``{% generation %}`` marks what the assistant said for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Environment(ImmutableSandboxedEnvironment):
    """Renders as Transformers' environment does; ``LimitPassed`` where a template does not come to an end."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self._running = threading.local()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._measured(name, made) for name, made in self.filters.items()}
        self.filters["counted"] = jinja2.pass_context(lambda context, items: _Counted(items, self._budget))
        self.filters["concatenated"] = jinja2.pass_context(
            lambda context, parts: self.concat(map(str, parts))
        )
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """The text of a template of this environment, within a budget of its own."""
        self._running.budget = _Budget()
        try:
            return template.render(variables)
        finally:
            del self._running.budget

    @property
    def _budget(self) -> _Budget:
        return getattr(self._running, "budget", None) or _Budget()  # none while constants are folded

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Count().visit(source), name, filename, defer_init)

    def concat(self, parts: Iterable[str]) -> str:
        """What Jinja joins its pieces with, for the whole text and for every part that becomes a value."""
        taken, length = [], 0
        for part in parts:
            length += len(part)
            _require_length(length)
            taken.append(part)
        return "".join(taken)

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        self._budget.spend()
        method = getattr(called, "__wrapped__", called)  # str.format is wrapped by Jinja
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _require_growth(method.__name__, (owner, *args), kwargs)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, type(left)):
            _require_size(left, len(left) + len(right))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _require_size(sequence, len(sequence) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _require_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            _require_growth("format", (left, *values), {})
        return super().call_binop(context, operator, left, right)

    def _measured(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that spends and is measured; Jinja's marks (``pass_context`` and the like) stay on it."""
        hidden = 1 if hasattr(made, "jinja_pass_arg") else 0

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._budget.spend()
            _require_growth(name, args[hidden:], kwargs)
            return made(*args, **kwargs)

        measured.__dict__.update(getattr(made, "__dict__", {}))
        return measured


def _require_length(characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise LimitPassed(f"it makes a text of more than {MOST_CHARACTERS:,} characters")


def _require_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise LimitPassed(f"it computes a number of more than {MOST_BITS:,} bits")


def _require_size(sequence: Sized, items: int) -> None:
    if isinstance(sequence, str):
        _require_length(items)
    elif items > MOST_ITEMS:
        raise LimitPassed(f"it makes a list of more than {MOST_ITEMS:,} items")


def _require_growth(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a filter or method of text that would make far more than it is given.

    Args:
        name: of the filter or method.
        args: what it works on, then its arguments.
    """
    given = [*args[1:], *kwargs.values()]
    texts = [value for value in given if isinstance(value, str)]
    longest = max(map(len, texts), default=0)
    widest = max((value for value in given if type(value) is int), default=0)
    text = args[0] if args and isinstance(args[0], str) else ""
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "slice"):
        if widest > WIDEST:
            raise LimitPassed(f"it asks {name} for a width of {widest:,}: {WIDEST:,} is the most")
        lines = text.count("\n") + text.count("\t") + 1
        _require_length(len(text) + lines * max(widest, longest))
    elif name == "replace" and len(texts) >= 2:
        _require_length(len(text) + text.count(texts[0]) * len(texts[1]))
    elif name == "join":
        items, glue = (args[0], longest) if not text else (given[0] if given else (), len(text))
        if isinstance(items, Sized):
            _require_length(len(items) * glue)
    elif name in ("format", "format_map"):
        widest = max((int(digits) for digits in re.findall(r"\d{1,9}", text)), default=0)
        starred = "*" in text or "{" in text.replace("{{", "").partition("{")[2].partition("}")[0]
        if widest > WIDEST or (starred and any(type(value) is int and value > WIDEST for value in given)):
            raise LimitPassed(f"it formats to a width of more than {WIDEST:,}")
        _require_length(len(text) + (text.count("%") + text.count("{")) * max(longest, widest))
