from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest

from flightline.client.params import DECLARED
from flightline.model_repository.shared.contract import NVIDIA, OURS
from flightline.model_repository.shared.llmapi import LlmapiInputs
from flightline.model_repository.shared.tensors import BY_NAME, ENGINE, TORCH, Inputs
from flightline.torch_engine.core.request import (
    Code,
    GenerationRequest,
    Guide,
    ModelInfo,
    RequestError,
    SamplingParams,
)

SAMPLED = {
    name: parameter
    for name, parameter in DECLARED.items()
    if parameter.limits and name in SamplingParams.__dataclass_fields__
}
INFO = ModelInfo(vocab_size=100, max_seq_len=16, end_ids=(1, 9), model_dir="")


def text(*values: bytes) -> np.ndarray:
    return np.array([[value] for value in values], dtype=np.object_)


def number(value: Any, dtype: type = np.int32) -> np.ndarray:
    return np.array([[value]], dtype=dtype)


def generation(prompt_ids: list[int] | None = None, **tensors: np.ndarray) -> GenerationRequest:
    inputs = Inputs({"text_input": text(b"hi"), "max_tokens": number(4), **tensors})
    bias = inputs.token_bias(0, INFO.vocab_size)
    inputs.options(0)
    return inputs.generation(0, prompt_ids or [3, 4], (), (), INFO, bias)


def test_defaults_are_greedy_with_the_models_own_ends() -> None:
    request = generation()
    assert request.sampling.plain_greedy
    assert (request.max_tokens, request.end_id, request.min_tokens) == (4, None, 0)
    options = Inputs({"max_tokens": number(4)}).options(0)
    assert options.exclude_input and not options.stream


def test_values_arrive() -> None:
    request = generation(
        temperature=number(0.5, np.float32),
        top_k=number(5),
        top_p=number(0.25, np.float32),
        seed=number(2**64 - 1, np.uint64),
        min_tokens=number(2),
        end_id=number(-1),
        return_log_probs=number(True, np.bool_),
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 5, 0.25, 2**64 - 1)
    assert (request.min_tokens, request.end_id, request.return_log_probs) == (2, -1, True)


def test_what_text_generation_adds_arrives() -> None:
    request = generation(
        min_p=number(0.25, np.float32),
        logit_bias_ids=np.array([[7, 3, 7]], np.int32),
        logit_bias_weights=np.array([[1.5, -np.inf, 2.0]], np.float32),
        embedding_bias=np.array([[0, 0, 0, 4.0, 5.0]], np.float32),
        stop_token_ids=np.array([[8, 2]], np.int32),
        ignore_eos=number(True, np.bool_),
        skip_special_tokens=number(False, np.bool_),
        top_logprobs=number(5),
        return_prompt_log_probs=number(True, np.bool_),
    )
    sampling = request.sampling
    assert (sampling.min_p, sampling.logit_bias) == (0.25, ((3, -np.inf), (4, 5.0), (7, 3.5)))
    assert (request.end_id, request.stop_ids, request.skip_special_tokens) == (-1, (8, 2), False)
    assert (request.top_log_probs, request.return_log_probs, request.lane_inputs) == (5, False, {})
    assert request.return_prompt_log_probs
    for lane in ("trtllm-pytorch", "trtllm-engine"):
        with pytest.raises(
            RequestError, match=f"return_prompt_log_probs is True: .* by backend {lane}; leave"
        ):
            Inputs({"return_prompt_log_probs": number(True, np.bool_)}, lane)


@pytest.mark.parametrize("name", ["min_p", "top_logprobs"])
def test_what_nvidias_backend_has_no_tensor_for(name: str) -> None:
    value = {"min_p": number(0.5, np.float32), "top_logprobs": number(2)}[name]
    assert Inputs({name: value}, "trtllm-pytorch").lane_inputs(0) == {}
    with pytest.raises(
        RequestError, match=f"{name} is .* by backend trtllm-engine; leave {name} out, or build"
    ):
        Inputs({name: value}, "trtllm-engine")


@pytest.mark.parametrize("name", sorted(SAMPLED))
def test_a_declared_sampling_parameter_has_the_engines_limits(name: str) -> None:
    """They are declared for the server and its pages, and kept by the engine, whoever fills it."""
    field = {each.name: each for each in fields(SamplingParams)}[name]
    limits = SAMPLED[name].limits
    assert limits is not None
    for value, allowed in (
        (limits[0], True),
        (limits[1], True),
        (limits[0] - 1, False),
        (limits[1] + 1, False),
    ):
        tensor = {name: number(value, np.int32 if "int" in str(field.type) else np.float32)}
        for make in (partial(generation, **tensor), partial(SamplingParams, **{name: value})):
            if allowed:
                make()
                continue
            with pytest.raises(RequestError, match=f"{name} is .*: it must be"):
                make()


def test_scalars_without_a_dimension_of_their_own() -> None:
    """``reshape { shape: [ ] }`` of tensorrt_llm leaves only the batch dimension."""
    inputs = Inputs({"runtime_top_k": np.array([3, 4], dtype=np.int32)})
    assert [inputs.sampling(row).top_k for row in range(2)] == [3, 4]


@pytest.mark.parametrize(("asked", "given"), [(1, None), (9, None), (5, 5), (-1, -1)])
def test_asking_for_one_of_the_models_ends_means_all_of_them(asked: int, given: int | None) -> None:
    assert generation(end_id=number(asked)).end_id == given


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"max_tokens": number(0)}, "max_tokens is 0: it must be at least 1"),
        ({"max_tokens": number(-5)}, "max_tokens is -5"),
        ({"max_tokens": number(15)}, r"max_tokens is 15: after 2 prompt tokens it must be at most 14"),
        ({"temperature": number(np.nan, np.float32)}, "temperature is nan: it must be finite"),
        ({"temperature": number(-1, np.float32)}, "temperature is -1.0"),
        ({"top_p": number(np.nan, np.float32)}, "top_p is nan"),
        ({"top_p": number(1.5, np.float32)}, "top_p is 1.5: it must be between 0 and 1"),
        ({"top_k": number(-1)}, "top_k is -1"),
        ({"repetition_penalty": number(0, np.float32)}, "repetition_penalty is 0.0"),
        ({"presence_penalty": number(np.inf, np.float32)}, "presence_penalty is inf"),
        ({"min_tokens": number(5)}, "min_tokens is 5: it must be between 0 and max_tokens=4"),
        ({"end_id": number(100)}, "end_id is 100: it must be -1"),
        ({"end_id": number(-2)}, "end_id is -2"),
        ({"runtime_top_p": number(1.5, np.float32)}, "^top_p is 1.5: it must be between"),
        ({"num_return_sequences": number(0)}, "num_return_sequences is 0: it must be between 1 and 128"),
        ({"min_p": number(np.nan, np.float32)}, "min_p is nan: it must be between 0 and 1"),
        ({"embedding_bias": number(np.inf, np.float32)}, "embedding_bias holds inf: it must hold finite"),
        ({"nonsense": number(1)}, "nonsense is not an input"),
    ],
)
def test_bad_values_are_named_with_their_limit(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        generation(**tensors)
    assert caught.value.code is Code.INVALID_ARG


@pytest.mark.parametrize(
    ("tensors", "of_tokens", "of_text"),
    [
        (
            {"request_output_len": number(0)},
            "request_output_len is 0: it must be at least 1",
            "max_tokens is 0: it must be at least 1",
        ),
        ({"request_output_len": number(15)}, "request_output_len is 15: after", "max_tokens is 15: after"),
        ({"runtime_top_k": number(-1)}, "runtime_top_k is -1", "top_k is -1"),
        ({"runtime_top_p": number(1.5, np.float32)}, "runtime_top_p is 1.5", "top_p is 1.5"),
        ({"temperature": number(-1, np.float32)}, "temperature is -1.0", "temperature is -1.0"),
        ({"min_tokens": number(5)}, "between 0 and request_output_len=4", "between 0 and max_tokens=4"),
        ({"len_penalty": number(0.5, np.float32)}, "len_penalty is 0.5", "length_penalty is 0.5"),
        ({"streaming": np.array([[True, False]])}, "streaming has 2 values", "stream has 2 values"),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_errors_have_the_names_of_the_model_that_was_asked(
    tensors: dict[str, np.ndarray], of_tokens: str, of_text: str, as_text: bool
) -> None:
    """What ``tensorrt_llm`` gets from a client, or within ``ensemble``, from ``preprocessing``, for a text."""
    asked = {"input_ids": np.array([[3, 4]], np.int32), "input_lengths": number(2)}
    asked |= {"request_output_len": number(4), **tensors}
    asked |= {"decoder_input_ids": number(0), "decoder_input_lengths": number(1)} if as_text else {}
    with pytest.raises(RequestError) as caught:
        Inputs(asked).generation(0, [3, 4], (), (), INFO)
    assert (of_text if as_text else of_tokens) in caught.value.message
    assert (of_tokens if as_text else of_text) not in caught.value.message or of_text in of_tokens


def test_preprocessing_has_the_names_of_ensemble() -> None:
    with pytest.raises(RequestError, match=r"^max_tokens is 0"):
        Inputs({"QUERY": text(b"hi"), "REQUEST_OUTPUT_LEN": number(0)}).max_tokens(0)
    with pytest.raises(RequestError, match=r"^text_input has 9 bytes"):
        Inputs({"QUERY": text(b"123456789")}).text(0, 8)


def test_a_copy_keeps_lane_and_contract() -> None:
    """Long prompts are read from one."""
    inputs = Inputs({"max_tokens": number(4), "lora_task_id": number(3)}, ENGINE, NVIDIA).copy()
    assert inputs.options(0).exclude_input is NVIDIA.exclude_input is not OURS.exclude_input
    assert inputs.lane_inputs(0) == {"lora_task_id": 3}
    bare = LlmapiInputs({"return_finish_reason": np.array([True])}, TORCH).copy()
    assert bare.options(0).finish_reason


def test_prompt_must_leave_room() -> None:
    with pytest.raises(
        RequestError, match="text_input has 16 tokens: it must have fewer than max_seq_len=16"
    ):
        generation(prompt_ids=[3] * 16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (text(b""), "text_input is empty"),
        (text(b"ab\xff"), "text_input is not UTF-8: invalid start byte at byte 2"),
    ],
)
def test_prompt_must_be_text(value: np.ndarray, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Inputs({"text_input": value}).text(0, 100)


def test_missing_prompt() -> None:
    with pytest.raises(RequestError, match="text_input is missing"):
        Inputs({"max_tokens": number(1)}).text(0, 100)


@pytest.mark.parametrize(
    ("name", "value", "feature"),
    [
        ("beam_width", number(2), "beam search"),
        ("len_penalty", number(0.5, np.float32), "beam search"),
        ("return_context_logits", number(True, np.bool_), "returning logits"),
        ("return_generation_logits", number(True, np.bool_), "returning logits"),
        ("lora_task_id", number(1, np.uint64), "LoRA"),
        ("lora_weights", np.zeros((1, 2, 2), np.float16), "LoRA"),
        ("prompt_embedding_table", np.zeros((1, 2, 2), np.float16), "prompt tuning"),
        ("num_draft_tokens", number(3), "a draft model"),
        ("DECODER_QUERY", text(b"a"), "encoder-decoder"),
        ("draft_input_ids", np.array([[1]], np.int32), "speculative decoding"),
        ("lookahead_window_size", number(4), "speculative decoding"),
        ("retention_decode_priority", number(50), "KV cache retention"),
        ("IMAGE_BYTES", np.zeros((1, 1, 1, 1, 1), np.uint8), "image and video"),
    ],
)
def test_unsupported_features_are_named(name: str, value: np.ndarray, feature: str) -> None:
    with pytest.raises(RequestError, match=feature) as caught:
        Inputs({name: value})
    assert caught.value.code is Code.UNSUPPORTED
    assert BY_NAME[name].name in caught.value.message


def test_a_lane_passes_on_what_its_engine_can_do() -> None:
    """By the names of ``tensorrt_llm``, with a batch dimension; what asks for nothing of the feature too."""
    tensors = {
        "lora_task_id": np.array([7, 8], np.uint64),  # as ``reshape { shape: [ ] }`` leaves it
        "lora_weights": np.ones((2, 3, 4), np.float16),
        "retention_decode_priority": np.array([[50], [60]], np.int32),
        "top_k": np.array([[3], [4]], np.int32),
        "draft_input_ids": np.zeros((2, 0), np.int32),
    }
    found = Inputs(tensors, "trtllm-engine").lane_inputs(1)
    assert {name: value.tolist() for name, value in found.items()} == {
        "lora_task_id": [[8]],
        "lora_weights": [[[1.0] * 4] * 3],
        "retention_decode_priority": [[60]],
    }
    renamed = Inputs({"length_penalty": number(0.5, np.float32)}, "trtllm-engine").lane_inputs(0)
    assert renamed == {"len_penalty": np.float32([[0.5]])}


@pytest.mark.parametrize(
    ("lane", "name", "value", "remedy"),
    [
        (
            "torch",
            "retention_decode_priority",
            number(50),
            "by backend torch; leave retention_decode_priority out, or build with ENGINE=trtllm-pytorch or ENGINE=trtl",
        ),
        (
            "trtllm-pytorch",
            "lora_task_id",
            number(3, np.uint64),
            "by backend trtllm-pytorch; leave lora_task_id out, or build with ENGINE=trtllm-engine",
        ),
        (
            "trtllm-engine",
            "num_draft_tokens",
            number(3),
            "by backend trtllm-engine; leave num_draft_tokens out$",
        ),
    ],
)
def test_a_lane_refuses_by_name(lane: str, name: str, value: np.ndarray, remedy: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is .* is not supported {remedy}"):
        Inputs({name: value}, lane)


def test_a_text_model_shows_one_text() -> None:
    inputs = Inputs({"beam_width": number(4)}, "trtllm-engine")
    with pytest.raises(RequestError, match=r"beam_width is 4: .* by this model; .* ask the model ensemble"):
        inputs.require_one_text()


def test_bias() -> None:
    given = {
        "embedding_bias_words": text(b"a"),
        "embedding_bias_weights": number(2.5, np.float32),
        "embedding_bias": np.array([[0, 0, -1.5]], np.float32),
    }
    inputs = Inputs(given)
    assert inputs.bias_words(0) == [("a", 2.5)]
    assert inputs.token_bias(0, 3) == ((2, -1.5),)
    with pytest.raises(RequestError, match="embedding_bias has 3 values: this model has 2 tokens"):
        inputs.token_bias(0, 2)


def test_orders_to_stop() -> None:
    assert Inputs({"stop": np.array([[True], [True]])}).stops()
    assert not Inputs({"stop": np.array([[False]])}).stops()
    with pytest.raises(RequestError, match=r"stop is \[True, False\]: a stop request must be true for each"):
        Inputs({"stop": np.array([[True], [False]])}).stops()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", number(1)),
        ("num_return_sequences", number(1)),
        ("length_penalty", number(1.0, np.float32)),
        ("decoder_text_input", text(b"")),
        ("guided_decoding_guide", text(b"")),
        ("lora_weights", np.zeros((1, 0, 2), np.float16)),
        ("embedding_bias", np.zeros((1, 0), np.float32)),
        ("draft_input_ids", np.zeros((1, 0), np.int32)),
        ("return_context_logits", number(False, np.bool_)),
        ("runtime_top_p_min", number(1e-6, np.float32)),
        ("runtime_top_p_decay", number(1.0, np.float32)),
    ],
)
def test_values_that_ask_for_nothing_are_accepted(name: str, value: np.ndarray) -> None:
    Inputs({name: value})


def test_token_prompts_are_cut_and_checked() -> None:
    ids = np.array([[5, 6, 7, 0]], dtype=np.int32)
    assert Inputs({"input_ids": ids, "input_lengths": np.array([3])}).prompt_ids(0, 100) == [5, 6, 7]
    with pytest.raises(RequestError, match="input_lengths is 5: it must be between 1 and the 4 ids"):
        Inputs({"input_ids": ids, "input_lengths": np.array([5])}).prompt_ids(0, 100)
    with pytest.raises(RequestError, match="input_ids holds 7: ids of this model are 0 to 6"):
        Inputs({"input_ids": ids, "input_lengths": np.array([3])}).prompt_ids(0, 7)


def test_a_whole_token_prompt() -> None:
    """Of ``text_generation``, whose other tensors have the names of ``ensemble``."""
    asked = {"input_ids": np.array([[5, 6, 7]], np.int32), "max_tokens": number(0)}
    assert Inputs(asked).whole_prompt_ids(0, 100) == [5, 6, 7]
    with pytest.raises(RequestError, match="input_ids holds 7: ids of this model are 0 to 6"):
        Inputs(asked).whole_prompt_ids(0, 7)
    with pytest.raises(RequestError, match="input_ids is empty"):
        Inputs({"input_ids": np.zeros((1, 0), np.int32)}).whole_prompt_ids(0, 7)
    with pytest.raises(RequestError, match=r"^max_tokens is 0"):
        Inputs(asked).max_tokens(0)


def test_malformed_word_lists() -> None:
    with pytest.raises(RequestError, match=r"^stop_words_list is malformed"):
        asked = {"input_ids": number(3), "input_lengths": number(1)}
        Inputs(asked | {"stop_words_list": np.array([[[1, 2], [5, -1]]])}).word_ids("stop_words", 0)
    with pytest.raises(RequestError, match="bad_words has a word that is not UTF-8"):
        Inputs({"bad_words": np.array([[b"a", b"\xc3"]], dtype=np.object_)}).words("bad_words", 0)


@pytest.mark.parametrize(
    ("lane", "kind", "served"),
    [
        ("torch", b"lark", True),
        ("torch", b"structural_tag", True),
        ("trtllm-pytorch", b"lark", False),
        ("trtllm-pytorch", b"structural_tag", True),
        ("trtllm-engine", b"structural_tag", False),
        ("trtllm-engine", b"json_schema", True),
    ],
)
def test_a_guide_is_one_that_the_lane_has(lane: str, kind: bytes, served: bool) -> None:
    texts = {b"lark": b'start: "a"', b"structural_tag": STRUCTURAL_TAG, b"json_schema": b"{}"}
    given = {"guided_decoding_guide_type": text(kind), "guided_decoding_guide": text(texts[kind])}
    inputs = Inputs(given, lane)
    if served:
        assert inputs.guide(0) == Guide(kind.decode(), texts[kind].decode())
        return
    with pytest.raises(
        RequestError, match=f"guide_type is '{kind.decode()}', which backend {lane} does not have"
    ):
        inputs.guide(0)


STRUCTURAL_TAG = b'{"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}'


def test_each_row_has_its_own_guide() -> None:
    given = {"guided_decoding_guide_type": text(b"regex", b""), "guided_decoding_guide": text(b"a+", b"")}
    inputs = Inputs(given)
    assert inputs.guided and [inputs.guide(row) for row in range(2)] == [Guide("regex", "a+"), None]
    assert not Inputs({}).guided and Inputs({}).guide(0) is None
