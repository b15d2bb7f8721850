from __future__ import annotations

import pytest
from tritonclient.grpc import service_pb2

from flightline.client import (
    Chunk,
    Client,
    DeadlineExceeded,
    GenerateParams,
    Generation,
    GenerationError,
    InvalidRequest,
    RequestCancelled,
    ServerUnavailable,
    wire,
)
from flightline.client.errors import from_stream_error
from tests.client.waiting import eventually


def test_generate_adds_text_counts_and_times_up(server):
    with Client(server.url) as llm:
        answer = llm.generate("one two three", max_tokens=5)
    assert answer.text == str(answer) == " word" * 5
    assert (answer.num_input_tokens, answer.num_output_tokens, answer.finish_reason) == (3, 5, "length")
    served = server.log[0]
    assert answer.perf_metrics.first_token_time_ns == served.token_times_ns[0]
    assert answer.perf_metrics.ttft_s == (served.token_times_ns[0] - served.arrival_ns) / 1e9


def test_one_of_several_answers_has_failed():
    """The others are whole; an error of the whole request is raised."""

    def error(text):
        return wire.parse_response(service_pb2.ModelStreamInferResponse(error_message=text))

    chunks = [
        Chunk("a", num_output_tokens=1),
        Chunk("b", num_output_tokens=1, sequence_index=1),
        error("sequence_index 1: the engine step failed: RuntimeError: no"),
        Chunk("c", num_output_tokens=2),
    ]
    whole, failed = Generation.all_from_chunks(chunks, GenerateParams(max_tokens=2, num_return_sequences=2))
    assert (whole.text, whole.finish_reason, whole.error) == ("ac", "length", None)
    assert (failed.text, failed.finish_reason, type(failed.error)) == ("b", "error", GenerationError)
    full = [error(f"sequence_index {index}: the queue is full") for index in range(2)]
    with pytest.raises(ServerUnavailable, match=r"^sequence_index 0: the queue is full"):
        Generation.all_from_chunks(full, GenerateParams(num_return_sequences=2))
    with pytest.raises(InvalidRequest):
        error("max_tokens is 0: it must be at least 1")


def test_stream_is_one_chunk_per_response(server):
    with Client(server.url) as llm:
        chunks = list(llm.generate_stream("hello", max_tokens=4))
    assert [chunk.text for chunk in chunks] == [" word"] * 4
    assert [chunk.num_output_tokens for chunk in chunks] == [1, 2, 3, 4]
    assert server.log[0].inputs["stream"] is True


def test_tokens_count_from_the_beginning_at_any_endpoint(server):
    """The ensemble itself counts those of one response."""
    with Client(server.url, "ensemble") as llm:
        assert [chunk.num_output_tokens for chunk in llm.generate_stream("hello", max_tokens=4)] == [
            1,
            2,
            3,
            4,
        ]
        assert llm.generate("hello", max_tokens=4).num_output_tokens == 4


def test_what_was_asked_for_is_what_travels(server):
    params = GenerateParams(max_tokens=3, stop_words=["a", "b c"], seed=2**64 - 1, top_k=7)
    with Client(server.url, "ensemble") as llm:
        llm.generate("hello", params, temperature=0.5)
    inputs = server.log[0].inputs
    assert server.log[0].model == "ensemble"
    assert inputs["stop_words"] == ["a", "b c"]
    assert (inputs["seed"], inputs["top_k"], inputs["temperature"]) == (2**64 - 1, 7, 0.5)
    assert "top_p" not in inputs and "bad_words" not in inputs


def test_what_asks_for_nothing_does_not_travel_to_models_that_do_not_know_it():
    assert set(GenerateParams().tensors()) == {
        "max_tokens",
        "return_log_probs",
        "exclude_input_in_output",
        "return_num_input_tokens",
        "return_num_output_tokens",
        "return_perf_metrics",
    }
    assert GenerateParams(skip_special_tokens=False).tensors()["skip_special_tokens"] is False


@pytest.mark.parametrize(
    ("options", "top_p"),
    [
        ({"temperature": 0.7}, 1.0),
        ({"temperature": 0.7, "min_p": 0.1}, None),
        ({"temperature": 0.7, "min_p": 0.0}, 1.0),
        ({"temperature": 0.0}, None),
        ({}, None),
    ],
)
def test_temperature_alone_asks_for_sampling(options, top_p):
    assert GenerateParams(**options).tensors().get("top_p") == top_p


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop_words": "word"}, "stop_words"),
        ({"top_p": "high"}, "top_p"),
        ({"return_log_probs": 1}, "return_log_probs"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [5, 2**31]}, "stop_token_ids"),
        ({"logit_bias_weights": ["a"]}, "logit_bias_weights"),
    ],
)
def test_values_that_no_tensor_holds_are_refused_by_name(options, field):
    with pytest.raises(InvalidRequest, match=f"^{field} is "):
        GenerateParams(**options)


def test_a_prompt_that_is_not_text_is_refused(server):
    with Client(server.url) as llm, pytest.raises(InvalidRequest, match="text_input"):
        llm.generate("\ud800")


@pytest.mark.parametrize("leave", ["break", "close"])
def test_leaving_a_stream_cancels_the_request(slow_server, leave):
    with Client(slow_server.url) as llm:
        stream = llm.generate_stream("hello", max_tokens=1000)
        if leave == "close":
            next(stream)
            stream.close()
        else:
            for _ in stream:
                break
            del stream
        assert eventually(lambda: slow_server.log[0].outcome == "cancelled")


def test_leaving_an_ensemble_stream_sends_stop_with_the_same_id(slow_server):
    with Client(slow_server.url, "ensemble") as llm:
        stream = llm.generate_stream("hello", max_tokens=1000)
        next(stream)
        stream.close()
    assert slow_server.stop_requests == [slow_server.log[0].id]


def test_a_complete_ensemble_stream_sends_no_stop(server):
    with Client(server.url, "ensemble") as llm:
        list(llm.generate_stream("hello", max_tokens=3))
    assert server.stop_requests == []


def test_deadline(slow_server):
    with Client(slow_server.url, timeout_s=0.3) as llm:
        with pytest.raises(DeadlineExceeded, match=r"timeout_s=0\.3"):
            llm.generate("hello", max_tokens=1000)
        assert eventually(lambda: slow_server.log[0].outcome == "cancelled")


def test_closing_the_client_cancels(slow_server):
    llm = Client(slow_server.url)
    stream = llm.generate_stream("hello", max_tokens=1000)
    next(stream)
    llm.close()
    with pytest.raises(RequestCancelled):
        list(stream)


def test_errors_carry_the_servers_text(server):
    with (
        Client(server.url) as llm,
        pytest.raises(InvalidRequest, match="max_tokens is 0: it must be at least 1"),
    ):
        llm.generate("hello", max_tokens=0)
    with Client(server.url, "nonsense") as llm:
        with pytest.raises(InvalidRequest, match="unknown model: 'nonsense'"):
            llm.generate("hello")
        with pytest.raises(ServerUnavailable, match="no model 'nonsense'"):
            llm.check_ready()


def test_no_server_names_the_remedy():
    with Client("127.0.0.1:9") as llm:
        for call in (llm.check_ready, lambda: llm.generate("hello")):
            with pytest.raises(ServerUnavailable, match=r"no server at 127.0.0.1:9: .*make serve"):
                call()


def test_a_server_that_goes_away_mid_stream_is_an_error(slow_server):
    with Client(slow_server.url) as llm:
        stream = llm.generate_stream("hello", max_tokens=1000)
        next(stream)
        slow_server.stop()
        with pytest.raises((ServerUnavailable, RequestCancelled)):
            list(stream)


def test_one_client_serves_many_threads(server):
    from concurrent.futures import ThreadPoolExecutor

    with Client(server.url) as llm, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: llm.generate("word " * i, max_tokens=3), range(1, 17)))
    assert [answer.num_input_tokens for answer in answers] == list(range(1, 17))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "in ensemble 'ensemble', max_tokens (REQUEST_OUTPUT_LEN) is 0: it must be at least 1",
            InvalidRequest,
        ),
        ("top_q is not an input of this model", InvalidRequest),
        ("[request id: r3] Exceeds maximum queue size", ServerUnavailable),
        ("Stub process 'text_generation_0_0' is not healthy.", ServerUnavailable),
        ("the queue is full: max_queue_size=256 requests wait already, try again later", ServerUnavailable),
        ("the engine step failed: RuntimeError: no", GenerationError),
    ],
)
def test_stream_errors_get_their_class_from_the_text(text, kind):
    error = from_stream_error(text)
    assert type(error) is kind and str(error) == text
