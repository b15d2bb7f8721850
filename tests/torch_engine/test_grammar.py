"""Guides: what is refused, what the masks allow, and where an answer may end; without a model."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from flightline.torch_engine.core import grammar as module
from flightline.torch_engine.core.grammar import Grammar, Grammars, check, fill, know, take
from flightline.torch_engine.core.request import Guide, InvalidField
from flightline.torch_engine.text.stream import TokenBytes

BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = TokenBytes(
    [b"", b"", b"", *BYTES, b'{"', b'":', b"  "], special={0: b"<s>", 1: b"</s>", 2: b"<tool>"}
)
"""Three special tokens, all bytes, and some pieces."""
VOCAB = 288
"""More than the tokenizer has, and whole words of 32."""
END = 1


def grammar(kind: str, text: str = "", ends: tuple[int, ...] = (END,), min_tokens: int = 0) -> Grammar:
    matcher = Grammars(TOKENS, VOCAB).compile(Guide(kind, text))
    return Grammar(matcher, VOCAB, TOKENS, frozenset(ends), min_tokens)


def schema(value: object) -> str:
    return json.dumps(value)


def allowed(made: Grammar) -> set[int]:
    bits = np.unpackbits(made.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def spell(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def accepts(made: Grammar, text: str) -> bool:
    """Whether the text is a whole answer, byte by byte."""
    for token in spell(text):
        if token not in allowed(made):
            return False
        made.take(token)
    return made.finished or END in allowed(made)


STRING = {"type": "string"}
REFUSED = [
    ("json_schema", "{", "is not JSON"),
    ("json_schema", "[]", "a schema must be an object"),
    ("json_schema", "", "is empty: json_schema needs one"),
    ("json_schema", schema({"name": "x", "schema": {}}), "OpenAI's wrapper"),
    ("json_schema", schema({"type": "array", "uniqueItems": True}), "'uniqueItems' at #"),
    ("json_schema", schema({"properties": {"a": {"not": STRING}}}), "'not' at #/properties/a"),
    ("json_schema", schema({"if": STRING, "then": {}}), "keyword '(if|then)' at #"),
    ("json_schema", schema({"anyOf": [{"contains": {}}]}), "'contains' at #/anyOf/0"),
    ("json_schema", schema({"$defs": {"x": {"nullable": True}}}), r"'nullable' at #/\$defs/x"),
    ("json_schema", schema({"items": {"dependentRequired": {}}}), "'dependentRequired' at #/items"),
    ("json_schema", schema({"propertyNames": {}}), "'propertyNames'"),
    ("json_schema", schema({"unevaluatedProperties": False}), "'unevaluatedProperties'"),
    ("json_schema", schema({"maxlength": 3}), "'maxlength'"),
    ("json_schema", schema({"properties": {"a": {"items": [STRING]}}}), "list of items at #/properties/a"),
    (
        "json_schema",
        schema({"type": "object", "minProperties": 3, "required": ["a"]}),
        "minProperties 3 at #",
    ),
    ("json_schema", schema({**STRING, "format": "iri"}), "the format 'iri' at #, which cannot be enforced"),
    ("json_schema", schema({**STRING, "pattern": "(?=a)b"}), "cannot be enforced: "),
    ("json_schema", schema({"$ref": "https://x.example/y.json"}), "cannot be enforced: "),
    ("json_schema", schema({"oneOf": [STRING, {**STRING, "maxLength": 3}]}), "cannot be enforced: "),
    ("json_schema", schema({"type": "integer", "minimum": 3, "maximum": 2}), "cannot be enforced: "),
    ("json_schema", "[" * 60_000, "brackets in each other"),
    ("json_schema", '{"a":' * 101 + "1" + "}" * 101, "has 101 brackets in each other: at most 100"),
    ("json_schema", schema({"enum": ["x" * 66_000]}), "has more than 65536 bytes"),
    (
        "lark",
        "start: a0\n" + "\n".join(f'a{n}: "a" a{n + 1} | "b"' for n in range(7500)),
        "more than 16384 bytes",
    ),
    (
        "json_schema",
        schema({"patternProperties": {f"^{n}$": {} for n in range(33)}}),
        "more than 32 patternProp",
    ),
    ("json_schema", '{"maximum": 1e999}', "a number beyond all bounds"),
    ("regex", "(", "cannot be enforced: .*regex"),
    ("regex", "(?<=a)b", "cannot be enforced: "),
    ("lark", "start: missing", "cannot be enforced: .*missing"),
    ("ebnf_grammar", "root ::= missing", "missing"),
    ("ebnf_grammar", "root = 'x' (", "guide "),
    ("structural_tag", "3", "is no structural tag"),
    ("structural_tag", schema({"structures": [], "triggers": ["<"]}), "is no structural tag"),
    (
        "structural_tag",
        schema({"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["["]}),
        "begins with none of the triggers",
    ),
    ("structural_tag", schema({"format": {"type": "or", "elements": []}}), "format 'or'"),
    ("xml", "x", "guide_type is 'xml': it must be one of json, json_schema"),
]


@pytest.mark.parametrize(("kind", "text", "says"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(kind: str, text: str, says: str) -> None:
    with pytest.raises(InvalidField, match=says) as caught:
        check(Guide(kind, text))
    assert len(caught.value.message) < 600 and "\n" not in caught.value.message
    with pytest.raises(InvalidField):
        Grammars(TOKENS, VOCAB).compile(Guide(kind, text))


def test_special_tokens_hide_no_mistake() -> None:
    """A model's own are not known here, by id or by name; what else is wrong is seen all the same."""
    for marker in ("<[300]>", "<|call|>", "<[5-7,300]>"):
        check(Guide("lark", f'start: {marker} "<[300]>" rest\nrest: %json {{"const": "a <[9000]> \\" <b>"}}'))
        with pytest.raises(InvalidField, match="Unimplemented keys"):
            check(Guide("lark", f'start: {marker} rest\nrest: %json {{"not": {{"type": "string"}}}}'))


def test_remarks_and_what_asks_for_nothing_pass() -> None:
    """What pydantic and OpenAPI write beside what counts."""
    text = schema(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "T",
            "type": "object",
            "x-order": 3,
            "properties": {"a": {"type": "array", "items": STRING, "uniqueItems": False, "default": ["not"]}},
            "required": ["a"],
        }
    )
    check(Guide("json_schema", text))


def test_formats_are_enforced_or_refused_or_none() -> None:
    """Those that JSON Schema does not define ask for nothing, of whichever type."""
    for name, right, wrong in (
        ("date", '"2024-02-29"', '"yesterday"'),
        ("ipv4", '"127.0.0.1"', '"localhost"'),
        ("password", '"ü"', "1"),
    ):
        made = schema({"type": "string", "format": name})
        assert accepts(grammar("json_schema", made), right) and not accepts(
            grammar("json_schema", made), wrong
        )
    for name in module.FORMATS:
        check(Guide("json_schema", schema({"type": "string", "format": name})))
    for name in module.OTHER_FORMATS:
        with pytest.raises(InvalidField, match=f"has the format '{name}' at #/items.*say a pattern"):
            check(
                Guide("json_schema", schema({"type": "array", "items": {"type": "string", "format": name}}))
            )


OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TAG = {"structures": [{"begin": "<f=x>", "schema": OBJECT, "end": "</f>"}], "triggers": ["<f="]}
TRIGGERED = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f="],
        "tags": [
            {"begin": "<f=x>", "content": {"type": "json_schema", "json_schema": OBJECT}, "end": "</f>"}
        ],
        "at_least_one": True,
        "stop_after_first": True,
    },
}
GBNF = 'root ::= "yes" | "no " number\nnumber ::= [0-9]+'


@pytest.mark.parametrize(
    ("kind", "text", "right", "wrong"),
    [
        ("json", "", ['{"a": [1, "x"]}', "[2025]"], ["1", '"x"', "{", "x", "{]"]),
        ("json_schema", schema(OBJECT), ['{"a":1}', '{\n  "a": 12\n}'], ['{"a":"1"}', "{}", '{"a":1,"b":2}', "1"]),
        ("json_schema", schema({"enum": ["é", "日本", 3]}), ['"é"', '"日本"', "3"], ["é", '"e"', "4"]),
        ("regex", "[a-c]{2,3}", ["ab", "abc"], ["a", "abcd", "xab"]),
        ("ebnf_grammar", GBNF, ["yes", "no 12"], ["no", "no ", "maybe"]),
        ("lark", 'start: "a" /[0-9]+/', ["a1"], ["a", "1"]),
        ("structural_tag", schema(TAG), ["", "so <f=x>{}", 'so <f=x>{"a": 1}</f> and <b>'][::2], ["<f=y>", "<f=x>{}"]),
        ("structural_tag", schema(TRIGGERED), ['hm <f=x>{"a":1}</f>'], ["", "hm", '<f=x>{"a":1}</f>!']),
    ],
)  # fmt: skip
def test_what_is_right_and_what_is_wrong(kind: str, text: str, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert accepts(grammar(kind, text), answer), answer
    for answer in wrong:
        assert not accepts(grammar(kind, text), answer), answer


@pytest.mark.parametrize("options", [{}, {"x-guidance": {"whitespace_pattern": r"[ \n]*", "lenient": True}}])
def test_white_space_is_bounded_whatever_the_schema_says(options: dict) -> None:
    text = schema({**OBJECT, **options})
    for blank in (" ", "\n", "\n" + " " * 24):
        assert accepts(grammar("json_schema", text), f'{{{blank}"a":1}}')
    for blank in ("  ", "\n\n", "\n" + " " * 25, " \n", "\t"):
        assert not accepts(grammar("json_schema", text), f'{{{blank}"a":1}}'), repr(blank)
    assert not accepts(grammar("json_schema", text), ' {"a":1}')
    assert not accepts(grammar("structural_tag", schema(TAG)), '<f=x>{  "a":1}</f>')


def test_a_schemas_own_options_are_not_heard() -> None:
    with pytest.raises(InvalidField, match="uniqueItems"):
        check(Guide("json_schema", schema({"uniqueItems": True, "x-guidance": {"lenient": True}})))
    text = schema({"type": "array", "items": {"type": "null"}, "x-guidance": {"item_separator": ";"}})
    assert accepts(grammar("json_schema", text), "[null,null]")


def test_special_tokens_are_no_text() -> None:
    """Neither by their names nor as padding; a Lark grammar can ask for one."""
    everything = allowed(grammar("regex", r"(.|\n)*", ends=()))
    assert everything <= set(range(3, len(TOKENS))) and spell("<")[0] in everything
    assert not accepts(grammar("regex", "x"), "x</s>")
    check(Guide("lark", "start: <tool> /[0-9]/"))  # nobody knows the model there
    with pytest.raises(InvalidField, match="unknown special token"):
        grammar("lark", "start: <nobody> /[0-9]/")
    named = grammar("lark", "start: <tool> /[0-9]/")
    assert allowed(named) == {2}
    named.take(2)
    assert allowed(named) == set(spell("0123456789"))


def test_an_answer_ends_where_the_grammar_lets_it() -> None:
    made = grammar("regex", "a+", ends=(END, 2))
    assert allowed(made) == set(spell("a"))
    made.take(spell("a")[0])
    assert allowed(made) == {*spell("a"), END, 2} and not made.finished
    whole = grammar("regex", "ab")
    for token in spell("ab"):
        assert not whole.finished and allowed(whole) == {token}
        whole.take(token)
    assert whole.finished and allowed(whole) == {END}, "all of its ends, and nothing else"


def test_a_token_that_ends_the_answer_is_none_of_its_text() -> None:
    """A stop token with a text: not before the grammar's end, though the grammar allows that text."""
    a, b = spell("ab")
    made = grammar("regex", "[ab]{2,3}", ends=(END, b))
    assert allowed(made) == {a}
    made.take(a)
    assert allowed(made) == {a}
    made.take(a)
    assert allowed(made) == {a, b, END}


def test_min_tokens_holds_as_long_as_the_grammar_goes_on() -> None:
    (a,) = spell("a")
    made = grammar("regex", "a{1,3}", min_tokens=9)
    for _ in range(2):
        assert allowed(made) == {a}
        made.take(a)
    assert allowed(made) == {a}
    made.take(a)
    assert made.finished and allowed(made) == {END}


def test_a_vocabulary_that_cannot_spell_it() -> None:
    tokens = TokenBytes([b"", b"a"])
    made = Grammar(Grammars(tokens, 2).compile(Guide("regex", "a?b")), 2, tokens, frozenset({0}))
    made.take(1)
    assert allowed(made) == set()
    assert made.problem == "the grammar cannot go on: no token of this model can follow"


@pytest.mark.parametrize("vocab", [259, 287, 288, 289, 320])
def test_masks_cover_any_vocabulary(vocab: int) -> None:
    """Padded or cut, on and beside the edge of a word; the rows that a GPU gets are the same."""
    made = [
        Grammar(Grammars(TOKENS, vocab).compile(Guide("regex", r"(.|\n)*")), vocab, TOKENS, frozenset({END}))
    ]
    made += [Grammar(Grammars(TOKENS, vocab).compile(Guide("regex", "x")), vocab, TOKENS, frozenset({END}))]
    rows = np.full((2, Grammar.words(vocab)), 0xFFFFFFFF, dtype=np.uint32)
    fill(made, rows)()
    for one, row in zip(made, rows, strict=True):
        assert row.tolist() == one.mask().tolist()
        assert max(allowed(one)) < min(vocab, len(TOKENS))
    assert allowed(made[0]) >= {END, *range(131, min(vocab, 131))} and allowed(made[1]) == set(spell("x"))


WALKED = [
    ("json_schema", schema({"type": "object", "properties": {"a": {"type": "integer"}, "b": STRING}})),
    ("regex", "(ab|ba){0,9}!?"),
    ("regex", "a?b{2}"),
    ("json", ""),
]


def test_several_answers_at_once_are_as_each_alone() -> None:
    """Their tokens and their masks, from the first to the last: where they may end, must, and cannot go on."""
    rng = np.random.default_rng(0)
    least = [0, 5] * len(WALKED)
    alone, together, known = (
        [
            grammar(*guide, ends=(END, spell("b")[0]), min_tokens=tokens)
            for guide, tokens in zip(WALKED * 2, least, strict=True)
        ]
        for _ in range(3)
    )
    ended = 0
    for _ in range(40):
        rows = np.full((len(alone), Grammar.words(VOCAB)), 0xFFFFFFFF, dtype=np.uint32)
        fill(together, rows)()
        assert rows.tolist() == [one.mask().tolist() for one in alone]
        assert not any(one._known for one in known)
        know(known)
        assert all(one._known for one in known)
        assert rows.tolist() == [one.mask().tolist() for one in known]
        choices = [sorted(allowed(one) - {END, spell("b")[0]}) for one in alone]
        # Every answer goes on with something, right or wrong, until it has ended.
        wild = rng.random() < 0.1
        tokens = [int(rng.choice(spell("xyz") if wild or not choice else choice)) for choice in choices]
        for one, token in zip(alone, tokens, strict=True):
            one.take(token)
        for several in (together, known):
            take(list(zip(several, tokens, strict=True)))
            assert [(one.finished, one.problem) for one in several] == [
                (one.finished, one.problem) for one in alone
            ]
        ended += sum(bool(one.finished or one.problem) for one in alone)
    assert 0 < ended < 40 * len(alone)


CHAIN = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(1700)}
HOSTILE = [
    ("regex", "^[a-z]{1,5000}$"),
    ("regex", "((a{0,99}){0,99}){0,99}x"),
    ("regex", "(a|aa)+b" * 500),
    ("json_schema", schema({"type": "string", "maxLength": 5000})),
    ("json_schema", schema({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"})),
    ("json_schema", schema({"enum": [f"word {n}" for n in range(5000)]})),
    ("json_schema", schema({"type": "object", "properties": {f"p{n}": STRING for n in range(400)}})),
    ("json_schema", schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
    ("json_schema", schema({"allOf": [{"anyOf": [{"minimum": n}, {"maximum": -n}]} for n in range(12)]})),
    ("lark", "start: a\na: a a | a | \"x\""),
    ("lark", "start: " + "(" * 5000 + '"x"' + ")" * 5000),
    ("lark", "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(1100)) + '\na1100: "x"'),
    ("regex", "a?" * 8000),
    ("json_schema", schema({"patternProperties": {f"^w{n}$": {} for n in range(32)}})),
    ("json_schema", schema({"$defs": CHAIN, "$ref": "#/$defs/0"})),
    ("lark", "\n".join(["start: r0", *(f"r{n}: r{n + 1} r{n + 1}" for n in range(40)), 'r40: "x"'])),
    ("ebnf_grammar", "root ::= " + "(" * 900 + '"x"' + ")" * 900),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), HOSTILE)
def test_hostile_guides_end_in_a_grammar_or_a_refusal(kind: str, text: str) -> None:
    """And what they make goes on within the limits, or says that it cannot."""
    try:
        made = grammar(kind, text)
    except InvalidField:
        return
    rng = np.random.default_rng(0)
    for _ in range(60):
        choice = sorted(allowed(made) - {END})
        if made.problem or made.finished or not choice:
            break
        made.take(int(rng.choice(choice)))


def test_other_threads_run_while_a_guide_is_compiled() -> None:
    """The library lets go of the interpreter's lock: this thread counts meanwhile."""
    text = schema({"type": "object", "properties": {f"p{n}": STRING for n in range(1200)}})
    work = threading.Thread(target=check, args=(Guide("json_schema", text),))
    work.start()
    turns = 0
    while work.is_alive():
        time.sleep(0)
        turns += 1
    assert turns > 10


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_GRAMMARS", 3)
    made = Grammars(TOKENS, VOCAB)
    guides = [Guide("regex", f"a{number}") for number in range(4)]
    for guide in guides:
        made.compile(guide)
    assert [made.get(guide) is not None for guide in guides] == [False, True, True, True]
    monkeypatch.setattr(module, "CACHED_BYTES", 5)
    made.compile(Guide("regex", "abc"))
    assert made.get(Guide("regex", "abc")) is not None and made.get(guides[2]) is None


def test_answers_of_one_guide_are_apart() -> None:
    made = Grammars(TOKENS, VOCAB)
    first, second = (
        Grammar(made.compile(Guide("regex", "ab")), VOCAB, TOKENS, frozenset({END})) for _ in range(2)
    )
    first.take(spell("a")[0])
    assert allowed(first) == set(spell("b")) and allowed(second) == set(spell("a"))
