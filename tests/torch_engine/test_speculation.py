from __future__ import annotations

import random

import pytest

from flightline.torch_engine.core.request import GenerationRequest, SamplingParams
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.core.speculation import MOST_ROWS, READ, PromptLookup, Speculation
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.text.stream import TokenBytes

WORDS = TokenBytes([b"a"])
PHRASE = list(range(10, 20))


def eager(engine: Engine) -> Engine:
    """Guesses wherever a lookup has been right once, whatever it costs."""
    engine.scheduler.speculation = Speculation(engine.config.speculation_tokens, row_cost=0.0, margin=0.0)
    return engine


def sequence(prompt: list[int], output: list[int], max_tokens: int = 100) -> Sequence:
    made = Sequence.start(0, GenerationRequest(prompt, max_tokens), (), WORDS, 1)
    made.tokens += output
    return made


# The lookup --------------------------------------------------------------------------------------------------


def test_expects_what_followed_the_longest_common_text() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]
    lookup = PromptLookup(len(tokens))

    def guesses(count: int) -> list[int]:
        lookup.read(tokens, 99)
        return lookup.guess(tokens, count)

    assert guesses(3) == [4, 5, 9]  # 1 2 3 before the later 2 3
    tokens += [6, 2, 3]
    assert lookup.guess(tokens, 2) == []  # not read yet
    assert guesses(2) == [6, 2]  # only 2 3, whose last follower is 6
    tokens.append(99)
    assert guesses(2) == []
    tokens += [50, 51, 50, 51]
    assert guesses(5) == [50, 51, 50, 51, 50]  # and on and on


def test_trusts_a_lookup_as_far_as_it_was_right_about_the_output() -> None:
    def trust(prompt: list[int], output: list[int], pieces: int = 99) -> float:
        lookup, tokens = PromptLookup(len(prompt)), prompt + output
        for _ in tokens:
            lookup.read(tokens, pieces)
        return lookup.trust

    assert trust(PHRASE * 4, []) == 0
    assert trust(PHRASE, PHRASE[:2]) == 0
    known = [trust(PHRASE, PHRASE[:count]) for count in range(2, 10)]
    assert known == sorted(known) and known[-1] > 0.8
    assert trust(PHRASE, [*PHRASE[:9], 5]) == pytest.approx(0.75 * known[-1])
    assert trust(PHRASE, [*PHRASE[:9], 5, 6, 7, 8]) == trust(PHRASE, [*PHRASE[:9], 5]), "nothing was expected"
    for pieces in (1, 3):
        assert trust(PHRASE, PHRASE[:7], pieces) == trust(PHRASE, PHRASE[:7])


# The plan ----------------------------------------------------------------------------------------------------


def test_guesses_where_they_are_likely_to_pay() -> None:
    sure, silent = (lambda: sequence(PHRASE, PHRASE * 2)), (lambda: sequence(PHRASE, [5]))
    one = sure()
    assert Speculation(4, row_cost=0.01).plan([one], 99) == {one: PHRASE[:4]}
    assert Speculation(4, row_cost=0.01).plan([one], 3) == {one: PHRASE[:3]}
    assert Speculation(4, row_cost=0.01).plan([silent()], 99) == {}
    some = [sure() for _ in range(8)]
    plans = Speculation(4, row_cost=0.01).plan([*some, *(silent() for _ in range(8))], 99)
    assert plans == dict.fromkeys(some, PHRASE[:4])
    assert Speculation(4, row_cost=0.01).plan([one, *(silent() for _ in range(15))], 99) == {}, (
        "too few for 16"
    )
    few = [*some[:3], *(silent() for _ in range(13))]
    assert len(Speculation(4, row_cost=0.01).plan(few, 99)) == 3
    assert Speculation(4, row_cost=3 / 16).plan(few, 99) == {}, "a row takes as long as 3/4 of a token"
    assert Speculation(4, row_cost=2.0).plan(some, 99) == {}, "a row costs as much as a token brings"


def test_guesses_keep_to_the_rows_of_a_step_and_to_the_length_of_the_output() -> None:
    many = [sequence(PHRASE, PHRASE * 2) for _ in range(MOST_ROWS - 10)]
    for one in many:
        one.lookup.read(one.tokens, 99)
    plans = Speculation(4, row_cost=0.0, margin=-1.0).plan(many, 999)
    assert sum(map(len, plans.values())) == 10
    assert Speculation(4, row_cost=0.0, margin=-1.0).plan(many + many[:10], 999) == {}
    last = [sequence(PHRASE, PHRASE * 2, max_tokens=count) for count in (21, 22, 23)]
    for one, count in zip(last, (0, 1, 2), strict=True):
        assert [len(each) for each in Speculation(4, 0.0, 0.0).plan([one], 99).values()] == [count][:count]


def test_a_token_in_flight_is_expected_first() -> None:
    one = sequence(PHRASE, PHRASE * 2)
    one.num_pending = 1
    assert Speculation(4, row_cost=0.01).plan([one], 99) == {one: PHRASE[1:5]}


def test_a_long_prompt_is_read_over_many_steps() -> None:
    speculation = Speculation(4, row_cost=0.0, margin=0.0)
    prompt = random.Random(1).choices(range(1000), k=20 * READ) + PHRASE
    one = sequence(prompt, PHRASE)
    steps = 0
    while not speculation.plan([one], 99):
        steps += 1
    assert steps == 20


# The engine --------------------------------------------------------------------------------------------------


def prompts(count: int) -> list[list[int]]:
    """Of a few tokens only, so that much repeats."""
    chance = random.Random(3)
    return [[chance.randrange(3, 9) for _ in range(chance.randrange(4, 40))] for _ in range(count)]


def outputs(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    whole = engine.generate(requests)
    engine.audit()
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    return [output.token_ids for output in whole]


@pytest.mark.parametrize(("blocks", "reuse"), [(12, False), (12, True), (60, True)])
def test_outputs_stay_what_they_are(make_engine, parrot, blocks: int, reuse: bool) -> None:
    """Also with too few blocks, with neighbours that are sampled, and with ends in the middle of right guesses."""
    settings = {
        "num_kv_blocks": blocks, "enable_kv_cache_reuse": reuse, "batch_scheduler_policy": "max_utilization",
        "max_num_tokens": 48, "block_size": 16,
    }  # fmt: skip
    requests = [GenerationRequest(prompt, 70, end_id=-1) for prompt in prompts(6)]
    plain = outputs(make_engine(parrot, **settings), requests)
    requests.append(GenerationRequest([4, 5, 6], 20, SamplingParams(top_k=5, seed=1), end_id=-1))
    requests += [
        GenerationRequest(request.prompt_ids, 70, end_id=tokens[50])
        for request, tokens in zip(requests, plain, strict=False)
    ]
    expected = outputs(make_engine(parrot, **settings), requests)
    engine = eager(make_engine(parrot, speculation_tokens=4, **settings))
    for _ in range(2):
        assert outputs(engine, requests) == expected
    stats = engine.stats
    assert stats.guessed_tokens > stats.accepted_tokens > 20
    assert expected[: len(plain)] == plain


def test_right_guesses_save_steps(make_engine, parrot) -> None:
    engine = make_engine(parrot, speculation_tokens=5, max_num_tokens=48, block_size=16)
    (output,) = engine.generate([GenerationRequest([8, 7] * 5, 80, end_id=-1)])
    stats, metrics = engine.stats, output.metrics
    assert stats.generated_tokens == 80
    assert stats.iterations == 80 - stats.accepted_tokens <= 30
    told = metrics.total_draft_tokens, metrics.total_accepted_draft_tokens
    assert told == (stats.guessed_tokens, stats.accepted_tokens)
    assert metrics.acceptance_rate == stats.accepted_tokens / stats.guessed_tokens > 0.5


def test_text_that_does_not_repeat_itself_is_not_guessed(make_engine) -> None:
    engine = make_engine(speculation_tokens=5, block_size=16)
    requests = [
        GenerationRequest(
            [5, 6, 7, number], 60, SamplingParams(temperature=2.0, top_p=1.0, seed=number), end_id=-1
        )
        for number in range(3)
    ]
    outputs(engine, requests)
    assert engine.stats.guessed_tokens == 0
