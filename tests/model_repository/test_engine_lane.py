"""Lane trtllm-engine on the real Triton: our repository, with only NVIDIA's C++ backend replaced.

``tests/trtllm_double/backend_model.py`` stands in for it, as a Python model with the same tensors and parameters.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from flightline.engine_build.trtllm import host
from flightline.supervisor import triton
from flightline.supervisor.serve import Server, ServeSettings
from flightline.supervisor.settings import ServeError, deployed
from flightline.supervisor.trtllm import guard
from flightline.supervisor.trtllm.in_triton import parse
from tests.model_repository.endpoints import (
    PATIENCE_S,
    Call,
    GrpcError,
    ask,
    in_pieces,
    post,
    stop,
    wait_until,
)
from tests.serving import DOUBLE, GPU, tensorrt_llm_lane

TWO_ENDS = [1, 5]
PROMPT = "the quick brown"
ENDPOINTS = ("ensemble", "text_generation", "tensorrt_llm_bls")
WILD = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "end_id": -1}


def replace_backend(build: Path, model: str = "tensorrt_llm") -> None:
    """The one change to what was built: the backend's name, and the model that stands for it."""
    config = build / "model_repository" / model / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    assert 'backend: "tensorrtllm"' in text
    config.write_text(text.replace('backend: "tensorrtllm"', 'backend: "python"'), encoding="utf-8")
    shutil.copyfile(DOUBLE / "backend_model.py", config.parent / "1/model.py")


@pytest.fixture(scope="module")
def engine_lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTLLM_DOUBLE_MODEL", str(folder / "tiny"))
        patch.setenv("TRTLLM_DOUBLE_LOG", str(folder / "log"))
        with tensorrt_llm_lane(folder, "trtllm-engine", prepare=replace_backend, baseline=False) as server:
            yield server


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with ``DECOUPLED=0``: NVIDIA's models answer a request once."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTLLM_DOUBLE_MODEL", str(folder / "tiny"))
        patch.setenv("DECOUPLED", "0")
        with tensorrt_llm_lane(folder, "trtllm-engine", prepare=replace_backend, baseline=False) as server:
            patch.delenv("DECOUPLED")  # it is for this build alone
            yield server


@pytest.mark.slow
def test_not_decoupled(at_once: Server, served: Server) -> None:
    expected = ask(served, "hf_baseline", PROMPT, 24).text
    for endpoint in ENDPOINTS:
        assert ask(at_once, endpoint, PROMPT, 24).text == expected
        answer = post(
            at_once, endpoint, {"text_input": PROMPT, "max_tokens": 24, "exclude_input_in_output": True}
        )
        assert answer.text == expected
    with pytest.raises(GrpcError, match=r"num_return_sequences is 2: .* model is decoupled"):
        ask(at_once, "tensorrt_llm_bls", PROMPT, 4, num_return_sequences=2)
    # Ours still streams; what comes from a model that does not is one piece.
    assert ask(at_once, "text_generation", PROMPT, 24, stream=True).text == expected
    word = next(word for word in re.findall(" [a-z]+", expected) if len(word) > 2)
    stopped = ask(at_once, "text_generation", PROMPT, 24, stop_words=[word])
    assert stopped.text == expected[: expected.index(word)]


def last_request(server: Server) -> dict:
    """The tensors of the last request that the backend got, but for orders to stop."""
    lines = (server.settings.build_dir.parent / "log").read_text(encoding="utf-8").splitlines()
    return [values for values in map(json.loads, lines) if "stop" not in values][-1]


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation", "tensorrt_llm_bls"])
def test_the_backend_gets_what_it_can_do(engine_lane: Server, endpoint: str) -> None:
    extra = {
        "lora_task_id": 7,
        "lora_weights": np.full((1, 2, 3), 0.5, np.float16),
        "lora_config": np.array([[[0, 1, 2]]], np.int32),
        "guided_decoding_guide_type": "regex",
        "guided_decoding_guide": "a+",
        "embedding_bias_words": [" of", "x"],
        "embedding_bias_weights": [1.5, -2.0],
        "prompt_vocab_size": 3,
    }
    ask(engine_lane, endpoint, PROMPT, 4, **extra)
    got = last_request(engine_lane)
    assert got["lora_weights"] == [[[0.5] * 3] * 2] and got["lora_config"] == [[[0, 1, 2]]]
    assert np.ravel(got["lora_task_id"]).tolist() == [7] and np.ravel(got["prompt_vocab_size"]).tolist() == [
        3
    ]
    assert got["guided_decoding_guide_type"] == [["regex"]] and got["guided_decoding_guide"] == [["a+"]]
    assert sorted(set(got["embedding_bias"][0])) == [-2.0, 0.0, 1.5]


@pytest.mark.slow
def test_beams_are_for_the_ensemble(engine_lane: Server) -> None:
    inputs = {"beam_width": 2, "length_penalty": 0.5, "return_context_logits": True}
    ask(engine_lane, "ensemble", PROMPT, 4, **inputs)
    got = last_request(engine_lane)
    assert [np.ravel(got[name]).tolist() for name in ("beam_width", "len_penalty")] == [[2], [0.5]]
    for endpoint in ("text_generation", "tensorrt_llm_bls"):
        with pytest.raises(GrpcError, match="beam_width is 2: beam search is not supported by this model"):
            ask(engine_lane, endpoint, PROMPT, 4, **inputs)


@pytest.mark.slow
def test_several_answers(engine_lane: Server) -> None:
    """NVIDIA's backend gives them; what drives it for text asks for one after the other, with seeds of their own."""
    ask(engine_lane, "ensemble", PROMPT, 4, num_return_sequences=3)
    assert np.ravel(last_request(engine_lane)["num_return_sequences"]).tolist() == [3]
    single = [ask(engine_lane, "text_generation", PROMPT, 8, seed=3 + n, **WILD).text for n in range(3)]
    for endpoint in ("text_generation", "tensorrt_llm_bls"):
        answer = ask(engine_lane, endpoint, PROMPT, 8, seed=3, num_return_sequences=3, **WILD)
        found = zip([index.item() for index in answer.column("sequence_index")], answer.texts, strict=True)
        assert [text for _, text in sorted(found)] == single
    ask(engine_lane, "text_generation", PROMPT, 4, num_return_sequences=2, **WILD)
    assert "seed" in last_request(engine_lane), "the backend has one seed for all that bring none"


@pytest.mark.slow
def test_what_text_generation_adds(engine_lane: Server) -> None:
    """As far as NVIDIA's tensors can say it."""
    free = ask(engine_lane, "text_generation", PROMPT, 12, end_id=-1, return_token_ids=True)
    ids = free.column("token_ids")[-1].ravel().tolist()
    asked = {"stop_token_ids": [9, ids[5]], "return_finish_reason": True, "return_token_ids": True}
    answer = ask(engine_lane, "text_generation", PROMPT, 12, ignore_eos=True, **asked)
    assert answer.column("token_ids")[-1].ravel().tolist() == ids[: ids.index(ids[5])]
    assert answer.column("finish_reason")[-1].item() == b"end_id"
    assert last_request(engine_lane)["stop_words_list"] == [[[9, ids[5]], [1, 2]]]
    ask(engine_lane, "text_generation", PROMPT, 2, logit_bias_ids=[4, 6], logit_bias_weights=[1.5, -2.0])
    assert last_request(engine_lane)["embedding_bias"][0][3:7] == [0.0, 1.5, 0.0, -2.0]
    for name, value in (("min_p", 0.5), ("top_logprobs", 3)):
        with pytest.raises(
            GrpcError, match=f"{name} is {value}: .* is not supported by backend trtllm-engine"
        ):
            ask(engine_lane, "text_generation", **{name: value})


@pytest.mark.slow
def test_both_endpoints_answer_like_the_baseline(engine_lane: Server, served: Server) -> None:
    expected = ask(served, "hf_baseline", PROMPT, 24).text
    for endpoint in ENDPOINTS:
        assert ask(engine_lane, endpoint, PROMPT, 24).text == expected
    # NVIDIA's own backend puts the prompt first unless it is told not to.
    assert post(engine_lane, "ensemble", {"text_input": PROMPT, "max_tokens": 24}).text == PROMPT + expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_streamed_text_is_exact_where_tokens_cut_characters(engine_lane: Server, seed: int) -> None:
    inputs = {"prompt": "the 日本 dog 👩‍🚀", "max_tokens": 80, "seed": seed, **WILD}
    whole = ask(engine_lane, "ensemble", **inputs)  # all tokens decoded at once
    assert ask(engine_lane, "text_generation", **inputs).text == whole.text
    assert in_pieces(engine_lane, "text_generation", 3, **inputs).text == whole.text


@pytest.mark.slow
def test_stop_words_do_not_leak_and_the_engine_is_told(engine_lane: Server) -> None:
    text = ask(engine_lane, "text_generation", "the dog", 60, end_id=-1).text
    word = text[20:24]
    inputs = {"max_tokens": 400, "end_id": -1, "stop_words": [word], "return_num_output_tokens": True}
    before = counted_requests_of_the_backend(engine_lane)
    answer = ask(engine_lane, "text_generation", "the dog", **inputs)
    assert answer.text == text[: text.index(word)]
    assert answer.last("num_output_tokens") < 60
    wait_until(
        lambda: requests_of_the_backend(engine_lane) == before + 2
    )  # the request, and the order to stop it


def requests_of_the_backend(server: Server) -> int:
    client = grpcclient.InferenceServerClient(server.settings.grpc_url)
    statistics = client.get_inference_statistics("tensorrt_llm").model_stats[0].inference_stats
    client.close()
    return statistics.success.count


def counted_requests_of_the_backend(server: Server) -> int:
    """The same when nothing of earlier requests is still to be counted: Triton counts after it has answered."""
    counts = [-1, requests_of_the_backend(server)]
    while counts[-1] != counts[-2]:
        time.sleep(0.5)
        counts.append(requests_of_the_backend(server))
    return counts[-1]


@pytest.mark.slow
def test_log_probs_and_counts(engine_lane: Server) -> None:
    asked = {"return_log_probs": True, "return_num_output_tokens": True, "end_id": -1}
    answer = ask(engine_lane, "text_generation", "the dog", 10, stream=True, **asked)
    log_probs = np.concatenate([array.ravel() for array in answer.column("output_log_probs")])
    assert answer.last("num_output_tokens") == len(log_probs) == 10 and (log_probs < 0).all()


@pytest.mark.slow
def test_times_are_of_the_backends_clock_alone(engine_lane: Server) -> None:
    """That clock is not ours (the double's is days ahead): a time of each would make a request take days."""
    for endpoint in ("ensemble", "text_generation"):
        for stream in (False, True):
            answer = ask(
                engine_lane, endpoint, "the dog", 10, end_id=-1, stream=stream, return_perf_metrics=True
            )
            names = ("arrival", "first_scheduled", "first_token", "last_token")
            times = [answer.last(f"{name}_time_ns") for name in names]
            assert times == sorted(times) and times[-1] - times[0] < 10**9 * PATIENCE_S, (
                endpoint,
                stream,
                times,
            )


@pytest.mark.slow
def test_leaving_and_stopping(engine_lane: Server) -> None:
    inputs = {"text_input": "the dog", "max_tokens": 480, "end_id": -1, "stream": True}
    gone = Call(engine_lane, "text_generation", inputs)
    gone.next()
    gone.close()
    call = Call(engine_lane, "ensemble", inputs, request_id="one")
    call.next()
    assert stop(engine_lane, "one").responses == []
    call.read()
    assert ask(engine_lane, "text_generation", "x", 4).text  # and the server goes on


def test_every_end_token_of_the_model_is_sent(tmp_path: Path) -> None:
    """Llama 3.1 has three; the contract's ``end_id`` is one of them."""
    from flightline.model_repository.shared.bls_engine import BlsEngine
    from flightline.torch_engine.core.request import GenerationRequest, ModelInfo
    from flightline.torch_engine.text.stream import TokenBytes

    info = ModelInfo(10, 512, (128001, 128008, 128009), "m")
    engine = BlsEngine(None, info, TokenBytes([b"a"]))
    sent = engine._inputs(GenerationRequest([1, 2], 8))
    assert sent["end_id"].item() == 128001
    assert sent["stop_words_list"].tolist() == [[[128008, 128009], [1, 2]]]
    alone = engine._inputs(GenerationRequest([1, 2], 8, end_id=-1))
    assert alone["end_id"].item() == -1 and "stop_words_list" not in alone


def test_a_server_for_each_gpu(tmp_path: Path) -> None:
    """Leader mode (fact sheet, section 5.1): world size = tp * pp, own shared-memory names, one rank that serves."""
    home = triton.Triton(Path("/opt/tritonserver"), in_container=True)
    command = triton.command(home, ServeSettings(), Path("/models"), Path("/backends"), "prefix", 2)
    assert "mpirun" in command and command.count(":") == 1
    first, second = command[: command.index(":")], command[command.index(":") :]
    for rank, part in enumerate((first, second)):
        assert part[part.index("-n") + 1] == "1"
        assert f"--backend-config=python,shm-region-prefix-name=prefix{rank}_" in part
        assert "--disable-auto-complete-config" in part
    assert "--model-control-mode=none" in first and "--load-model=tensorrt_llm" not in first
    assert "--model-control-mode=none" not in second
    assert {"--model-control-mode=explicit", "--load-model=tensorrt_llm"} <= set(second)


def test_state_from_the_backends_own_metrics() -> None:
    text = (
        'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 3\n'
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 12\n'
        'nv_trt_llm_general_metrics{general_type="iteration_counter",model="tensorrt_llm",version="1"} 1.5e3\n'
    )
    stats = parse(text)
    assert (stats.waiting_requests, stats.kv_blocks_used, stats.iterations) == (3, 12, 1500)


# -- what the server refuses to start ------------------------------------------------------------------


def engine_folder(folder: Path, **hardware: object) -> Path:
    (folder / "rank0.engine").write_bytes(b"engine")
    manifest = {
        "plan": {"precision": "fp8", "tp": 1, "pp": 1},
        "hardware": {"tensorrt_llm": "1.2.1", "capability": [9, 0], "name": "NVIDIA H200", **hardware},
        "files": {"rank0.engine": 6},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


HERE = guard.Facts("1.2.1", (GPU,))
L4 = host.Gpu("NVIDIA L4", (8, 9), 24 << 30, 23 << 30, "590.44.01")
A100 = host.Gpu("NVIDIA A100", (8, 0), 80 << 30, 79 << 30, "590.44.01")


def test_engine_where_it_was_built(tmp_path: Path) -> None:
    assert guard.check("trtllm-engine", engine_folder(tmp_path), HERE) == 1


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (guard.Facts("1.1.0", (GPU,)), "built by TensorRT-LLM 1.2.1 and 1.1.0 is installed"),
        (guard.Facts("1.3.0", (GPU,)), "no compiled engines any more"),
        (guard.Facts("0.21.0", (GPU,)), "older than 1.0"),
        (
            guard.Facts(None, (GPU,)),
            "TensorRT-LLM is not installed here: run inside nvcr.io/nvidia/tritonserver",
        ),
        (guard.Facts("1.2.1", (L4,)), r"built on NVIDIA H200 \(9.0\) and this is NVIDIA L4 \(8.9\)"),
        (guard.Facts("1.2.1", (A100,)), r"A100 has compute capability 8.0 .*PRECISION=int8_sq"),
        (guard.Facts("1.2.1", ()), "needs an NVIDIA GPU and none is visible"),
    ],
)
def test_engine_elsewhere(tmp_path: Path, facts: guard.Facts, says: str) -> None:
    with pytest.raises(ServeError, match=says) as refusal:
        guard.check("trtllm-engine", engine_folder(tmp_path), facts)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_is_not_bound_to_a_release(tmp_path: Path) -> None:
    other = guard.Facts("1.3.0", (L4,))
    assert guard.check("trtllm-pytorch", engine_folder(tmp_path), other) == 1


def test_world_size(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["plan"]["tp"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ServeError, match=r"runs on 2 GPUs \(TP 2, PP 1\) and 1 are visible"):
        guard.check("trtllm-engine", folder, HERE)
    with pytest.raises(ServeError, match="has 1 rank files and its manifest says 2 GPUs"):
        guard.check("trtllm-engine", folder, guard.Facts("1.2.1", (GPU, GPU)))


def test_one_engine_over_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is started on its node; this machine needs only its own GPUs."""
    monkeypatch.setenv("FLIGHTLINE_MPI_HOSTS", "a.group:1, b.group:1")
    settings = ServeSettings.from_environment()
    home = triton.Triton(Path("/opt/tritonserver"), in_container=True)
    command = triton.command(home, settings, Path("/models"), Path("/backends"), "prefix", 2)
    hosts = [command[at + 1] for at, word in enumerate(command) if word == "--host"]
    assert hosts == ["a.group", "b.group"]
    folder = engine_folder(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["plan"]["tp"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "rank1.engine").write_bytes(b"engine")
    assert guard.check("trtllm-engine", folder, HERE, settings.rank_hosts) == 2
    with pytest.raises(ServeError, match="MPI_HOSTS names 3 GPUs and the engine runs on 2: name as many"):
        guard.check("trtllm-engine", folder, HERE, (*settings.rank_hosts, "c"))
    with pytest.raises(ServeError, match="MPI_HOSTS is for backend trtllm-engine"):
        guard.check("trtllm-pytorch", folder, HERE, settings.rank_hosts)
    monkeypatch.setenv("FLIGHTLINE_MPI_HOSTS", "a.group")
    with pytest.raises(ServeError, match=r"'a.group' is not host:GPUs: write for example node-0:8,node-1:8"):
        ServeSettings.from_environment()


def test_half_built(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path)
    (folder / "rank0.engine").write_bytes(b"eng")
    with pytest.raises(ServeError, match=r"rank0.engine is missing or cut short: make build-engines again"):
        guard.check("trtllm-engine", folder, HERE)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(
        ServeError, match=r"manifest.json is missing or damaged, so the engine may be half-built"
    ):
        guard.check("trtllm-engine", folder, HERE)


def test_gpus_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--id=*) echo asked >&2; exit 6;; esac\n'
        "echo 'NVIDIA H200, 9.0, 143771, 143000, 590.44.01'\n"
        "echo 'NVIDIA A100-SXM4-80GB, 8.0, 81920, [N/A], 590.44.01'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (only,) = host.gpus()
    assert (only.name, only.capability, only.driver) == ("NVIDIA H200", (9, 0), "590.44.01")
    assert only.memory_free == 143000 << 20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert host.gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert host.gpus() == []


def test_unknown_lane(tmp_path: Path) -> None:
    values = {"model": "m", "lane": "vllm", "precision": "fp8"}
    values |= {
        **dict.fromkeys(("engine_dir", "model_dir", "source_dir", "manifest"), str(tmp_path)),
        "model_repository": str(tmp_path),
        "dp": 1,
        "hardware": {"device": "cuda"},
    }
    (tmp_path / "deployment.json").write_text(json.dumps(values))
    with pytest.raises(ServeError, match=r"backend vllm of .* is unknown: run 'make build-engines' again"):
        deployed(tmp_path)
