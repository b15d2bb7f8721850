"""``MODEL_CONTRACT=llmapi`` on the real Triton, in each backend: NVIDIA's ``all_models/llmapi`` and its habits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from flightline.engine_build.build import Build
from flightline.engine_build.settings import parse
from flightline.supervisor.serve import Server
from tests.model_repository.endpoints import ask, post
from tests.model_repository.nvidia import Wire
from tests.model_repository.test_engine_lane import replace_backend
from tests.serving import serving, settings_for, tensorrt_llm_lane

pytestmark = pytest.mark.slow

PROMPT, LENGTH = "the quick brown", 24


def replace_engine(build: Any) -> None:
    replace_backend(build, "tensorrt_llm_engine")


@pytest.fixture(scope="module", params=["torch", "trtllm-pytorch", "trtllm-engine"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    lane, folder = request.param, tmp_path_factory.mktemp("llmapi")
    served: Server = request.getfixturevalue("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_CONTRACT", "llmapi")
        patch.setenv("TRTLLM_DOUBLE_MODEL", str(folder / "tiny"))
        if lane == "trtllm-pytorch":
            (folder / "adapters/mine").mkdir(parents=True)
            patch.setenv("TRTLLM_PARAMETERS", f"lora_dir={folder}/adapters")
        if lane == "torch":
            arguments = ["--model", served.engine.info.model_dir, "--engine", "torch", "--precision", "bf16"]
            Build(parse([*arguments, "--build-dir", str(folder)]), say=print).run()
            running: Any = serving(settings_for(folder, baseline=False))
        else:
            prepare = replace_engine if lane == "trtllm-engine" else lambda build: None
            running = tensorrt_llm_lane(folder, lane, prepare=prepare, baseline=False)
        with running as server:
            for variable in ("MODEL_CONTRACT", "TRTLLM_PARAMETERS"):  # they are for this build alone
                patch.delenv(variable, raising=False)
            yield server


def call(server: Server, request_id: str = "", **inputs: Any) -> list:
    """As a client of that contract sends it: no batch dimension anywhere."""
    values = {"text_input": np.array([PROMPT.encode()], np.object_)}
    types = {bool: np.bool_, int: np.int32, float: np.float32}
    for name, value in inputs.items():
        if isinstance(value, list):
            values[name] = np.array([each.encode() for each in value], np.object_)
        else:
            values[name] = np.array(
                [value], np.uint64 if name.endswith(("seed", "lora_id")) else types[type(value)]
            )
    return Wire(server.settings.grpc_url, "tensorrt_llm", values, request_id=request_id).stream()


def text(result: Any) -> str:
    (value,) = result.as_numpy("text_output")  # one dimension
    return value.decode("utf-8")


@pytest.fixture(scope="module")
def answer(served: Server) -> str:
    return ask(served, "text_generation", PROMPT, LENGTH).text


def test_text_and_reason(server: Server, answer: str) -> None:
    (whole,) = call(
        server,
        sampling_param_max_tokens=LENGTH,
        sampling_param_exclude_input_from_output=True,
        return_finish_reason=True,
        return_stop_reason=True,
        return_cumulative_logprob=True,
    )
    assert text(whole) == answer
    assert whole.as_numpy("finish_reason").tolist() == [b"length"]
    assert whole.as_numpy("stop_reason").tolist() == [b"None"]
    assert whole.as_numpy("cumulative_logprob")[0] < 0
    (with_prompt,) = call(server, sampling_param_max_tokens=LENGTH)
    assert text(with_prompt) == PROMPT + answer
    assert [output.name for output in with_prompt.get_response().outputs] == ["text_output"]


def test_a_streamed_text_is_all_so_far(server: Server, answer: str) -> None:
    pieces = call(server, sampling_param_max_tokens=LENGTH, streaming=True, return_finish_reason=True)
    texts = [text(piece) for piece in pieces]
    assert texts[-1] == answer
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    reasons = [piece.as_numpy("finish_reason")[0] for piece in pieces]
    assert reasons == [b"None"] * (len(pieces) - 1) + [b"length"]


def test_stop_words_and_metrics(server: Server, answer: str) -> None:
    word = " of"
    (result,) = call(
        server,
        sampling_param_max_tokens=LENGTH,
        sampling_param_exclude_input_from_output=True,
        sampling_param_stop=[word],
        sampling_param_return_perf_metrics=True,
        return_finish_reason=True,
        return_stop_reason=True,
    )
    assert text(result) == answer[: answer.index(word)]
    assert result.as_numpy("finish_reason").tolist() == [b"stop"]
    assert result.as_numpy("stop_reason").tolist() == [word.encode()]
    assert result.as_numpy("kv_cache_hit_rate").shape == result.as_numpy("last_token_time_ns").shape == (1,)


def test_32_tokens_where_nobody_says(server: Server, served: Server) -> None:
    expected = ask(served, "text_generation", PROMPT, 32).text
    (result,) = call(server, sampling_param_exclude_input_from_output=True)
    assert text(result) == expected


def test_orders_to_stop(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="Request cancelled by client"):
        call(server, request_id="nobody", stop=True)
    with pytest.raises(InferenceServerException, match="a request id must be provided"):
        call(server, stop=True)


def test_what_it_refuses(server: Server) -> None:
    with pytest.raises(
        InferenceServerException, match="sampling_param_best_of is 2: this model gives one answer"
    ):
        call(server, sampling_param_best_of=2)
    with pytest.raises(
        InferenceServerException, match=r"sampling_param_temperature\) is nan|temperature is nan"
    ):
        call(server, sampling_param_temperature=float("nan"))
    with pytest.raises(InferenceServerException, match="return_stop_reason is True with 2 words"):
        call(server, sampling_param_stop=["a", "b"], return_stop_reason=True)


def test_images_are_refused(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="image_url is given: image input is not supported"):
        call(server, image_url=["http://a/b.png"])


def test_adapters(server: Server, answer: str) -> None:
    """Where the engine has them: by a folder's name, and by no other folder's."""
    named = {"lora_id": 3, "lora_name": ["mine"], "lora_path": ["mine"], "sampling_param_max_tokens": LENGTH}
    if server.deployment.lane != "trtllm-pytorch":
        for name in ("lora_id", "lora_name", "lora_path"):
            with pytest.raises(
                InferenceServerException,
                match=f"{name} is given: adapters .* not supported by backend {server.deployment.lane}",
            ):
                call(server, **{name: named[name]})
        return
    (result,) = call(server, **named, sampling_param_exclude_input_from_output=True)
    assert text(result) == answer
    for path in ("another", "../bin", "/etc"):
        with pytest.raises(InferenceServerException, match=f"lora_path is '{path}': it must be a folder in"):
            call(server, **named | {"lora_path": [path]})


def test_our_own_endpoint_is_there_too(server: Server, answer: str) -> None:
    assert post(server, "text_generation", {"text_input": PROMPT, "max_tokens": LENGTH}).text == answer
