"""Pairs of a JSON schema and a prompt, made from a seed: what applications ask for, in all the shapes a grammar has.

Nested objects, enums, arrays, patterns, formats, bounds, unions, tuples, maps, recursion by ``$ref`` and ``allOf``. All
strings and lists have bounds, so that an answer may end before its limit of tokens does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

NAMES = (
    *(
        "name",
        "city",
        "price",
        "tags",
        "id",
        "email",
        "items",
        "status",
        "notes",
        "width",
        "owner",
        "created",
    ),
    *("größe", "名前", "a b", "kind", "count", "unit", "lines", "score", "code", "link"),
)
WORDS = (
    "red",
    "green",
    "blue",
    "open",
    "closed",
    "it's",
    'say "x"',
    "a\\b",
    "naïve",
    "日本",
    "",
    "0",
    "null",
)
PATTERNS = (
    *(
        r"^[A-Z]{3}-[0-9]{4}$",
        r"^[a-z]+(_[a-z]+){0,3}$",
        r"^#[0-9a-f]{6}$",
        r"[0-9]{2,5}",
        r"^(red|green|blue)$",
    ),
    *(r"^[0-9]{1,3}(\.[0-9]{1,3}){3}$", r"^[a-z0-9]{1,12}@[a-z]{2,8}\.(com|org)$", r"^\+?[1-9][0-9]{7,14}$"),
)
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "duration")
TOPICS = (
    "a book",
    "a river",
    "an invoice",
    "a train",
    "a recipe",
    "a user account",
    "a chess game",
    "a planet",
)

Schema = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    name: str
    prompt: str
    schema: Schema


def pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """``count`` pairs, each of its own number: the same whatever comes before."""
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        name, make = list(KINDS.items())[number % len(KINDS)]
        yield Pair(f"{name}-{number}", f"Describe {rng.choice(TOPICS)} in JSON.", make(rng))


def _string(rng: random.Random) -> Schema:
    return rng.choice(
        [
            lambda: {"type": "string", "maxLength": rng.randint(0, 24)},
            lambda: {"type": "string", "minLength": rng.randint(1, 4), "maxLength": rng.randint(4, 24)},
            lambda: {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 24},
            lambda: {"type": "string", "format": rng.choice(FORMATS)},
            lambda: {"enum": rng.sample(WORDS, rng.randint(1, 6))},
        ]
    )()


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    return rng.choice(
        [
            lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)},
            lambda: {"type": "integer", "minimum": 0, "exclusiveMaximum": 10 ** rng.randint(1, 6)},
            lambda: {"type": "number", "minimum": low, "maximum": low + rng.random() * 100},
            lambda: {"type": "integer", "multipleOf": rng.choice([2, 5, 10]), "minimum": 0, "maximum": 1000},
            lambda: {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        ]
    )()


def _leaf(rng: random.Random) -> Schema:
    return rng.choice(
        [_string, _string, _number, lambda _: {"type": "boolean"}, lambda _: {"type": ["integer", "null"]}]
    )(rng)


def _value(rng: random.Random, depth: int) -> Schema:
    if depth <= 0:
        return _leaf(rng)
    return rng.choice([_leaf, _leaf, lambda r: _object(r, depth - 1), lambda r: _array(r, depth - 1)])(rng)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: _value(rng, depth) for name in names}}
    required = [name for name in names if rng.random() < 0.7]
    if required:
        schema["required"] = required
    return {**schema, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _value(rng, depth),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _tuple(rng: random.Random) -> Schema:
    return {
        "type": "array",
        "prefixItems": [_leaf(rng) for _ in range(3)],
        "items": False,
        "minItems": 3,
        "maxItems": 3,
    }


def _union(rng: random.Random) -> Schema:
    options = [
        {
            "type": "object",
            "properties": {"kind": {"const": f"k{number}"}, "value": _leaf(rng)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for number in range(rng.randint(2, 4))
    ]
    return {rng.choice(["anyOf", "oneOf"]): options}


def _map(rng: random.Random) -> Schema:
    return {
        "type": "object",
        "properties": {"title": {"type": "string", "maxLength": 12}},
        "patternProperties": {"^x_[a-z]{1,3}$": _leaf(rng)},
        "additionalProperties": False,
        "required": ["title"],
    }


def _tree(rng: random.Random) -> Schema:
    node = {
        "type": "object",
        "properties": {
            "value": _leaf(rng),
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["value", "children"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _list(rng: random.Random) -> Schema:
    """Linked: recursion that may be null."""
    return {
        "type": "object",
        "properties": {"head": _leaf(rng), "tail": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["head", "tail"],
        "additionalProperties": False,
    }


def _both(rng: random.Random) -> Schema:
    """Two objects at once; the first has the second's properties too, since each alone would forbid them."""
    return {
        "allOf": [
            {"type": "object", "properties": {"a": _leaf(rng), "b": True}, "required": ["a"]},
            {"type": "object", "properties": {"a": True, "b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    }


KINDS: dict[str, Callable[[random.Random], Schema]] = {
    "flat": lambda rng: _object(rng, 0),
    "nested": lambda rng: _object(rng, 3),
    "array": lambda rng: _array(rng, 2),
    "enum": lambda rng: {"enum": [*rng.sample(WORDS, 4), rng.randint(-5, 5), None, True, {"a": [1]}]},
    "string": _string,
    "number": _number,
    "tuple": _tuple,
    "union": _union,
    "map": _map,
    "tree": _tree,
    "list": _list,
    "both": _both,
}
