"""Both endpoints, with the conventions of NVIDIA's clients, on a real server."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from flightline.model_repository.shared import words
from flightline.supervisor.serve import Server
from flightline.torch_engine.text.stream import TokenBytes
from tests.model_repository.endpoints import (
    Answer,
    Call,
    GrpcError,
    ask,
    idle,
    in_pieces,
    post,
    stop,
    wait_until,
)

pytestmark = pytest.mark.slow

ENDPOINTS = ["ensemble", "text_generation"]
MODELS = [*ENDPOINTS, "hf_baseline"]
WILD = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "end_id": -1}
"""Random bytes from a random model: every kind of broken and whole UTF-8."""


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ENDPOINTS)
def endpoint(request: pytest.FixtureRequest) -> str:
    return request.param


def test_curl_line_of_the_readme(served: Server, model: str) -> None:
    body = {"text_input": "What is ML?", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    answer = post(served, model, body)
    assert answer.status == 200
    assert len(answer.bodies) == 1
    alone = ask(served, model, "What is ML?", 20).text
    # NVIDIA's default puts the prompt first.
    assert answer.text == ("What is ML?" + alone if model == "ensemble" else alone)


def test_generate_stream_adds_up_to_generate(served: Server, model: str) -> None:
    body = {"text_input": "a piece of text", "max_tokens": 100, "end_id": -1, "exclude_input_in_output": True}
    whole = post(served, model, body)

    def pieces() -> int:
        streamed = post(served, model, {**body, "stream": True}, stream=True)
        assert streamed.text == whole.text
        return len(streamed.bodies)

    assert any(pieces() > 1 for _ in range(20))  # where the machine is busy, tokens travel together


@pytest.mark.parametrize("seed", range(3))
def test_streamed_text_is_the_whole_text(served: Server, model: str, seed: int) -> None:
    """Also where tokens are pieces of characters; ``Answer.texts`` decodes each chunk strictly."""
    inputs: dict[str, Any] = {"prompt": "the 日本 dog 👩‍🚀", "max_tokens": 120, "seed": seed, **WILD}
    whole = ask(served, model, **inputs)
    streamed = in_pieces(served, model, 3, **inputs)
    assert len(whole.responses) == 1
    assert streamed.text == whole.text


def test_endpoints_agree(served: Server) -> None:
    for seed in range(5):
        texts = {ask(served, endpoint, "and then", 60, seed=seed, **WILD).text for endpoint in ENDPOINTS}
        assert len(texts) == 1


def test_greedy_text_is_transformers(served: Server, endpoint: str) -> None:
    ours = ask(served, endpoint, "the quick brown", 24).text
    assert ours == ask(served, "hf_baseline", "the quick brown", 24).text


def test_the_prompt_comes_first_when_it_is_not_excluded(served: Server, model: str) -> None:
    inputs = {"prompt": "the dog", "max_tokens": 30, "exclude_input_in_output": False}
    alone = ask(served, model, "the dog", 30).text
    whole = ask(served, model, **inputs)
    streamed = ask(served, model, stream=True, **inputs)
    assert whole.text == "the dog" + alone
    # NVIDIA's never repeats the prompt of a stream.
    assert streamed.text == (alone if model == "ensemble" else whole.text)


def test_stop_words_never_leak(served: Server, model: str) -> None:
    """The stop word spans tokens, and is found wherever tokens end."""
    text = ask(served, model, "the dog", 60, end_id=-1).text
    word = text[20:24]
    expected = text[: text.index(word)]
    inputs = {"prompt": "the dog", "max_tokens": 60, "end_id": -1, "stop_words": ["not in there", word]}
    assert ask(served, model, **inputs).text == expected
    streamed = ask(served, model, stream=True, **inputs)
    assert streamed.text == expected
    assert not any(word[0] in text and word in text for text in streamed.texts)


def test_stop_words_as_a_json_list(served: Server, model: str) -> None:
    text = ask(served, model, "the dog", 60, end_id=-1).text
    word = text[20:24]
    assert '"' not in word
    answer = ask(served, model, "the dog", 60, end_id=-1, stop_words=f'["{word}"]')
    # To NVIDIA's it is a word that begins with a bracket.
    assert answer.text == (text if model == "ensemble" else text[: text.index(word)])


def test_bad_words_do_not_appear(served: Server, model: str) -> None:
    text = ask(served, model, "the dog", 40, end_id=-1).text
    word = max(re.findall("[a-z]+", text), key=len)
    assert len(word) > 2
    assert word not in ask(served, model, "the dog", 40, end_id=-1, bad_words=[word]).text


def test_counts_times_and_log_probs(served: Server, model: str) -> None:
    wanted = (
        "return_num_input_tokens",
        "return_num_output_tokens",
        "return_perf_metrics",
        "return_log_probs",
    )
    for stream in (False, True):
        answer = ask(served, model, "the dog", 10, end_id=-1, stream=stream, **dict.fromkeys(wanted, True))
        assert answer.num_output_tokens(model) == 10
        assert answer.last("num_input_tokens") == len(prompt_ids(served, "the dog"))
        times = ("arrival", "first_scheduled", "first_token", "last_token")
        stamps = [answer.last(f"{name}_time_ns") for name in times]
        assert stamps == sorted(stamps)
        assert stamps[0] > 0
        log_probs = np.concatenate([array.ravel() for array in answer.column("output_log_probs")])
        assert len(log_probs) == 10
        assert log_probs.sum() == pytest.approx(answer.last("cum_log_probs"), rel=1e-3)
        assert answer.column("output_log_probs")[0].shape[:2] == (1, 1)


def test_nothing_is_sent_that_was_not_asked_for(served: Server) -> None:
    (response,) = ask(served, "text_generation").responses
    assert [output.name for output in response.get_response().outputs] == ["text_output"]


def test_times_come_once(served: Server) -> None:
    """They are of the end: zeros before it would cost the server a fifth of its work on a response."""
    asked = {"max_tokens": 400, "end_id": -1, "return_perf_metrics": True}
    answer = in_pieces(served, "text_generation", 3, prompt="the dog", **asked)
    assert len(answer.column("last_token_time_ns")) == len(answer.column("kv_cache_reused_blocks")) == 1
    assert answer.last("last_token_time_ns") > 0


def test_named_outputs_are_all_there(served: Server, model: str) -> None:
    names = ["text_output", "num_output_tokens", "cum_log_probs", "sequence_index", "context_logits"]
    inputs = {"text_input": "the dog", "max_tokens": 3, "stream": True, "return_num_output_tokens": True}
    answer = Call(served, model, inputs, outputs=names).read()
    for response in answer.responses:
        assert {output.name for output in response.get_response().outputs} == set(names)


def test_min_tokens_and_end_id(served: Server, model: str) -> None:
    first = ask(served, model, "the dog", 1, return_log_probs=True, exclude_input_in_output=True)
    assert first.text
    free = ask(served, model, "the dog", 20, return_num_output_tokens=True, end_id=-1)
    assert free.num_output_tokens(model) == 20
    # The first token that the model would choose becomes the end: nothing is left, unless it must go on.
    end = generated_ids(served, "the dog", 1)[0]
    answer = ask(served, model, "the dog", 20, end_id=end, return_num_output_tokens=True)
    assert (answer.text, answer.num_output_tokens(model)) == ("", 0)
    longer = ask(served, model, "the dog", 20, end_id=end, min_tokens=5, return_num_output_tokens=True)
    assert longer.num_output_tokens(model) >= 5


def test_seeds(served: Server, endpoint: str) -> None:
    def sample(seed: int) -> str:
        return ask(served, endpoint, "the dog", 20, seed=seed, temperature=1.0, top_k=50).text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_rows_of_a_batch_answer_for_themselves(served: Server, model: str) -> None:
    if model == "hf_baseline":
        pytest.skip("its max_batch_size is 1")
    prompts = ["the dog", "a token is a piece", "x"]
    texts = np.array([[prompt.encode()] for prompt in prompts], dtype=np.object_)
    lengths = [8, 16, 4]
    inputs = {
        "text_input": texts,
        "max_tokens": np.array([lengths], np.int32).T,
        "stream": np.full((3, 1), True),
    }
    answer = Call(served, model, inputs, outputs=["text_output", "batch_index"]).read()
    rows = ["", "", ""]
    for index, text in zip(answer.column("batch_index"), answer.texts, strict=True):
        rows[index.item()] += text
    assert rows == [ask(served, model, prompt, n).text for prompt, n in zip(prompts, lengths, strict=True)]


def prompt_ids(served: Server, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{served.engine.info.model_dir}/tokenizer.json").encode(text).ids


def tokens(served: Server, prompt: str, max_tokens: int, request_id: str = "", **inputs: Any) -> Answer:
    """Straight to tensorrt_llm, as NVIDIA's inflight_batcher_llm client does."""
    ids = np.array([prompt_ids(served, prompt)], dtype=np.int32)
    needed = {"input_ids": ids, "input_lengths": ids.shape[1], "request_output_len": max_tokens}
    inputs = {**needed, "exclude_input_in_output": True, **inputs}
    return Call(served, "tensorrt_llm", inputs, request_id).read()


def generated_ids(served: Server, prompt: str, max_tokens: int, **inputs: Any) -> list[int]:
    answer = tokens(served, prompt, max_tokens, **inputs)
    return np.concatenate([array.ravel() for array in answer.column("output_ids")]).tolist()


def test_token_endpoint(served: Server) -> None:
    for stream in (False, True):
        answer = tokens(served, "the dog", 12, streaming=stream)
        ids = np.concatenate([array.ravel() for array in answer.column("output_ids")])
        lengths = [array.item() for array in answer.column("sequence_length")]
        assert answer.responses[0].as_numpy("output_ids").ndim == 3
        assert sum(lengths) == len(ids)
        decoded = TokenBytes.from_dir(served.engine.info.model_dir).decode(ids.tolist())
        assert decoded == ask(served, "text_generation", "the dog", 12).text
    whole = tokens(served, "the dog", 12, exclude_input_in_output=False).column("output_ids")[0]
    assert whole.ravel().tolist()[: len(prompt_ids(served, "the dog"))] == prompt_ids(served, "the dog")


def test_stop_words_as_tokens(served: Server) -> None:
    ids = generated_ids(served, "the dog", 30, end_id=-1)
    stopped = generated_ids(served, "the dog", 30, end_id=-1, stop_words_list=words.pack([[ids[10:12]]]))
    assert stopped == ids[: next(at for at in range(30) if ids[at : at + 2] == ids[10:12])]


def test_metrics_have_nvidias_names(served: Server) -> None:
    import urllib.request

    settings = served.settings
    with urllib.request.urlopen(f"http://{settings.host}:{settings.metrics_port}/metrics") as response:
        text = response.read().decode()
    for family in (
        "request_metrics",
        "kv_cache_block_metrics",
        "inflight_batcher_metrics",
        "general_metrics",
    ):
        assert f"nv_trt_llm_{family}{{" in text
    label = 'kv_cache_block_type="max",model="tensorrt_llm",version="1"'
    assert f"nv_trt_llm_kv_cache_block_metrics{{{label}}} {served.engine.stats.kv_blocks_max}" in text


def test_many_streams_at_once_and_every_one_ends(served: Server) -> None:
    """Random lengths, cancellations and bad requests mixed; no KV block is lost."""
    wait_until(lambda: idle(served))
    rng = np.random.default_rng(0)

    def one(index: int) -> str:
        endpoint, kind = ENDPOINTS[index % 2], index % 5
        inputs = {"text_input": f"{index} the dog", "max_tokens": int(rng.integers(1, 100)), "stream": True}
        if kind == 3:
            inputs["temperature"] = float("nan")
        call = Call(served, endpoint, {**inputs, "end_id": -1}, request_id=f"mixed-{index}")
        if kind == 4:
            call.next()
            if endpoint == "text_generation":
                call.close()
                return "cancelled"
            stop(served, f"mixed-{index}")
        try:
            call.read()
            return "answered"
        except GrpcError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=200) as pool:
        ends = list(pool.map(one, range(200)))
    assert {ends[index] for index in range(200) if index % 5 < 3} == {"answered"}
    assert {ends[index] for index in range(4, 200, 5)} == {"answered", "cancelled"}
    assert all("temperature is nan" in ends[index] for index in range(3, 200, 5))
    wait_until(lambda: idle(served))
    assert served.engine.stats.kv_blocks_free == served.engine.stats.kv_blocks_max
