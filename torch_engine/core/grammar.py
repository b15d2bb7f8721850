"""Answers that keep to a schema, a regular expression or a grammar: which tokens may come next.

The parsing is llguidance's (Earley over a lexer of derivatives; https://github.com/guidance-ai/llguidance), which
refuses what it cannot enforce. Here: what is refused before it, by name; limits; a cache; and what happens where an
answer may or must end. :func:`check` needs no model, for whoever takes requests; :class:`Grammars` compiles for one
vocabulary; a :class:`Grammar` follows one answer.

A guide's types are NVIDIA's ``json``, ``json_schema``, ``regex`` and ``ebnf_grammar`` (as GBNF: ``root ::= ...``),
and beside them llguidance's own ``lark`` and the ``structural_tag`` of vLLM and xgrammar. A regular expression matches
the whole answer. White space between JSON's tokens is bounded, since small models love to go on with it for ever;
grammars in the user's own words have what they say.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, lru_cache
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from flightline.torch_engine.core.request import Guide, InvalidField
from flightline.torch_engine.text.stream import TokenBytes

MOST_BYTES, MOST_SCHEMA_BYTES = 2**14, 2**16
"""Of a guide's text: a grammar or an expression, and a schema. The library follows a chain of 7,500 rules, each the
next one's, beyond the end of a thread's stack; in so few bytes there is none half as long."""
MOST_KEY_PATTERNS = 32
"""Patterns of keys in a schema; the library compares each with each other."""
MOST_DEPTH = 100
"""Brackets in brackets of a schema; the library's own parser ends at 128."""
CACHED_GRAMMARS, CACHED_BYTES = 128, 2**22
"""Compiled grammars that are kept, and their texts' bytes together."""
THREADS = 8
"""For the grammars of a step, at most. On 16 cores of an H200's host 16 took longer than 4 or 8: 64 grammars are little
work beside waking that many; 2 were too few. One grammar in a hundred takes 2 ms, and others wait behind it."""
CHECKED_GUIDES = 64
"""Whose check is not repeated: applications ask for the same again and again."""
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms
    step_lexer_fuel=100_000,  # 7 ms
    step_max_items=20_000,  # 1 ms
    max_lexer_states=50_000,  # 100 MB
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""What a grammar may cost; beyond it is refused, or ends the answer with an error. The times are the library's own
estimates."""
_IN_STRINGS = r'[^"\\\x00-\x1F\x7F]'
SLICES = [
    r"[\x20\x0A\x0D\x09]+", *(f"{_IN_STRINGS}{{1,{most}}}" for most in (*range(1, 11), 30)), f"{_IN_STRINGS}+",
]  # fmt: skip
"""Parts of the vocabulary that are allowed or not as a whole, the library's own and those of 1 to 9 characters: where a
string may have so many more at the most, each token would be looked at otherwise (3 ms on one core for 128,256 tokens,
2 ms so)."""
WHITESPACE = r"[ ]|\n[ ]{0,24}"
"""Between JSON's tokens, once in each place: a blank, or a line's end and what the next one is indented by."""
OVERRIDES: Any = {
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
"""A schema's own ``x-guidance`` is not heard."""

ENFORCED = {
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"),
    *(
        "properties",
        "additionalProperties",
        "patternProperties",
        "required",
        "minProperties",
        "maxProperties",
    ),
    *("items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
REMARKS = {
    *("title", "description", "default", "example", "examples", "$schema", "$id", "$comment", "deprecated"),
    *("readOnly", "writeOnly", "discriminator", "contentMediaType", "contentEncoding"),
}
"""Say nothing about which answers are right. ``discriminator`` only names what ``oneOf`` beside it decides."""
NEUTRAL = {"uniqueItems": False, "nullable": False}
"""Keywords that cannot be enforced, with the values that ask for nothing."""
FORMATS = {
    *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"),
}
"""Those that are enforced."""
OTHER_FORMATS = {
    *("uri-reference", "iri", "iri-reference", "idn-email", "idn-hostname", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
}
"""The others that JSON Schema defines. Of any further one (OpenAPI's ``password``, pydantic's ``path``) it says that it
asks for nothing."""


UNKNOWN_TOKEN = ("unknown special token", "Token range end too large")
"""How the library says that a grammar names a token that is not there, by its text or by its id."""
SPECIAL_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|<[^\s<>"]+>')
"""Such a name in a grammar, or a string, in which it is none."""


@lru_cache(CHECKED_GUIDES)
def check(guide: Guide) -> None:
    """Whether a guide can be enforced, as far as that does not depend on the vocabulary. Lets other threads run.

    Raises:
        InvalidField: of ``guide_type`` or ``guide``; says what cannot be enforced, and what to do.
    """
    text = _translated(guide)
    for spelled in (text, SPECIAL_TOKEN.sub(_any_text, text)):
        try:
            _matcher(_bytes(), spelled)
            return
        except InvalidField as error:
            # These bytes have no special tokens; the model may. What is wrong beside them shows where they are texts.
            if not any(sign in error.problem for sign in UNKNOWN_TOKEN):
                raise


def _any_text(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith('"') else '"~"'


@cache
def _bytes() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def _compile(tokenizer: llguidance.LLTokenizer, guide: Guide) -> llguidance.LLMatcher:
    """Raises InvalidField."""
    return _matcher(tokenizer, _translated(guide))


def _translated(guide: Guide) -> str:
    """In the library's own language. Raises InvalidField."""
    if guide.type not in TRANSLATED:
        raise InvalidField("guide_type", f"is {guide.type!r}: it must be one of {', '.join(TRANSLATED)}")
    most = MOST_SCHEMA_BYTES if guide.type == "json_schema" else MOST_BYTES
    if len(guide.text) > most or len(guide.text.encode("utf-8", "surrogatepass")) > most:
        raise InvalidField("guide", f"has more than {most} bytes: make it smaller")
    if guide.type != "json" and not guide.text.strip():
        raise InvalidField("guide", f"is empty: {guide.type} needs one")
    return TRANSLATED[guide.type](guide.text)


def _matcher(tokenizer: llguidance.LLTokenizer, text: str) -> llguidance.LLMatcher:
    """Raises InvalidField."""
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise InvalidField("guide", f"cannot be enforced: {_one_line(matcher.get_error())}")
    return matcher


def _one_line(message: str) -> str:
    """The beginning of an error of llguidance."""
    text = " ".join(message.split("<state>")[0].replace("<non-verbose/>", "").split())
    return text if len(text) <= 400 else text[:400] + "..."


# From a guide to llguidance's own language ----------------------------------------------------------------


def _json(text: str) -> str:
    """Objects and arrays: what NVIDIA's examples show, and nobody means a bare number."""
    return _grammar_of_schema({"type": ["object", "array"]})


def _json_schema(text: str) -> str:
    return _grammar_of_schema(_schema(text))


def _regex(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(text))


def _ebnf_grammar(text: str) -> str:
    try:
        return str(llguidance.LLMatcher.grammar_from_lark(any_to_lark(text)))
    except Exception as error:  # it is a script: anything may come
        raise InvalidField("guide", f"is no EBNF grammar (root ::= ...): {_one_line(str(error))}") from None


def _lark(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_lark(text))


def _structural_tag(text: str) -> str:
    """Free text in which certain words begin something that keeps to a schema, up to other certain words.

    ``{"structures": [{"begin", "schema", "end"}], "triggers": [...]}``, or xgrammar's ``{"format": {"type":
    "triggered_tags", "triggers", "tags": [{"begin", "content": {"type": "json_schema", "json_schema"}, "end"}],
    "at_least_one", "stop_after_first"}}``.
    """
    tags, triggers, at_least_one, stop_after_first = _tags(_parsed(text))
    rules, names = [], []
    for number, (begin, schema, end) in enumerate(tags):
        trigger = next((each for each in triggers if begin.startswith(each)), None)
        if trigger is None:
            raise InvalidField(
                "guide", f"has the tag {begin!r}, which begins with none of the triggers {triggers}"
            )
        names.append(f"tag_{number}")
        rest = f" {json.dumps(begin[len(trigger) :])}" if begin != trigger else ""
        options = {**_walked(schema), "x-guidance": OVERRIDES}
        rules += [
            f"tag_{number}: head_{number}{rest} %json {json.dumps(options)} {json.dumps(end)}",
            f"head_{number}[lazy]: TEXT {json.dumps(trigger)}",
        ]
    one = " | ".join(names)
    if stop_after_first:
        start = one if at_least_one else f"{one} | tail"
    else:
        start = f"( {one} ){'+' if at_least_one else '*'} tail"
    return str(
        llguidance.LLMatcher.grammar_from_lark(
            "\n".join([f"start: {start}", "tail: TEXT", r"TEXT: /(.|\n)*/", *rules])
        )
    )


def _tags(value: Any) -> tuple[list[tuple[str, Any, str]], list[str], bool, bool]:
    """(begin, schema, end) of each tag, the triggers, and the two rules; both forms.

    Raises InvalidField.
    """

    def is_text(each: Any) -> bool:
        return isinstance(each, str) and bool(each)

    try:
        if "format" in value:
            form = value["format"]
            if form["type"] != "triggered_tags":
                raise InvalidField(
                    "guide", f"has the format {form['type']!r}: only triggered_tags is enforced"
                )
            contents = [tag["content"] for tag in form["tags"]]
            if other := [each["type"] for each in contents if each["type"] != "json_schema"]:
                raise InvalidField("guide", f"has content of type {other[0]!r}: only json_schema is enforced")
            tags = [
                (tag["begin"], content["json_schema"], tag["end"])
                for tag, content in zip(form["tags"], contents, strict=True)
            ]
            known = {"type", "triggers", "tags", "at_least_one", "stop_after_first"}
            rules = bool(form.get("at_least_one")), bool(form.get("stop_after_first"))
        else:
            form, known, rules = value, {"type", "structures", "triggers"}, (False, False)
            tags = [(tag["begin"], tag["schema"], tag["end"]) for tag in form["structures"]]
        triggers = form["triggers"]
        right = (
            tags
            and triggers
            and all(map(is_text, triggers))
            and all(is_text(begin) and is_text(end) for begin, _, end in tags)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidField(
            "guide", f"is no structural tag: {error} is missing or of the wrong kind"
        ) from None
    if not right:
        raise InvalidField(
            "guide", "is no structural tag: triggers, begin and end must be text, and not empty"
        )
    if unknown := set(form) - known:
        raise InvalidField("guide", f"has {sorted(unknown)[0]!r}, which is not enforced: leave it out")
    return tags, triggers, *rules


TRANSLATED: dict[str, Callable[[str], str]] = {
    "json": _json,
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf_grammar": _ebnf_grammar,
    "lark": _lark,
    "structural_tag": _structural_tag,
}
"""A guide's type -> what makes a grammar for llguidance of its text; raises InvalidField."""


# Schemas --------------------------------------------------------------------------------------------------


def _grammar_of_schema(schema: Any) -> str:
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError as error:
        raise InvalidField("guide", f"has a number beyond all bounds: {error}") from None
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=OVERRIDES))


def _schema(text: str) -> dict[str, Any]:
    return _walked(_parsed(text))


def _parsed(text: str) -> Any:
    """Raises InvalidField: not JSON, or brackets too deep."""
    depth, deepest, quoted, escaped = 0, 0, False, False
    for letter in text:
        if quoted:
            quoted, escaped = escaped or letter != '"', not escaped and letter == "\\"
        elif letter == '"':
            quoted = True
        elif letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    if deepest > MOST_DEPTH:
        raise InvalidField("guide", f"has {deepest} brackets in each other: at most {MOST_DEPTH} are allowed")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidField("guide", f"is not JSON: {error}") from None


def asks_for_nothing(keyword: str, value: Any) -> bool:
    """Whether a schema without this keyword allows the same."""
    if keyword == "format":
        return isinstance(value, str) and value not in FORMATS | OTHER_FORMATS
    return keyword in NEUTRAL and value is NEUTRAL[keyword]


def _walked(schema: Any) -> dict[str, Any]:
    """The schema without what asks for nothing.

    Raises:
        InvalidField: it has a keyword that cannot be enforced.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidField("guide", f"is {str(schema)[:40]}: a schema must be an object")
    if set(schema) == {"name", "schema"} or set(schema) == {"name", "schema", "strict"}:
        raise InvalidField("guide", "is OpenAI's wrapper of a schema: give the schema in it")
    schema.pop("x-guidance", None)
    open_parts: list[tuple[Any, str]] = [(schema, "#")]
    key_patterns = 0
    while open_parts:
        part, path = open_parts.pop()
        if not isinstance(part, dict):
            continue  # true and false; of anything else the library tells what is wrong
        for name, value in list(part.items()):
            if asks_for_nothing(name, value):
                del part[name]
            elif name == "format" and isinstance(value, str) and value in OTHER_FORMATS:
                raise InvalidField(
                    "guide",
                    f"has the format {value!r} at {path}, which cannot be enforced: leave it out, or say a pattern",
                )
            elif name not in ENFORCED and name not in REMARKS and not name.startswith("x-"):
                raise InvalidField(
                    "guide",
                    f"has the keyword {name!r} at {path}, which cannot be enforced: leave it out, or say the same "
                    "with other keywords",
                )
        if isinstance(part.get("items"), list):
            raise InvalidField("guide", f"has a list of items at {path}: say prefixItems")
        if isinstance(patterns := part.get("patternProperties"), dict):
            key_patterns += len(patterns)
        if key_patterns > MOST_KEY_PATTERNS:
            raise InvalidField("guide", f"has more than {MOST_KEY_PATTERNS} patternProperties: use fewer")
        _require_counted(part, path)
        open_parts += _parts(part, path)
    return schema


def _require_counted(part: dict[str, Any], path: str) -> None:
    """Raises InvalidField: an object's keys may repeat, so that they can only be counted where they are required."""
    least, required = part.get("minProperties", 0), part.get("required", ())
    if isinstance(least, int) and isinstance(required, list) and least > max(1, len(required)):
        raise InvalidField(
            "guide",
            f"has minProperties {least} at {path} and requires {len(required)} properties by name: more than those "
            "cannot be enforced",
        )


def _parts(schema: dict[str, Any], path: str) -> Iterator[tuple[Any, str]]:
    """Schemas in a schema, and where they are."""
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(name), dict):
            for key, part in schema[name].items():
                yield part, f"{path}/{name}/{key}"
    for name in ("anyOf", "oneOf", "allOf", "prefixItems", "items", "additionalProperties"):
        found = schema.get(name)
        for number, part in enumerate(found if isinstance(found, list) else ()):
            yield part, f"{path}/{name}/{number}"
        if isinstance(found, dict):
            yield found, f"{path}/{name}"


# Compiled for a vocabulary --------------------------------------------------------------------------------


class _Words:
    """A vocabulary as llguidance's ``TokenizerWrapper`` wants it."""

    def __init__(self, tokens: TokenBytes, vocab: int) -> None:
        names = [tokens.with_special[token] for token in range(vocab)]
        self.tokens = [tokens[token] or names[token] or b"<unused>" for token in range(vocab)]
        self.special_token_ids = [token for token in range(vocab) if not tokens[token]]
        # Not one of the vocabulary's: which tokens end an answer is each request's own affair.
        self.tokens.append(b"<end of grammar>")
        self.special_token_ids.append(vocab)
        self.eos_token_id = vocab
        self.bos_token_id = None
        self._spell = tokens.spell

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids that spell a text."""
        return self._spell(text.encode() if isinstance(text, str) else text)


class Grammars:
    """Grammars over one vocabulary, compiled once and kept for a while. Safe to use from several threads.

    Args:
        tokens: what the tokens spell. Special ones are never part of a text; a Lark grammar can name them.
        vocab: logits a row, which may be more or fewer than the tokenizer's tokens.
    """

    def __init__(self, tokens: TokenBytes, vocab: int) -> None:
        self.vocab = vocab
        self._tokens = tokens
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[Guide, llguidance.LLMatcher] = OrderedDict()
        self._bytes = 0

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Words(self._tokens, self.vocab)), slices=SLICES
        )

    def warm_up(self) -> None:
        """Makes what all grammars share, so that no request has to wait for it: 0.4 s, 35 MB for 49,152 tokens."""
        with self._making:
            _ = self._tokenizer

    def get(self, guide: Guide) -> llguidance.LLMatcher | None:
        """A matcher at its beginning, if the guide is known; it is the caller's own."""
        with self._lock:
            known = self._kept.get(guide)
            if known is None:
                return None
            self._kept.move_to_end(guide)
            return known.deep_copy()

    def compile(self, guide: Guide) -> llguidance.LLMatcher:
        """The same of any guide; lets other threads run while the library works.

        Raises:
            InvalidField: of ``guide_type`` or ``guide``: it cannot be enforced.
        """
        if (known := self.get(guide)) is not None:
            return known
        self.warm_up()
        made = _compile(self._tokenizer, guide)
        with self._lock:
            if guide not in self._kept:
                self._kept[guide] = made.deep_copy()
                self._bytes += len(guide.text)
            while len(self._kept) > CACHED_GRAMMARS or self._bytes > CACHED_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[0].text)
        return made


class Grammar:
    """One answer's grammar, as far as the answer has come.

    Args:
        matcher: at its beginning, and nobody else's.
        vocab: logits a row.
        tokens: what the tokens spell.
        end_ids: tokens that end the answer. Those with a text are no part of what the grammar says.
        min_tokens: until so many have come the answer ends only where the grammar leaves nothing else.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocab: int,
        tokens: TokenBytes,
        end_ids: frozenset[int],
        min_tokens: int = 0,
    ) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._ends = [token for token in end_ids if 0 <= token < vocab]
        self._spelled = [token for token in self._ends if tokens[token]]
        self._left = min_tokens
        self._row = np.zeros((1, self.words(vocab)), dtype=np.uint32)
        self._known = False
        self.finished = False
        """Nothing may follow but an end."""
        self.problem = ""
        """Why it cannot go on, if so: then no token is allowed."""

    @staticmethod
    def words(vocab: int) -> int:
        """Words of 32 bits in a row that :meth:`fill` writes: the vocabulary and one token more."""
        return vocab // 32 + 1

    def take(self, token: int) -> None:
        """The answer goes on with this token, which is no end."""
        self._took(self._matcher.consume_token(token))

    def _took(self, accepted: bool) -> None:
        self._left -= 1
        self._known = False
        if not accepted:
            self._fail(self._matcher.get_error())
        elif self._matcher.is_stopped():
            self.finished = True

    def mask(self) -> NDArray[Any]:
        """Which tokens may come next: a bit for each, uint32 [words]; the same array every time."""
        if not self._known:
            self.fill(self._row[0])
            self._known = True
        row: NDArray[Any] = self._row[0]
        return row

    def fill(self, row: NDArray[Any]) -> None:
        """Writes the mask into ``row``, contiguous uint32 [words]."""
        self._write(row)
        _complete([self], row[None])

    def _write(self, row: NDArray[Any]) -> None:
        """The library's mask, if the grammar can go on."""
        if not self.problem:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def _end(self, row: NDArray[Any], accepting: bool, goes_on: bool) -> None:
        """Says in a mask which ends are allowed.

        Args:
            accepting: the grammar may end here.
            goes_on: anything but an end is allowed.
        """
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        if self.problem:
            row[:] = 0
        elif accepting and not (goes_on and self._left > 0):
            for token in self._ends:
                row[token // 32] |= np.uint32(1 << token % 32)
        elif not goes_on:
            self._fail("NoExtension")

    def _fail(self, message: str) -> None:
        reason = "no token of this model can follow" if "NoExtension" in message else _one_line(message)
        self.problem = self.problem or f"the grammar cannot go on: {reason}"


@cache
def _executor() -> llguidance.LLExecutor:
    """Threads for the grammars of a step."""
    return llguidance.LLExecutor(min(THREADS, os.cpu_count() or 1))


def take(taken: list[tuple[Grammar, int]]) -> None:
    """Several answers go on with a token each, which is no end: :meth:`Grammar.take` of all, on several threads."""
    accepted = _executor().consume_token_par([(grammar._matcher, token) for grammar, token in taken])
    for (grammar, _), each in zip(taken, accepted, strict=True):
        grammar._took(each)


def know(grammars: list[Grammar]) -> None:
    """Makes the masks of several at once: :meth:`Grammar.mask` then knows them.

    By this thread alone: on two cores, of which the kernels' threads have just had both, several took half as much
    again.
    """
    unknown = [grammar for grammar in grammars if not grammar._known]
    if len(unknown) < 2:
        return  # it makes one by itself, sooner
    rows = np.empty((len(unknown), Grammar.words(unknown[0]._vocab)), dtype=np.uint32)
    for grammar, row in zip(unknown, rows, strict=True):
        grammar._write(row)
    _complete(unknown, rows)
    for grammar, row in zip(unknown, rows, strict=True):
        grammar._row[0] = row
        grammar._known = True


@cache
def _beside() -> ThreadPoolExecutor:
    """The thread that waits for those."""
    return ThreadPoolExecutor(1, "masks")


def fill(grammars: list[Grammar], rows: NDArray[Any]) -> Callable[[], None]:
    """Begins to write several masks at once, on several threads: ``rows`` contiguous uint32 [grammars, words].

    The grammars are of one vocabulary. Returns what waits until all are written; until then the caller may do whatever
    asks nothing of these grammars.
    """
    work = [(each._matcher, row) for row, each in enumerate(grammars) if not each.problem]
    begun = threading.Event()

    def write() -> None:
        begun.set()
        _executor().unsafe_compute_mask_ptr(work, rows.ctypes.data, rows.shape[1] * 4, len(rows))

    def wait() -> None:
        if work:
            written.result()
        _complete(grammars, rows)

    if work:
        written = _beside().submit(write)
        begun.wait()  # a caller that went on would keep Python's lock, and the thread would wait for milliseconds
    return wait


def _complete(grammars: list[Grammar], rows: NDArray[Any]) -> None:
    """Says in masks [grammars, words] which ends are allowed, and that llguidance's own is not.

    It is where the grammar may end. Most masks are somewhere in the middle: nothing else has to be asked about them.
    """
    word, end = grammars[0]._vocab // 32, np.uint32(1 << grammars[0]._vocab % 32)
    accepting = (rows[:, word] & end).astype(bool)
    rows[:, word] &= end - np.uint32(1)
    for row, each in enumerate(grammars):
        for token in each._spelled:
            rows[row, token // 32] &= ~np.uint32(1 << token % 32)
        if each.problem:
            rows[row] = 0
    goes_on = rows.view(np.bool_).any(axis=1)
    for row in np.flatnonzero(accepting | ~goes_on).tolist():
        grammars[row]._end(rows[row], bool(accepting[row]), bool(goes_on[row]))
