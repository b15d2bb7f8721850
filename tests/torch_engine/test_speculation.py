from __future__ import annotations

import random

import pytest

from torch_engine.request import GenerationRequest, SamplingParams
from torch_engine.speculation import PromptLookup


def test_guesses_what_followed_the_longest_match_last() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]
    assert lookup.guess(tokens, 3) == [4, 5, 9]  # 1 2 3 before the later 2 3
    tokens += [6, 2, 3]
    assert lookup.guess(tokens, 2) == [6, 2]  # only 2 3, whose last follower is 6
    assert lookup.guess([*tokens, 99], 2) == []
    assert PromptLookup().guess([5], 4) == []


def prompts(count: int) -> list[list[int]]:
    """Of a few tokens only, so that much repeats."""
    chance = random.Random(3)
    return [[chance.randrange(3, 9) for _ in range(chance.randrange(4, 40))] for _ in range(count)]


def outputs(engine, requests: list[GenerationRequest]) -> list[list[int]]:
    whole = engine.generate(requests)
    engine.audit()
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    return [output.token_ids for output in whole]


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("blocks", [12, 60])
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
    engine = make_engine(parrot, speculation_tokens=4, **settings)
    for _ in range(2):
        assert outputs(engine, requests) == expected
    stats = engine.stats
    assert stats.guessed_tokens > stats.accepted_tokens > 20
    assert expected[: len(plain)] == plain


def test_right_guesses_save_steps(make_engine, parrot) -> None:
    def steps(guesses: int) -> int:
        engine = make_engine(parrot, speculation_tokens=guesses, max_num_tokens=48, block_size=16)
        outputs(engine, [GenerationRequest(prompts(1)[0], 80, end_id=-1)])
        assert engine.stats.generated_tokens == 80
        return engine.stats.iterations

    assert steps(5) <= steps(0) - 15
