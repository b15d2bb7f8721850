"""One contract for every backend: the same tensors, texts, errors and metrics, asked of real servers.

Backend trtllm-pytorch runs our engine process and all of Triton's models for real; ``tensorrt_llm`` itself is the
contract double of ``tests/trtllm_double``. Its tokens come from the same weights as backend torch's, so that every text
can be compared.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from flightline.client import Client
from flightline.supervisor.serve import Server
from tests.model_repository.endpoints import Call, GrpcError, ask, idle, in_pieces, post, stop, wait_until
from tests.model_repository.test_contract import FACTS
from tests.serving import tensorrt_llm_lane

pytestmark = pytest.mark.slow

LANES = ["torch", "trtllm-pytorch"]
ENDPOINTS = ["ensemble", "text_generation"]
WILD = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "end_id": -1}
PROMPT, LENGTH = "the quick brown", 24


@pytest.fixture(scope="module")
def pytorch_lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pytorch")
    with tensorrt_llm_lane(folder, "trtllm-pytorch", baseline=False) as server:
        yield server


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue("served" if request.param == "torch" else "pytorch_lane")


@pytest.fixture(params=ENDPOINTS)
def endpoint(request: pytest.FixtureRequest) -> str:
    return request.param


def wire_type(text: str) -> str:
    return "BYTES" if text == "TYPE_STRING" else text.removeprefix("TYPE_")


def test_metadata_is_nvidias(lane: Server) -> None:
    """What Triton itself says about the models, against the facts."""
    client = grpcclient.InferenceServerClient(lane.settings.grpc_url)
    fills = {"${logits_datatype}": "TYPE_FP32", "${encoder_input_features_data_type}": "TYPE_FP16"}
    fills["${prompt_embedding_table_data_type}"] = "TYPE_FP16"
    for model, facts in FACTS.items():
        metadata = client.get_model_metadata(model)
        for side, tensors in (("input", metadata.inputs), ("output", metadata.outputs)):
            expected = {
                each["name"]: (wire_type(fills.get(each["dtype"], each["dtype"])), [-1, *each["dims"]])
                for each in facts[side]
            }
            assert {each.name: (each.datatype, list(each.shape)) for each in tensors} == expected, model
    client.close()


def test_greedy_text(lane: Server, endpoint: str, served: Server) -> None:
    """The baseline is the witness: the same weights in plain Transformers."""
    expected = ask(served, "hf_baseline", PROMPT, LENGTH).text
    assert ask(lane, endpoint, PROMPT, LENGTH).text == expected
    assert in_pieces(lane, endpoint, 2, prompt=PROMPT, max_tokens=LENGTH).text == expected


def test_streamed_text_is_the_whole_text(lane: Server, endpoint: str) -> None:
    inputs = {"prompt": "the 日本 dog 👩‍🚀", "max_tokens": 80, "seed": 7, **WILD}
    assert ask(lane, endpoint, stream=True, **inputs).text == ask(lane, endpoint, **inputs).text


def test_stop_words(lane: Server, endpoint: str) -> None:
    text = ask(lane, endpoint, "the dog", 60, end_id=-1).text
    word = text[20:24]
    inputs = {"prompt": "the dog", "max_tokens": 60, "end_id": -1, "stop_words": ["not in there", word]}
    for stream in (False, True):
        assert ask(lane, endpoint, stream=stream, **inputs).text == text[: text.index(word)]


def test_bad_words(lane: Server) -> None:
    text = ask(lane, "text_generation", "the dog", 40, end_id=-1).text
    word = max((part for part in text.split() if part.isalpha() and part.isascii()), key=len, default="")
    assert word
    assert word not in ask(lane, "text_generation", "the dog", 40, end_id=-1, bad_words=[word]).text


def test_logits(pytorch_lane: Server) -> None:
    """Through the ensemble, with whole answers; of the whole prompt, too, when its KV blocks are there."""
    wanted = {"return_context_logits": True, "return_generation_logits": True, "return_log_probs": True}
    for _ in range(2):
        answer = ask(pytorch_lane, "ensemble", PROMPT, 6, end_id=-1, return_num_input_tokens=True, **wanted)
        (context,), (generated,) = answer.column("context_logits"), answer.column("generation_logits")
        assert context.shape == (1, answer.last("num_input_tokens"), generated.shape[-1])
        assert generated.shape[:3] == (1, 1, 6)
        likeliest = generated.max(-1) - np.log(np.exp(generated).sum(-1))
        np.testing.assert_allclose(likeliest, answer.column("output_log_probs")[0], atol=1e-2)
    with pytest.raises(GrpcError, match="logits come with whole answers only"):
        ask(pytorch_lane, "ensemble", PROMPT, 6, stream=True, **wanted)


def test_end_id_and_min_tokens(lane: Server, endpoint: str) -> None:
    alone = ask(lane, endpoint, "the dog", 1, return_num_output_tokens=True, end_id=-1)
    assert alone.num_output_tokens(endpoint) == 1
    vocabulary = ask(lane, endpoint, "the dog", 20, return_num_output_tokens=True, end_id=-1, min_tokens=20)
    assert vocabulary.num_output_tokens(endpoint) == 20


def test_sampling_depends_on_the_seed_alone(lane: Server, endpoint: str) -> None:
    def sample(seed: int) -> str:
        return ask(lane, endpoint, "the dog", 16, seed=seed, temperature=1.0, top_k=50).text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_counts_times_and_log_probs(lane: Server, endpoint: str) -> None:
    wanted = ("num_input_tokens", "num_output_tokens", "perf_metrics", "log_probs")
    asked = {f"return_{name}": True for name in wanted}
    for stream in (False, True):
        answer = ask(lane, endpoint, "the dog", 10, end_id=-1, stream=stream, **asked)
        assert answer.num_output_tokens(endpoint) == 10
        names = ("arrival", "first_scheduled", "first_token", "last_token")
        stamps = [answer.last(f"{name}_time_ns") for name in names]
        assert stamps == sorted(stamps) and stamps[0] > 0
        log_probs = np.concatenate([array.ravel() for array in answer.column("output_log_probs")])
        assert len(log_probs) == 10 and (log_probs < 0).all()
        assert log_probs.sum() == pytest.approx(answer.last("cum_log_probs"), rel=1e-3)
        assert answer.last("kv_cache_alloc_total_blocks") + answer.last("kv_cache_reused_blocks") > 0


def test_lanes_agree(served: Server, pytorch_lane: Server) -> None:
    """The same weights: what differs between the backends is the engine, not the contract."""
    for seed in range(3):
        texts = {
            ask(lane, "ensemble", "and then", 40, seed=seed, **WILD).text for lane in (served, pytorch_lane)
        }
        assert len(texts) == 1


def test_what_text_generation_adds(lane: Server, served: Server) -> None:
    asked = {
        "min_p": 0.02,
        "temperature": 1.5,
        "seed": 5,
        "end_id": -1,
        "top_logprobs": 2,
        "return_token_ids": True,
    }
    names = ("token_ids", "top_token_ids", "top_log_probs")
    ids, tops, values = (
        np.concatenate([array[0] for array in ask(lane, "text_generation", PROMPT, 12, **asked).column(name)])
        for name in names
    )
    witness = ask(served, "text_generation", PROMPT, 12, **asked)
    assert ids.tolist() == np.concatenate([array[0] for array in witness.column("token_ids")]).tolist()
    assert tops.shape == values.shape == (12, 2) and (values[:, 0] >= values[:, 1]).all()
    assert tops.tolist() == np.concatenate([array[0] for array in witness.column("top_token_ids")]).tolist()
    stopped = ask(
        lane, "text_generation", PROMPT, 12, stop_token_ids=int(ids[7]), return_finish_reason=True, **asked
    )
    assert stopped.column("token_ids")[-1].ravel().tolist() == ids[: ids.tolist().index(ids[7])].tolist()
    assert stopped.column("finish_reason")[-1].item() == b"end_id"


def test_several_answers(lane: Server, endpoint: str) -> None:
    single = [ask(lane, endpoint, PROMPT, 12, **{**WILD, "seed": 7 + index}).text for index in range(3)]
    answer = ask(lane, endpoint, PROMPT, 12, seed=7, num_return_sequences=3, stream=True, **WILD)
    texts = ["", "", ""]
    for index, text in zip(answer.column("sequence_index"), answer.texts, strict=True):
        texts[index.item()] += text
    assert texts == single and len(set(texts)) == 3


def test_rows_of_a_batch(lane: Server) -> None:
    prompts = ["the dog", "a token is a piece", "x"]
    inputs = {
        "text_input": np.array([[prompt.encode()] for prompt in prompts], dtype=np.object_),
        "max_tokens": np.full((3, 1), 8, np.int32),
    }
    answer = Call(lane, "text_generation", inputs, outputs=["text_output", "batch_index"]).read()
    rows = ["", "", ""]
    for index, text in zip(answer.column("batch_index"), answer.texts, strict=True):
        rows[index.item()] += text
    assert rows == [ask(lane, "text_generation", prompt, 8).text for prompt in prompts]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"max_tokens": 99_999}, "is 99999: after 2 prompt tokens it must be at most"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"beam_width": 2}, "beam_width is 2: beam search is not supported"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0: it must be between 1 and 128"),
        ({"top_p": 1.5}, "top_p.* is 1.5: it must be between 0 and 1"),
    ],
)
def test_errors_are_the_same(lane: Server, endpoint: str, inputs: dict, says: str) -> None:
    with pytest.raises(GrpcError, match=says):
        ask(lane, endpoint, **{"max_tokens": 4, **inputs})


def test_what_only_tensorrt_llm_has(lane: Server, served: Server) -> None:
    ranges = {"starts": [0], "ends": [-1], "priorities": [80]}
    inputs: dict = {f"retention_token_range_{name}": values for name, values in ranges.items()}
    inputs |= {"input_ids": [5, 6], "input_lengths": 2, "request_output_len": 3, "end_id": -1}
    if lane is served:
        with pytest.raises(
            GrpcError, match=r"KV cache retention is not supported by backend torch; .* build with"
        ):
            Call(lane, "tensorrt_llm", inputs).read()
        return
    assert Call(lane, "tensorrt_llm", inputs).read().last("sequence_length") == 2 + 3
    with pytest.raises(GrpcError, match=r"refused the request: Retention priority must be within \[0, 100\]"):
        Call(lane, "tensorrt_llm", inputs | {"retention_token_range_priorities": [101]}).read()


def test_a_client_that_goes_away_frees_its_blocks(lane: Server) -> None:
    inputs = {"text_input": "the dog", "max_tokens": 480, "end_id": -1, "stream": True}

    def left_early() -> bool:
        wait_until(lambda: idle(lane))
        before = lane.engine.stats.generated_tokens
        calls = [Call(lane, "text_generation", inputs) for _ in range(4)]
        for call in calls:
            call.next()
        for call in calls:
            call.close()
        wait_until(lambda: idle(lane))
        return lane.engine.stats.generated_tokens - before < 4 * 480

    assert any(left_early() for _ in range(10))  # on a busy machine the engine may be through before


def test_stop_by_request_id(lane: Server) -> None:
    wait_until(lambda: idle(lane))
    inputs = {"text_input": "the dog", "max_tokens": 480, "end_id": -1, "stream": True}
    call = Call(lane, "ensemble", inputs, request_id="one")
    call.next()
    assert stop(lane, "one").responses == []
    call.read()  # ends, with what there was and without an error
    wait_until(lambda: idle(lane))


def test_many_at_once(lane: Server) -> None:
    """Requests are batched in flight: more of them than one step can hold all end, and no block is lost."""
    inputs = {"text_input": "the dog", "max_tokens": 12, "end_id": -1, "stream": True}
    calls = [Call(lane, ENDPOINTS[index % 2], inputs) for index in range(80)]
    assert len({call.read().text for call in calls}) == 1
    wait_until(lambda: idle(lane))
    assert lane.engine.stats.kv_blocks_free == lane.engine.stats.kv_blocks_max > 0


def test_metrics(lane: Server) -> None:
    """All families that upstream's own LLM API model lacks."""
    ask(lane, "ensemble")
    with urllib.request.urlopen(f"{lane.settings.metrics_url}/metrics") as response:
        text = response.read().decode()
    families = ("request", "kv_cache_block", "inflight_batcher", "general")
    for name in [*(f"nv_trt_llm_{family}_metrics" for family in families), "nv_llm_output_token_len_count"]:
        assert f"{name}{{" in text
    label = 'kv_cache_block_type="max",model="tensorrt_llm",version="1"'
    assert f"nv_trt_llm_kv_cache_block_metrics{{{label}}} {lane.engine.stats.kv_blocks_max}" in text


def test_our_client_and_http_do_not_know_the_lane(lane: Server, served: Server) -> None:
    expected = ask(served, "hf_baseline", PROMPT, 12).text
    with Client(lane.settings.grpc_url) as client:
        assert client.generate(PROMPT, max_tokens=12).text == expected
        assert "".join(piece.text for piece in client.generate_stream(PROMPT, max_tokens=12)) == expected
    assert post(lane, "text_generation", {"text_input": PROMPT, "max_tokens": 12}).text == expected
    assert post(lane, "ensemble", {"text_input": PROMPT, "max_tokens": 12}).text == PROMPT + expected


def test_no_caller_names_a_lane() -> None:
    """Clients and load tests choose an endpoint, never a backend; what is declared of a parameter says who has it."""
    root = Path(__file__).parents[2]
    found = [*(root / "client").glob("*.py"), *(root / "loadtest").glob("*.py")]
    named = {path.name for path in found if "trtllm-" in path.read_text(encoding="utf-8")}
    assert named == {"params.py"}


def test_the_engine_process_comes_back(pytorch_lane: Server) -> None:
    import os
    import signal

    os.kill(pytorch_lane.engine_pids[0], signal.SIGKILL)
    wait_until(lambda: not pytorch_lane.engine.connected)
    wait_until(lambda: pytorch_lane.engine.connected and pytorch_lane.wait_ready(0))

    def answers() -> bool:
        """False while a stub has not found the engine again, which it says."""
        try:
            return bool(ask(pytorch_lane, "ensemble", PROMPT, LENGTH).text)
        except GrpcError as error:
            assert "it is being started, try again" in str(error)
            return False

    wait_until(answers)
