"""What ``text_generation`` adds to NVIDIA's tensors, and several answers to one prompt, on a real server."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flightline.supervisor.serve import Server
from flightline.torch_engine.text.stream import TokenBytes
from tests.model_repository.endpoints import Answer, Call, ask, idle, in_pieces, post, stop, wait_until
from tests.serving import CONTEXT

pytestmark = pytest.mark.slow

ENDPOINT, PROMPT = "text_generation", "the dog"
ENDPOINTS = ["ensemble", ENDPOINT, "tensorrt_llm_bls"]
WARM: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "end_id": -1}
EOS = 1


def told(served: Server, max_tokens: int = 12, **inputs: Any) -> Answer:
    return ask(
        served, ENDPOINT, PROMPT, max_tokens, return_token_ids=True, return_finish_reason=True, **inputs
    )


def ids_of(answer: Answer) -> list[int]:
    return np.concatenate([array.ravel() for array in answer.column("token_ids")]).tolist()


def reason_of(answer: Answer) -> str:
    (reason,) = answer.column("finish_reason")
    return reason.item().decode()


def rows_of(answer: Answer, name: str) -> list[list[float]]:
    return [row for array in answer.column(name) for row in array[0].tolist()]


def test_tokens_are_those_of_the_text(served: Server) -> None:
    tokens = TokenBytes.from_dir(served.engine.info.model_dir)
    whole = told(served, seed=3, **WARM)
    streamed = in_pieces(
        served,
        ENDPOINT,
        3,
        prompt=PROMPT,
        max_tokens=12,
        seed=3,
        return_token_ids=True,
        return_finish_reason=True,
        **WARM,
    )
    for answer in (whole, streamed):
        assert len(ids_of(answer)) == 12
        assert tokens.decode(ids_of(answer)) == answer.text
        assert reason_of(answer) == "length"  # and it comes once
    assert ids_of(whole) == ids_of(streamed)


def test_why_an_answer_has_ended(served: Server) -> None:
    free = told(served, 20, end_id=-1)
    ids, third = ids_of(free), ids_of(free)[3]
    first = ids.index(third)
    assert reason_of(free) == "length"
    for ends in ({"end_id": third}, {"end_id": -1, "stop_token_ids": [9, third]}):
        answer = told(served, 20, **ends)
        assert (reason_of(answer), ids_of(answer)) == ("end_id", ids[:first])
    # Where the end token comes in the last place that there was, a count does not tell.
    assert reason_of(told(served, first + 1, end_id=third)) == "end_id"
    word = told(served, 60, end_id=-1).text[20:24]
    assert reason_of(told(served, 60, end_id=-1, stop_words=[word])) == "stop_words"


def test_ignore_eos_and_special_tokens(served: Server) -> None:
    """A bias makes the model say its end token."""
    wanted = {"logit_bias_ids": EOS, "logit_bias_weights": 100.0}
    assert reason_of(ended := told(served, 4, **wanted)) == "end_id" and ids_of(ended) == []
    silent = told(served, 4, ignore_eos=True, **wanted)
    assert (ids_of(silent), silent.text, reason_of(silent)) == ([EOS] * 4, "", "length")
    spelled = told(served, 4, ignore_eos=True, skip_special_tokens=False, **wanted)
    assert (ids_of(spelled), spelled.text) == ([EOS] * 4, "</s>" * 4)
    stopped = told(served, 4, ignore_eos=True, stop_token_ids=EOS, **wanted)
    assert (ids_of(stopped), reason_of(stopped)) == ([], "end_id")


def test_a_bias_bans_a_token(served: Server) -> None:
    free = ids_of(told(served, 8, end_id=-1))
    ban = {"logit_bias_ids": [free[0], free[0] + 1], "logit_bias_weights": [-math.inf, 0.0]}
    assert free[0] not in ids_of(told(served, 8, end_id=-1, **ban))


@pytest.mark.parametrize("stream", [False, True])
def test_top_log_probs(served: Server, stream: bool) -> None:
    vocab = served.engine.info.vocab_size
    answer = told(served, 6, stream=stream, top_logprobs=20, return_log_probs=True, seed=4, **WARM)
    ids, chosen = ids_of(answer), [v for a in answer.column("output_log_probs") for v in a.ravel().tolist()]
    tops, values = rows_of(answer, "top_token_ids"), rows_of(answer, "top_log_probs")
    assert len(ids) == len(chosen) == len(tops) == len(values) == 6
    for token, log_prob, top, row in zip(ids, chosen, tops, values, strict=True):
        assert len(set(top)) == 20 and all(0 <= each < vocab for each in top)
        assert row == sorted(row, reverse=True) and row[0] >= log_prob
        assert 0 < sum(map(math.exp, row)) <= 1 + 1e-5
        assert dict(zip(top, row, strict=True)).get(token, log_prob) == pytest.approx(log_prob, abs=1e-4)
    # A likelihood, not only an order: all that were not told share what is left.
    assert all(row[-1] <= math.log(1 - sum(map(math.exp, row[:-1]))) for row in values)


def test_greedy_takes_the_likeliest(served: Server) -> None:
    answer = told(served, 6, end_id=-1, top_logprobs=1)
    assert [row[0] for row in rows_of(answer, "top_token_ids")] == ids_of(answer)


def test_min_p_keeps_what_is_likely_enough(served: Server) -> None:
    """Beside the likeliest token of each place: at temperature 3 the others would come often."""
    wild = {"temperature": 3.0, "end_id": -1}

    def ratios(seed: int, **more: Any) -> list[float]:
        answer = told(served, 40, seed=seed, top_logprobs=1, return_log_probs=True, **wild, **more)
        chosen = [value for array in answer.column("output_log_probs") for value in array.ravel().tolist()]
        best = [row[0] for row in rows_of(answer, "top_log_probs")]
        # min-p is asked of the distribution that is drawn from, the temperature's.
        return [math.exp((one - top) / 3.0) for one, top in zip(chosen, best, strict=True)]

    kept = [ratio for seed in range(4) for ratio in ratios(seed, min_p=0.5)]
    assert min(kept) >= 0.5 - 1e-3 and min(kept) < 0.95
    assert min(ratios(0, top_p=1.0)) < 0.5


def test_what_was_not_asked_for(served: Server) -> None:
    """An output that is named but not asked for has nothing in it."""
    names = ["text_output", "finish_reason", "token_ids", "top_token_ids", "sequence_index"]
    answer = Call(served, ENDPOINT, {"text_input": PROMPT, "max_tokens": 3}, outputs=names).read()
    assert {output.name for output in answer.responses[-1].get_response().outputs} == set(names)
    assert answer.column("finish_reason")[-1].tolist() == [[b""]] and answer.last("sequence_index") == 0


# Several answers to one prompt --------------------------------------------------------------------


def texts_of(answer: Answer, count: int) -> list[str]:
    texts = [""] * count
    for index, text in zip(answer.column("sequence_index"), answer.texts, strict=True):
        texts[index.item()] += text
    return texts


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_seeded_answers_are_those_of_single_requests(served: Server, endpoint: str) -> None:
    seed = 2**64 - 2
    single = [
        ask(served, endpoint, PROMPT, 16, seed=(seed + index) % 2**64, **WARM).text for index in range(4)
    ]
    assert len(set(single)) == 4
    for stream in (False, True):
        answer = ask(served, endpoint, PROMPT, 16, stream=stream, seed=seed, num_return_sequences=4, **WARM)
        assert texts_of(answer, 4) == single
        assert stream or len(answer.responses) == 4


def test_token_endpoint_answers_several_times(served: Server) -> None:
    inputs = {"input_ids": np.array([[5, 6, 7]], np.int32), "input_lengths": 3, "request_output_len": 6}
    answer = Call(served, "tensorrt_llm", {**inputs, "num_return_sequences": 3, "end_id": -1}).read()
    assert sorted(array.item() for array in answer.column("sequence_index")) == [0, 1, 2]
    assert len({array.tobytes() for array in answer.column("output_ids")}) == 1  # greedy


def test_answers_without_a_seed_differ(served: Server) -> None:
    answer = ask(served, ENDPOINT, PROMPT, 16, num_return_sequences=4, **WARM)
    assert len(set(texts_of(answer, 4))) == 4


def test_answers_share_the_prompts_blocks(served: Server) -> None:
    """Each beside the first starts from the blocks that the first has computed, and says so."""
    wait_until(lambda: idle(served))
    size = served.engine.stats.tokens_per_block
    prompt = "an unheard-of beginning, " * 40
    asked = {
        "num_return_sequences": 4,
        "return_perf_metrics": True,
        "return_num_input_tokens": True,
        "end_id": -1,
    }
    answer = ask(served, ENDPOINT, prompt, 4, seed=1, **asked)
    shared = (answer.last("num_input_tokens") - 1) // size
    reused = dict(
        zip(
            [array.item() for array in answer.column("sequence_index")],
            [array.item() for array in answer.column("kv_cache_reused_blocks")],
            strict=True,
        )
    )
    assert shared > 3 and reused == {0: 0, 1: shared, 2: shared, 3: shared}
    wait_until(lambda: idle(served))


def test_rows_and_answers(served: Server) -> None:
    prompts = np.array([[b"the dog"], [b"x"]], dtype=np.object_)
    inputs = {
        "text_input": prompts,
        "max_tokens": np.full((2, 1), 6, np.int32),
        "num_return_sequences": np.array([[2], [3]], np.int32),
    }
    names = ["text_output", "batch_index", "sequence_index"]
    answer = Call(served, ENDPOINT, inputs, outputs=names).read()
    where = zip(answer.column("batch_index"), answer.column("sequence_index"), strict=True)
    assert sorted((row.item(), index.item()) for row, index in where) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


@pytest.mark.parametrize("endpoint", ["ensemble", ENDPOINT])
def test_going_away_ends_all_answers(served: Server, endpoint: str) -> None:
    wait_until(lambda: idle(served))
    long = {"max_tokens": CONTEXT - 100, "end_id": -1, "stream": True, "num_return_sequences": 3}
    before = served.engine.stats.generated_tokens
    call = Call(served, endpoint, {"text_input": PROMPT, **long}, request_id=f"several-{endpoint}")
    call.next()
    wait_until(lambda: served.engine.stats.active_requests == 3)
    if endpoint == "ensemble":
        stop(served, f"several-{endpoint}")
        call.read()
    else:
        call.close()
    wait_until(lambda: idle(served))
    assert served.engine.stats.generated_tokens - before < long["max_tokens"]  # less than one of them alone


def test_http_streams_several_answers(served: Server) -> None:
    body = {"text_input": PROMPT, "max_tokens": 8, "end_id": -1, "num_return_sequences": 2, "stream": True}
    streamed = post(served, ENDPOINT, body, stream=True)
    texts = ["", ""]
    for event in streamed.bodies:
        texts[event["sequence_index"]] += event["text_output"]
    assert texts == [ask(served, ENDPOINT, PROMPT, 8, end_id=-1).text] * 2
