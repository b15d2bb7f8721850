"""Answers that keep to a guide, by the whole engine: jsonschema judges them, plain neighbours do not notice."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from benchmarks.schemas import KINDS, pairs
from flightline.torch_engine.core import guided as module
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    Guide,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from flightline.torch_engine.engine import Engine
from tests.torch_engine.test_engine import PROMPT, run
from tests.torch_engine.test_grammar import HOSTILE
from tests.torch_engine.test_sampled_answers import KINDS as SAMPLING
from tests.torch_engine.test_speculation import eager

Make = Callable[..., Engine]
LONG = {"max_seq_len": 768, "num_kv_blocks": 1024, "block_size": 16, "max_num_tokens": 64}
WILD = SamplingParams(temperature=1.0, top_p=1.0, seed=5)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["x", "yy", "zzz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GUIDE = Guide("json_schema", json.dumps(SCHEMA))


def judge(schema: dict[str, Any], output: RequestOutput) -> bool:
    """Whether the answer ended by itself; if so it must be right."""
    if output.finish_reason is FinishReason.LENGTH:
        return False
    assert output.finish_reason is FinishReason.END_ID
    jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))
    return True


def guided(number: int, guide: Guide = GUIDE, **fields: Any) -> GenerationRequest:
    return GenerationRequest([*PROMPT, 60 + number], **{"max_tokens": 64, "guide": guide, **fields})


@pytest.mark.parametrize("compiled", [False, True])
def test_generated_schemas(make_engine: Make, library: str, compiled: bool) -> None:
    """Each kind several times, sampled in every way; all that end validate, and the compiled sampler says the same."""
    if compiled and not library:
        pytest.skip("no C++ compiler")
    kernels = {"kernel_dir": library, "kernels": "native"} if compiled else {"kernels": "pytorch"}
    made = list(pairs(3 * len(KINDS)))
    asked = [
        GenerationRequest(
            [*PROMPT, 60 + number],
            640,
            dataclasses.replace(SAMPLING[number % len(SAMPLING)], seed=number, temperature=1.0),
            guide=Guide("json_schema", json.dumps(pair.schema)),
        )
        for number, pair in enumerate(made)
    ]
    engine = make_engine(**LONG, **kernels)
    outputs = engine.generate(asked)
    engine.audit()
    ended = [judge(pair.schema, output) for pair, output in zip(made, outputs, strict=True)]
    assert sum(ended) > 0.8 * len(made), "or nothing was shown"
    assert engine.generate(asked[:3])[2].text == outputs[2].text, "from the cache, and alike"


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        (Guide("regex", "[a-f]{3,9}z"), "[a-f]{3,9}z"),
        (Guide("lark", 'start: "<" /[0-9]{2}/ ">"'), "<[0-9]{2}>"),
        (Guide("ebnf_grammar", 'root ::= ("ab" | "cd" [0-9])'), "ab|cd[0-9]"),
        (Guide("regex", "(yes|no)"), "yes|no"),
    ],
)
def test_other_guides(make_engine: Make, guide: Guide, pattern: str) -> None:
    for output in make_engine().generate([guided(n, guide, sampling=WILD) for n in range(3)]):
        assert re.fullmatch(pattern, output.text) and output.finish_reason is FinishReason.END_ID


@pytest.mark.parametrize("compiled", [False, True])
def test_plain_neighbours_do_not_notice(make_engine: Make, library: str, compiled: bool) -> None:
    """Nor do guided ones, in whatever company, chunked, preempted, or from cached blocks."""
    if compiled and not library:
        pytest.skip("no C++ compiler")
    kernels = {"kernel_dir": library, "kernels": "native"} if compiled else {"kernels": "pytorch"}
    plain = [
        GenerationRequest([*PROMPT, 9 + n], 30, kind, end_id=-1, return_log_probs=True)
        for n, kind in enumerate(SAMPLING)
    ]
    held = [guided(n, sampling=dataclasses.replace(WILD, seed=n), return_log_probs=True) for n in range(6)]

    def told(engine: Engine, asked: list[GenerationRequest]) -> list[tuple]:
        outputs = engine.generate(asked)
        engine.audit()
        return [(output.token_ids, output.text, output.finish_reason) for output in outputs]

    expected = [told(make_engine(**kernels), [request])[0] for request in (*plain, *held)]
    engine = make_engine(max_num_tokens=64, **kernels)
    assert told(engine, [*plain, *held]) == expected
    assert told(engine, [*held, *plain]) == expected[len(plain) :] + expected[: len(plain)]
    tight = make_engine(
        max_num_tokens=32, num_kv_blocks=32, batch_scheduler_policy="max_utilization", **kernels
    )
    assert told(tight, [*plain, *held]) == expected
    assert tight.scheduler.num_preemptions > 0
    for text in [text for _, text, _ in expected[len(plain) :]]:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_guesses_leave_guided_requests_alone(make_engine: Make, parrot) -> None:
    asked = [
        GenerationRequest([8, 7] * 6, 40, end_id=-1),
        GenerationRequest([8, 7] * 6, 40, guide=Guide("regex", "(ab|ba){3,9}!"), end_id=-1),
    ]
    settings = {"block_size": 16, "max_num_tokens": 64}
    expected = [output.text for output in make_engine(parrot, **settings).generate(asked)]
    engine = eager(make_engine(parrot, speculation_tokens=4, **settings))
    assert [output.text for output in engine.generate(asked)] == expected
    assert engine.stats.accepted_tokens > 0 and re.fullmatch("(ab|ba){3,9}!", expected[1])


def test_several_answers_to_one_prompt(make_engine: Make) -> None:
    outputs = make_engine().generate(guided(0, sampling=WILD).siblings(5))
    assert all(judge(SCHEMA, output) for output in outputs)
    assert len({output.text for output in outputs}) > 1


@pytest.mark.parametrize("fields", [{"end_id": -1}, {"min_tokens": 50}, {"end_id": -1, "stop_ids": (5,)}])
def test_the_grammar_ends_the_answer(make_engine: Make, fields: dict) -> None:
    """With ``ignore_eos``, before ``min_tokens``, and where ordinary tokens are ends: as late as it can."""
    for output in make_engine().generate([guided(n, sampling=WILD, **fields) for n in range(3)]):
        assert judge(SCHEMA, output)
    (output,) = make_engine().generate([guided(0, Guide("regex", "a{1,9}"), sampling=WILD, **fields)])
    assert re.fullmatch("a{1,9}", output.text) and ("stop_ids" in fields or output.text == "a" * 9)


def test_log_probabilities_are_of_the_model_and_not_of_the_mask(make_engine: Make) -> None:
    (free,) = make_engine().generate([GenerationRequest(PROMPT, 1, top_log_probs=3, end_id=-1)])
    (output,) = make_engine().generate([GenerationRequest(PROMPT, 64, guide=GUIDE, top_log_probs=3)])
    assert output.top_log_probs[0] == free.top_log_probs[0] and judge(SCHEMA, output)


def test_penalties_stop_words_and_bad_words(make_engine: Make) -> None:
    hot = dataclasses.replace(WILD, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5)
    outputs = make_engine().generate([guided(n, sampling=hot, bad_ids=((50,), (51, 52))) for n in range(4)])
    assert all(judge(SCHEMA, output) for output in outputs)
    (cut,) = make_engine().generate([guided(0, stop=(b'"b"',), sampling=WILD)])
    assert cut.finish_reason is FinishReason.STOP and cut.text.startswith("{") and '"b"' not in cut.text


def test_where_nothing_is_allowed_that_request_ends_with_an_error(make_engine: Make) -> None:
    """Not in token 0. The bans leave nothing of what the grammar allows."""
    engine = make_engine()
    banned = tuple((token, float("-inf")) for token in range(engine.info.vocab_size) if token != 70)
    words = tuple((token,) for token, _ in banned)
    engine.add("bias", guided(0, sampling=SamplingParams(logit_bias=banned)))
    engine.add("words", guided(0, bad_ids=words))
    engine.add("plain", GenerationRequest(PROMPT, 8, end_id=-1))
    outputs = run(engine)
    for name, bans in (("bias", "logit_bias"), ("words", "bad_words")):
        error = outputs[name].error
        assert outputs[name].token_ids == [] and outputs[name].finish_reason is FinishReason.ERROR
        assert error.code is Code.INVALID_ARG
        assert error.message.startswith(f"{bans} and guided_decoding_guide leave no token")
    assert len(outputs["plain"].token_ids) == 8


def test_a_guide_that_cannot_be_enforced_is_refused_before_anything_runs(make_engine: Make) -> None:
    engine = make_engine()
    engine.add("bad", guided(0, Guide("json_schema", '{"uniqueItems": true}')))
    engine.add("good", guided(1))
    outputs = run(engine)
    assert outputs["bad"].error.code is Code.INVALID_ARG and "'uniqueItems'" in outputs["bad"].error.message
    assert outputs["bad"].num_output_tokens == 0 and judge(SCHEMA, outputs["good"])


def test_compiling_is_beside_the_steps_and_has_a_time(make_engine: Make, monkeypatch) -> None:
    """Others are answered meanwhile; the one that waits can be cancelled, counts as waiting, and is refused at last."""
    engine = make_engine()
    released, compile_ = threading.Event(), engine.guided.grammars.compile

    def slow(guide: Guide):
        released.wait(60)
        return compile_(guide)

    monkeypatch.setattr(engine.guided.grammars, "compile", slow)
    try:
        engine.add("cancelled", guided(0))
        engine.add("plain", GenerationRequest(PROMPT, 8, end_id=-1))
        outputs: dict[object, RequestOutput] = {}
        while "plain" not in outputs or outputs["plain"].finish_reason is None:
            for key, output in engine.step():
                outputs.setdefault(key, RequestOutput()).extend(output)
        assert engine.stats.waiting_requests == 1 and "cancelled" not in outputs
        assert engine.cancel("cancelled").finish_reason is FinishReason.CANCELLED and not engine.busy
        engine.guided._patience_s = 0.01
        engine.add("late", guided(1))
        late = run(engine)["late"]
        assert late.error.code is Code.UNAVAILABLE and "not compiled after 0.01 s" in late.error.message
    finally:
        released.set()


def test_a_full_queue_counts_those_that_are_compiled(make_engine: Make, monkeypatch) -> None:
    engine = make_engine(max_queue_size=2)
    monkeypatch.setattr(engine.guided._pool, "submit", lambda *work: module.Future())
    for number in range(2):
        engine.add(number, guided(number))
    with pytest.raises(RequestError, match="the queue is full"):
        engine.add("more", GenerationRequest(PROMPT, 8))


def test_hostile_guides_while_others_stream(make_engine: Make) -> None:
    """Every one ends in an answer or an error, and the plain answers are what they always are."""
    plain = [GenerationRequest([*PROMPT, 9 + n], 60, end_id=-1) for n in range(3)]
    expected = [output.token_ids for output in make_engine().generate(plain)]
    engine = make_engine(max_queue_size=0)
    for number, request in enumerate(plain):
        engine.add(number, request)
    for number, (kind, text) in enumerate(HOSTILE):
        engine.add((kind, number), guided(number, Guide(kind, text), max_tokens=20, sampling=WILD))
    outputs = run(engine)
    assert [outputs[number].token_ids for number in range(3)] == expected
    assert all(output.finish_reason is not None for output in outputs.values())
    codes = {output.error.code for output in outputs.values() if output.error}
    assert codes <= {Code.INVALID_ARG}
