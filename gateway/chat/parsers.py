"""The model's text taken apart as it comes: thoughts, text and tool calls.

A reader is a generator that is sent one character after the other and ``""`` at the end. So it is written as if the
whole text were there, and it cannot matter how the text was cut into pieces.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flightline.gateway.chat.guides import Reasoning

Kind = Literal["text", "reasoning", "tool_start", "tool_arguments"]
Reader = Generator[None, str, None]


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of an answer.

    ``text`` and ``reasoning`` carry text. ``tool_start`` opens call ``index`` (0, 1, ...) with its id and name;
    ``tool_arguments`` carries a piece of that call's arguments, whose pieces together are JSON text.
    """

    kind: Kind
    text: str = ""
    index: int = 0
    call_id: str = ""
    name: str = ""


class OutputParser:
    """Takes one answer apart; only what may still become a marker is held back."""

    def __init__(
        self,
        tool_format: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        reasoning: Reasoning = Reasoning.NONE,
        *,
        named: bool = False,
        parallel: bool = True,
    ) -> None:
        """
        Args:
            tool_format: a name of ``FORMATS``; None: calls are not looked for.
            tools: the tools offered.
            reasoning: where the answer begins.
            named: ``tool_choice`` names a tool, so an answer that ends by itself ends with ``stop``.
            parallel: False: calls after the first are dropped.
        """
        names = {tool["function"]["name"] for tool in tools or ()}
        self._named = named
        self._sink = _Sink(parallel, _mistral_id if tool_format in ("mistral", "mistral_v11") else _call_id)
        self._reader: Reader | None = None
        if tool_format is not None or reasoning is not Reasoning.NONE:
            plain = _harmony(self._sink, names) if reasoning is Reasoning.CHANNELS else _plain(self._sink)
            content = plain if tool_format is None else FORMATS[tool_format](self._sink, names)
            self._reader = _answer(reasoning, content, self._sink)
            next(self._reader)

    def feed(self, text: str) -> list[Delta]:
        """The deltas that ``text``, the next piece of the answer, settles."""
        if self._reader is None:
            return [Delta("text", text)] if text else []
        send = self._reader.send
        for character in text:
            send(character)
        return self._sink.take()

    @property
    def thinking(self) -> bool:
        """What was read last is a thought, or opens one."""
        return self._sink.thinking

    @property
    def may_think(self) -> bool:
        """There may be thoughts to come."""
        return self._sink.may_think

    def finish(self, finish_reason: str) -> tuple[list[Delta], str]:
        """What was held back, and the true finish reason.

        A call that is not whole makes it ``length``, whatever has cut it: a client must not take it for a call to
        make, nor the answer for a whole one. Else it is ``tool_calls`` if the engine's is ``stop`` and there were calls
        that nobody named.
        """
        if self._reader is not None:
            self._sink.end(cut=finish_reason == "length")
            try:
                while True:  # every stage that still reads is told of the end
                    self._reader.send("")
            except StopIteration:
                pass
            self._sink.finish()
        if finish_reason == "stop" and self._sink.half_a_call:
            finish_reason = "length"
        elif finish_reason == "stop" and self._sink.calls and not self._named:
            finish_reason = "tool_calls"
        return self._sink.take(), finish_reason


class _Sink:
    """Collects deltas. White space beside a call belongs to its markers, so it waits until text follows it."""

    def __init__(self, parallel: bool, new_id: Callable[[], str]) -> None:
        self.calls = 0
        self.thinking = False
        self.may_think = True
        self.ended = False
        """Nothing follows what has been read."""
        self.half_a_call = False
        """The answer ends inside a call."""
        self._cut = False
        self._parallel = parallel
        self._new_id = new_id
        self._deltas: list[Delta] = []
        self._kind: Kind = "text"
        self._parts: list[str] = []
        """Text of the delta that is being collected."""
        self._space = ""
        self._beside_call = False
        """Nothing but white space since the last call."""
        self._open = False
        self._unmarked = False
        """The open call's end need not be written."""
        self._arguments: list[str] = []
        """Of the open call, so far."""

    def text(self, text: str) -> None:
        for character in text:
            if character.isspace():
                self._space += character
                continue
            self._add("text", character if self._beside_call else self._space + character)
            self._space, self._beside_call = "", False

    def reasoning(self, text: str) -> None:
        self._add("reasoning", text)

    def start(self, name: str, unmarked: bool = False) -> None:
        """Opens a call.

        Args:
            unmarked: the end of the answer ends it, too.
        """
        self._space, self._beside_call = "", True
        self._open, self._unmarked, self._arguments = self._parallel or not self.calls, unmarked, []
        if self._open:
            self._settle()
            self._deltas.append(Delta("tool_start", "", self.calls, self._new_id(), name))
            self.calls += 1

    def arguments(self, text: str) -> None:
        if self._open and text:
            self._arguments.append(text)
            self._add("tool_arguments", text)

    def close(self) -> None:
        """The open call is complete."""
        if not self._arguments:
            self.arguments("{}")
        self._open = False

    def end(self, cut: bool) -> None:
        """The answer has ended, or was ``cut`` by a limit; readers are told next."""
        self.ended, self._cut = True, cut

    def undecided(self, text: str, certain: bool) -> None:
        """The answer has ended with ``text``, which could have become a call, or would ``certain``ly have.

        Nobody has a use for the beginning of a call's markup. But a text that came to its own end stays one.
        """
        if certain or self._cut:
            self._space, self.half_a_call = "", True
        else:
            self.text(text)

    def finish(self) -> None:
        """All has been read."""
        if self._open and not self._cut and self._is_whole():
            self.close()
        self.half_a_call |= self._open
        if not self._beside_call and self._space:
            self._add("text", self._space)

    def _is_whole(self) -> bool:
        """The open call can be made, though its end was not written."""
        return _decoded("".join(self._arguments)) is not None if self._arguments else self._unmarked

    def take(self) -> list[Delta]:
        self._settle()
        taken, self._deltas = self._deltas, []
        return taken

    def _add(self, kind: Kind, text: str) -> None:
        if not text:
            return
        if kind != self._kind:
            self._settle()
            self._kind = kind
        self._parts.append(text)

    def _settle(self) -> None:
        if self._parts:
            index = self.calls - 1 if self._kind == "tool_arguments" else 0
            self._deltas.append(Delta(self._kind, "".join(self._parts), index))
            self._parts = []


def _call_id() -> str:
    return "call_" + _letters(24)


def _mistral_id() -> str:
    """Mistral's templates refuse any other form when the conversation comes back."""
    return _letters(9)


def _letters(count: int) -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(count))


# The whole answer: thoughts, then content.


def _answer(reasoning: Reasoning, content: Reader, sink: _Sink) -> Reader:
    next(content)
    rest = ""
    inside = reasoning is Reasoning.OPEN
    if reasoning is Reasoning.POSSIBLE:
        inside, rest = yield from _opens("<think>")
    if inside:
        sink.thinking = True
        character = yield from _after_space()
        if character:
            yield from _until("</think>", sink.reasoning, character)
            sink.thinking = sink.may_think = False
            rest = yield from _after_space()
    sink.may_think = reasoning is Reasoning.CHANNELS
    for character in rest:
        content.send(character)
    while True:
        character = yield
        try:
            content.send(character)
        except StopIteration:
            return


def _plain(sink: _Sink) -> Reader:
    while character := (yield):
        sink.text(character)


def _after_space() -> Generator[None, str, str]:
    """The first character that is no white space; ``""`` at the end."""
    while (character := (yield)).isspace():
        pass
    return character


def _opens(marker: str) -> Generator[None, str, tuple[bool, str]]:
    """Whether the text begins with ``marker``, white space aside; if not, what has been read of it."""
    read = ""
    while character := (yield):
        read += character
        if read.lstrip() == marker:
            return True, ""
        if not marker.startswith(read.lstrip()):
            break
    return False, read


def _until(marker: str, out: Callable[[str], None], held: str = "") -> Generator[None, str, bool]:
    """Passes text on until ``marker`` has come (True) or the end (False); ``held`` is the text's beginning."""
    while True:
        while not marker.startswith(held):
            out(held[0])
            held = held[1:]
        if held == marker:
            return True
        character = yield
        if not character:
            out(held)
            return False
        held += character


# The formats. Each is a reader of what follows the thoughts.


def _hermes(sink: _Sink, names: Collection[str]) -> Reader:
    """``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``, anywhere in the text."""
    held = ""
    while (yield from _until("<tool_call>", sink.text, held)):
        called, read = yield from _call_object(sink, None)
        if not called and sink.ended:
            sink.undecided("<tool_call>" + read, certain="{" in read)
            return
        if not called:
            sink.text("<tool_call>")
            held = read
            continue
        closed, held = yield from _opens("</tool_call>")  # some models forget it
        held = "" if closed or sink.ended else held


def _llama3_json(sink: _Sink, names: Collection[str]) -> Reader:
    """``{"name": ..., "parameters": {...}}`` as the whole answer, several with ``;`` between them.

    Nothing marks a call, so only an object with the name of an offered tool is one.
    """
    tagged, read = yield from _opens("<|python_tag|>")
    begun = read.lstrip()
    sink.text(read.removesuffix(begun))
    if not tagged and begun != "{":
        sink.text(begun)
        yield from _plain(sink)
        return
    while True:
        called, read = yield from _call_object(sink, names, begun)
        if not called and sink.ended and _may_become_object_call(read, names):
            sink.undecided(read, certain=tagged and "{" in read)
            return
        if not called:
            sink.text(read)
            break
        begun = ""
        separator = yield from _after_space()
        if separator != ";":
            sink.text(separator)
            break
    yield from _plain(sink)


def _may_become_object_call(read: str, names: Collection[str]) -> bool:
    written = re.sub(r"\s", "", read)
    heads = ('{"name":"', '{"type":"function","name":"')
    return any((head + name + '"').startswith(written) for head in heads for name in names)


def _pythonic(sink: _Sink, names: Collection[str]) -> Reader:
    """``[f(a=1, b="x"), g()]`` as the whole answer; only calls of offered tools count."""
    read = yield from _python_calls(sink, names)
    sink.text(read)
    if not read:
        ended, read = yield from _opens("<|python_end|>")
        sink.text("" if ended else read)
    yield from _plain(sink)


def _python_calls(sink: _Sink, names: Collection[str]) -> Generator[None, str, str]:
    """Reads the list; returns the text that turned out to be none."""
    started, read = yield from _opens("<|python_start|>")
    character = read.lstrip() if not started else (yield from _after_space())
    read = read or character
    if character != "[":
        return read
    while True:
        name = yield from _after_space()
        read += name
        while re.fullmatch(r"[\w-]+", name):
            character = yield
            read += character
            if character in ("(", ""):
                break
            name += character
        if sink.ended and any(known.startswith(name) for known in names):
            sink.undecided(read, certain=False)
            return ""
        if name not in names or not read.endswith("("):
            return read
        written, whole = yield from _bracketed(")")
        if sink.ended and not whole:
            sink.undecided(read + written, certain=True)
            return ""
        arguments = _keyword_arguments(written[:-1]) if whole else None
        if arguments is None:
            return read + written
        sink.start(name)
        sink.arguments(arguments)
        sink.close()
        separator = yield from _after_space()
        if separator != ",":
            return "" if separator == "]" else separator
        read = ", "


def _bracketed(closing: str) -> Generator[None, str, tuple[str, bool]]:
    """Python source up to and with the bracket that closes it, and whether that came."""
    read, quote, depth = "", "", 1
    while character := (yield):
        read += character
        if quote:
            if character == "\\":
                read += yield
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if not depth:
                return read, character == closing
    return read, False


def _keyword_arguments(source: str) -> str | None:
    """``a=1, b="x"`` as JSON text; None if it is anything else."""
    try:
        call = ast.parse(f"f({source})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                return None
            values[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


class _JsonNames(ast.NodeTransformer):
    """JSON's three names beside Python's: models mix them up."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = {"true": True, "false": False, "null": None}
        return ast.Constant(known[node.id]) if node.id in known else node


def _mistral(sink: _Sink, names: Collection[str]) -> Reader:
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``, or a marker for each: ``[TOOL_CALLS]f[ARGS]{...}``."""
    held = ""
    while (yield from _until("[TOOL_CALLS]", sink.text, held)):
        first = yield from _after_space()
        read = (yield from _call_list(sink)) if first == "[" else (yield from _call_by_name(sink, first))
        if read is None:
            held = ""
        elif sink.ended:
            sink.undecided("[TOOL_CALLS]" + read, certain=True)
            return
        else:
            sink.text("[TOOL_CALLS]")
            held = read


def _call_list(sink: _Sink) -> Generator[None, str, str | None]:
    """Reads objects up to ``]``; what was read if they are no calls."""
    while True:
        called, read = yield from _call_object(sink, None)
        if not called:
            return "[" + read
        if (yield from _after_space()) != ",":
            return None


LONGEST_HEAD = 200
"""Characters between a marker and its arguments: a name of 64 and Mistral's own marks."""


def _call_by_name(sink: _Sink, first: str) -> Generator[None, str, str | None]:
    """Reads ``f[ARGS]{...}`` or ``f{...}``, maybe with ``[CALL_ID]``; what was read if it is no call."""
    read = first
    while not read.endswith("{"):
        character = yield
        read += character
        if not character or len(read) > LONGEST_HEAD:
            return read
    name = read[:-1].partition("[")[0].strip()
    if not name:
        return read
    sink.start(name)
    sink.arguments("{")
    yield from _nested(sink.arguments)
    if not sink.ended:
        sink.close()
    return None


_ENDS_OF_MESSAGES = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


def _harmony(sink: _Sink, names: Collection[str]) -> Reader:
    """OpenAI's harmony: messages like ``<|channel|>final<|message|>...<|end|><|start|>assistant``; the prompt has
    begun the first one.

    ``analysis`` is thoughts; ``final``, no channel, and what ``commentary`` says to nobody is text. What is said to a
    function is a call of it: ``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>``, where
    the addressee may as well stand before the channel. Where no tools are offered it is a thought, as is what is said
    to anybody else.
    """
    said: set[str] = set()
    while True:
        head: list[str] = []
        if not (yield from _until("<|message|>", head.append)):
            unmarked = "".join(head)
            if re.search(r"\bto=", unmarked):
                sink.undecided("", certain=bool(names))
            elif "<|" not in unmarked and not re.fullmatch(r"\s*(t|to)?", unmarked):
                sink.text(unmarked)  # the model has not kept to the format
            return
        channel = re.search(r"<\|channel\|>\s*(\w+)", "".join(head))
        addressee = re.search(r"\bto=([^\s<]+)", "".join(head))
        kind = "thoughts"
        if addressee is not None and names and addressee[1].startswith("functions."):
            kind = "call"
            sink.start(addressee[1].removeprefix("functions."), unmarked=True)
            out = sink.arguments
        elif addressee is None and (channel is None or channel[1] in ("final", "commentary")):
            kind, out = "text", sink.text
        else:
            out = sink.reasoning
            sink.thinking = True
        if kind in said and kind != "call":
            out("\n")
        said.add(kind)
        if not (yield from _until_any(_ENDS_OF_MESSAGES, out)):
            return
        sink.thinking = False
        if kind == "call":
            sink.close()


def _until_any(markers: Collection[str], out: Callable[[str], None]) -> Generator[None, str, bool]:
    """Passes text on until one of the ``markers``, none of which begins another, has come (True) or the end (False)."""
    held = ""
    while character := (yield):
        held += character
        while held and not any(marker.startswith(held) for marker in markers):
            out(held[0])
            held = held[1:]
        if held in markers:
            return True
    out(held)
    return False


FORMATS: dict[str, Callable[[_Sink, Collection[str]], Reader]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "pythonic": _pythonic,
    "mistral": _mistral,
    "mistral_v11": _mistral,
    "harmony": _harmony,
}
"""Readers of tool calls by name: Hermes and Qwen, Llama 3's JSON and its lists of calls, Mistral's two generations, and
gpt-oss."""


# JSON, as far as a call must be understood while it comes.

NAME_KEYS = frozenset({"name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
OTHER_KEYS = frozenset({"type", "id", "function"})


def _call_object(
    sink: _Sink, names: Collection[str] | None, begun: str = ""
) -> Generator[None, str, tuple[bool, str]]:
    """Reads a JSON object with a name and arguments, which go on as they come.

    Args:
        sink: where the call goes.
        names: the only names that make it a call; None: any.
        begun: its first character, if that has been read.

    Returns:
        Whether it was a call and, if not, what has been read.
    """
    read = begun
    name: str | None = None
    waiting: str | None = None
    """Arguments that came before the name."""
    character = begun or (yield)
    read = character
    while character.isspace():
        character = yield
        read += character
    if character != "{":
        return False, read

    def arguments(text: str) -> None:
        nonlocal waiting
        if name is None:
            waiting = (waiting or "") + text
        else:
            sink.arguments(text)

    while True:
        while (character := (yield)).isspace() or character == ",":
            read += character
        read += character
        if character == "}":
            if name is not None:
                sink.close()
            return name is not None, read
        if character != '"':
            return name is not None, read
        key = yield from _string()
        read += key
        key = _decoded('"' + key)
        if name is None and key not in NAME_KEYS | ARGUMENT_KEYS | OTHER_KEYS:
            return False, read
        while (character := (yield)).isspace():
            read += character
        read += character
        if character != ":":
            return name is not None, read
        while (character := (yield)).isspace():
            read += character
        is_arguments = key in ARGUMENT_KEYS
        if is_arguments and character == "{":
            arguments("{")
            read += "{" + (yield from _nested(arguments))
            continue
        value, following = yield from _value(character)
        read += value + following
        if key in NAME_KEYS and name is None:
            decoded = _decoded(value)
            if not isinstance(decoded, str) or not decoded or (names is not None and decoded not in names):
                return False, read
            name = decoded
            sink.start(name)
            sink.arguments(waiting or "")
        elif is_arguments:
            decoded = _decoded(value)
            if isinstance(decoded, str):  # arguments as JSON text in a string
                arguments(decoded)
        if following == "}":
            if name is not None:
                sink.close()
            return name is not None, read
        if not following and not value:
            return name is not None, read


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _string() -> Generator[None, str, str]:
    """A JSON string behind its opening quote, with the closing one."""
    read = ""
    while character := (yield):
        read += character
        if character == '"':
            break
        if character == "\\":
            read += yield
    return read


def _nested(out: Callable[[str], None]) -> Generator[None, str, str]:
    """The rest of an object or array whose bracket has been read, passed on as it comes."""
    read, depth = "", 1
    while depth and (character := (yield)):
        read += character
        out(character)
        if character == '"':
            quoted = ""
            while (character := (yield)) and character != '"':
                escaped = (yield) if character == "\\" else ""
                out(character + escaped)
                quoted += character + escaped
            out(character)
            read += quoted + character
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
    return read


def _value(first: str) -> Generator[None, str, tuple[str, str]]:
    """A JSON value that begins with ``first``, and the ``,`` or ``}`` behind it if that had to be read."""
    if first == '"':
        return first + (yield from _string()), ""
    if first in ("{", "["):
        return first + (yield from _nested(lambda text: None)), ""
    read = first
    while (character := (yield)) not in (",", "}", "]", ""):
        read += character
    return read.strip(), character
