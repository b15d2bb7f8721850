"""Every bad request gets an error that names the field; the server and everyone else go on."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from flightline.supervisor.serve import Server
from tests.model_repository.endpoints import Call, GrpcError, Raw, ask, idle, post, wait_until
from tests.serving import CONTEXT

pytestmark = pytest.mark.slow

GOOD: dict[str, Any] = {"text_input": "the dog", "max_tokens": 4}
LONG = "QZ" * CONTEXT
HUGE = "the dog " * 500_000
NAN, BYTES = float("nan"), np.object_

BAD = [
    pytest.param({"text_input": ""}, "text_input is empty", id="empty prompt"),
    pytest.param(
        {"text_input": LONG}, r"(text_input|input_ids).* tokens: it must have fewer than", id="long prompt"
    ),
    pytest.param(
        {"text_input": HUGE},
        r"text_input has 4000000 bytes: the longest prompt that fits",
        id="huge prompt",
    ),
    pytest.param(
        {"stop_words": ["a"] * 1025}, "stop_words has 1025 words: at most 1024", id="too many stop words"
    ),
    pytest.param(
        {"bad_words": "a" * 16_385}, "bad_words has 16385 bytes: at most 16384", id="too long a bad word"
    ),
    pytest.param(
        {"text_input": Raw(b"\xff\xff\xff\xff")}, "text_input|string|QUERY", id="bytes that are no string"
    ),
    pytest.param({"max_tokens": 0}, "max_tokens is 0: it must be at least 1", id="no tokens"),
    pytest.param({"max_tokens": -3}, "max_tokens is -3", id="negative tokens"),
    pytest.param({"max_tokens": CONTEXT}, f"max_tokens is {CONTEXT}: .* at most", id="beyond the context"),
    pytest.param({"max_tokens": np.array([[4.0]], np.float32)}, "max_tokens.*FP32", id="wrong dtype"),
    pytest.param({"max_tokens": np.array([[4, 5]], np.int32)}, "max_tokens", id="wrong shape"),
    pytest.param({"max_tokens": np.array([4], np.int32)}, "max_tokens", id="no batch dimension"),
    pytest.param(
        {"max_tokens": None}, "max_tokens is missing|missing required.*max_tokens", id="missing input"
    ),
    pytest.param({"nonsense": 3}, "nonsense", id="unknown tensor"),
    pytest.param({"temperature": NAN}, "temperature is nan", id="NaN temperature"),
    pytest.param({"temperature": -1.0}, "temperature is -1.0", id="negative temperature"),
    pytest.param({"top_p": NAN}, r"\btop_p is nan", id="NaN top_p"),
    pytest.param({"top_k": -1}, r"\btop_k is -1", id="negative top_k"),
    pytest.param({"min_tokens": 9}, "min_tokens is 9", id="min above max"),
    pytest.param({"text_input": b"\xff\xfe"}, "text_input is not UTF-8", id="prompt not UTF-8"),
    pytest.param(
        {"stop_words": b"\xc3\x28"}, "stop_words has a word that is not UTF-8", id="stop word not UTF-8"
    ),
    pytest.param(
        {"bad_words": b"\xc3\x28"}, "bad_words has a word that is not UTF-8", id="bad word not UTF-8"
    ),
    pytest.param({"end_id": 10**6}, "end_id is 1000000", id="end id beyond the vocabulary"),
    pytest.param({"beam_width": 4}, "beam_width is 4: beam search is not supported", id="beam search"),
    pytest.param(
        {"num_return_sequences": 129},
        "num_return_sequences is 129: it must be between 1 and 128",
        id="too many answers",
    ),
    pytest.param({"length_penalty": 0.5}, "length_penalty is 0.5", id="length penalty"),
    pytest.param({"return_context_logits": True}, "return_context_logits", id="context logits"),
    pytest.param({"return_generation_logits": True}, "return_generation_logits", id="generation logits"),
    pytest.param({"lora_task_id": 3}, "lora_task_id is 3: LoRA", id="LoRA"),
    pytest.param(
        {"guided_decoding_guide": "x"}, "guided_decoding_guide_type is missing", id="guided decoding"
    ),
    pytest.param(
        {"embedding_bias_words": ["x", "y"], "embedding_bias_weights": [1.0]},
        "embedding_bias_words has 2 words for 1 embedding_bias_weights",
        id="bias",
    ),
    pytest.param({"decoder_text_input": "x"}, "decoder_text_input is 'x'", id="encoder-decoder"),
    pytest.param({"prompt_vocab_size": 3}, "prompt_vocab_size is 3: prompt tuning", id="prompt tuning"),
]


NASTY = {"huge prompt", "too many stop words", "too long a bad word", "bytes that are no string"}


@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation", "hf_baseline"])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_requests(served: Server, endpoint: str, change: dict[str, Any], message: str) -> None:
    inputs = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(GrpcError, match=message):
        Call(served, endpoint, inputs).read()
    wait_until(lambda: idle(served))


OURS = [
    ({"min_p": 1.5}, "min_p is 1.5: it must be between 0 and 1"),
    ({"top_logprobs": 21}, "top_logprobs is 21: it must be between 0 and 20"),
    ({"stop_token_ids": [5, 10**6]}, "stop_token_ids holds 1000000: ids of this model are 0 to"),
    ({"stop_token_ids": [5] * 1025}, "stop_token_ids has 1025 ids: at most 1024"),
    ({"logit_bias_ids": -1, "logit_bias_weights": 1.0}, "logit_bias_ids holds -1: ids of this model are"),
    ({"logit_bias_ids": [1, 2], "logit_bias_weights": 1.0}, "logit_bias_ids has 2 ids for 1 logit_bias_w"),
    ({"logit_bias_weights": 1.0}, "logit_bias_ids has 0 ids for 1 logit_bias_weights: it must have as many"),
    ({"logit_bias_ids": 1, "logit_bias_weights": NAN}, "logit_bias_weights holds nan: it must hold finite"),
    ({"ignore_eos": True, "end_id": 5}, "ignore_eos is True and end_id is 5: it must be one of the two"),
]


@pytest.mark.parametrize(("change", "message"), OURS)
def test_bad_values_of_what_text_generation_adds(
    served: Server, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(GrpcError, match=message):
        Call(served, "text_generation", {**GOOD, **change}).read()


@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation"])
def test_the_next_request_is_served(served: Server, endpoint: str) -> None:
    for change in ({"text_input": ""}, {"temperature": NAN}, {"lora_task_id": 3}):
        with pytest.raises(GrpcError):
            Call(served, endpoint, {**GOOD, **change}).read()
        assert ask(served, endpoint).text


@pytest.mark.parametrize("endpoint", ["text_generation", "hf_baseline", "tensorrt_llm_bls"])
@pytest.mark.parametrize("missing", ["text_input", "max_tokens"])
def test_an_input_is_missing_but_their_number_is_right(served: Server, endpoint: str, missing: str) -> None:
    """Triton 2.51 only counts. An ensemble it then never begins, and ends its stream without a word."""
    inputs = {name: value for name, value in {**GOOD, "top_k": 3}.items() if name != missing}
    with pytest.raises(GrpcError, match=f"{missing} is missing"):
        Call(served, endpoint, inputs).read()


@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation", "tensorrt_llm_bls"])
def test_good_requests_beside_bad_ones(served: Server, endpoint: str) -> None:
    """Bad ones without a pause through both ports; not one good answer is lost or changed."""
    words = {"stop_words": "[" * 1000, "bad_words": "[" * 1000}
    bad = [{**GOOD, **words}, *({**GOOD, **case.values[0]} for case in BAD if case.id in NASTY)]
    good = {"text_input": "the fox", "max_tokens": 24, "end_id": -1, "exclude_input_in_output": True}
    expected = ask(served, endpoint, "the fox", 24, end_id=-1).text
    over, sent = threading.Event(), []

    def pester(inputs: dict[str, Any]) -> None:
        while not over.is_set():
            with contextlib.suppress(GrpcError):
                Call(served, endpoint, inputs).read()
            sent.append(1)

    def pester_over_http() -> None:
        while not over.is_set():
            assert post(served, endpoint, {**GOOD, "text_input": HUGE}).status == 400
            sent.append(1)

    with ThreadPoolExecutor(8) as pool:
        pests = [pool.submit(pester, inputs) for inputs in bad] + [pool.submit(pester_over_http)]
        try:
            answers = [Call(served, endpoint, good) for _ in range(4)]
            for _ in range(24):
                answers.append(Call(served, endpoint, good))
                assert answers.pop(0).read().text == expected
            for answer in answers:
                assert answer.read().text == expected
        finally:
            over.set()
        for pest in pests:
            pest.result()
    assert len(sent) > len(pests)
    wait_until(lambda: idle(served))


@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation"])
def test_status_codes_over_http(served: Server, endpoint: str) -> None:
    bad = post(served, endpoint, {**GOOD, "max_tokens": 0})
    assert (bad.status, "max_tokens" in bad.error) == (400, True)


def test_a_misspelled_input_over_http(served: Server) -> None:
    """To Triton it is a request parameter. NVIDIA's models do not look at those; ours say what it is."""
    body = {**GOOD, "temprature": 0.5}
    misspelled = post(served, "text_generation", body)
    assert (misspelled.status, "temprature is not an input" in misspelled.error) == (400, True)
    assert post(served, "ensemble", body).status == 200


def test_stop_wants_a_request_id(served: Server) -> None:
    inputs = {"input_ids": 0, "input_lengths": 1, "request_output_len": 1, "stop": True}
    with pytest.raises(GrpcError, match="a request id must be provided for request cancellation"):
        Call(served, "tensorrt_llm", inputs).read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.array([[5, 10**6]], np.int32)}, "input_ids holds 1000000"),
        ({"input_lengths": 9}, "input_lengths is 9: it must be between 1 and the 2 ids"),
        ({"request_output_len": 0}, "request_output_len is 0: it must be at least 1"),
        ({"runtime_top_k": -1}, "runtime_top_k is -1: it must be"),
        ({"stop_words_list": np.array([[[5, 6], [9, -1]]], np.int32)}, "stop_words_list is malformed"),
        ({"draft_input_ids": np.array([[5]], np.int32)}, "draft_input_ids is 5: speculative decoding"),
    ],
)
def test_bad_tokens(served: Server, change: dict[str, Any], message: str) -> None:
    ids = np.array([[5, 6]], dtype=np.int32)
    inputs = {"input_ids": ids, "input_lengths": 2, "request_output_len": 3, **change}
    with pytest.raises(GrpcError, match=message):
        Call(served, "tensorrt_llm", inputs).read()


@pytest.mark.parametrize("path", ["v2/repository/index", "v2/systemsharedmemory/status"])
def test_management_endpoints_are_closed(served: Server, path: str) -> None:
    import urllib.error
    import urllib.request

    method = "POST" if "repository" in path else "GET"
    request = urllib.request.Request(f"{served.settings.http_url}/{path}", method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 403
