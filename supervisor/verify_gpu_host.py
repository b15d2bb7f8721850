"""``flightline verify``: confirms on a machine with a GPU what docs/VERIFICATION.md could only check against facts.

Each check is one line: PASS, FAIL with the reason, or SKIP with what it would need. Exit code 0 if something passed
and nothing failed. docker/verify.sh runs it where it can see the most: inside the server's image, beside a running
server.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flightline.engine_build.trtllm import host, parameters, versions
from flightline.engine_build.trtllm.containers import driver_version, newest_for

ROOT = Path(__file__).resolve().parent.parent
MODELS = Path("/app/all_models/inflight_batcher_llm")
QUANTIZE = Path("/app/examples/quantization/quantize.py")
BACKEND = Path("/opt/tritonserver/backends/tensorrtllm")
ALWAYS_READ = ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
FAMILIES = ("request", "kv_cache_block", "inflight_batcher", "general")
TRIES = 3
"""Of what a busy host may spoil."""


class Skip(Exception):
    """What the check needs is not here."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Skip(what)


def gpu_and_driver() -> str:
    found = host.gpus()
    need(bool(found), "no GPU is visible to nvidia-smi")
    first = found[0]
    container = newest_for(driver_version(first.driver))
    assert container is not None, f"driver {first.driver} is older than every container that we know"
    return (
        f"{len(found)} x {first.name}, {first.capability}, driver {first.driver}: container {container.tag}"
    )


def release() -> str:
    version = versions.installed()
    need(version is not None, "TensorRT-LLM is not installed")
    assert version is not None
    refusals = {
        lane: versions.refusal(lane, version) for lane in (versions.ENGINE_LANE, versions.PYTORCH_LANE)
    }
    assert not refusals[versions.PYTORCH_LANE], refusals[versions.PYTORCH_LANE]
    return f"TensorRT-LLM {version}" + (" without compiled engines" if refusals[versions.ENGINE_LANE] else "")


def container_layout() -> str:
    need(Path("/app").is_dir(), "not inside NVIDIA's container")
    for path in (MODELS, QUANTIZE, BACKEND / "trtllmExecutorWorker"):
        assert path.exists(), f"{path} is missing"
    assert str(BACKEND / "trtllmExecutorWorker") == parameters.WORKER
    return "templates, quantize.py and the executor's worker are where we expect them"


def home() -> str:
    """FlashInfer and Triton's language make their folders there when they are imported."""
    need(Path("/app").is_dir(), "not inside NVIDIA's container")
    for name in (".cache", ".triton"):
        folder = Path.home() / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return f"user {os.getuid()} can write to {Path.home()}"


def tritons_client() -> str:
    """Refuses an old protobuf when it is imported."""
    need(Path("/app").is_dir(), "not inside NVIDIA's container")
    import google.protobuf
    import grpc
    from tritonclient.grpc import model_config_pb2

    assert model_config_pb2.ModelConfig
    return f"tritonclient imports with protobuf {google.protobuf.__version__} and grpcio {grpc.__version__}"


def parameters_always_read() -> str:
    """The backend does not load a ``tensorrt_llm`` that leaves one of them out."""
    config = (
        Path(os.environ.get("BUILD_DIR") or ROOT / "build") / "model_repository/tensorrt_llm/config.pbtxt"
    )
    need(config.is_file(), f"{config} is not here: build first")
    text = config.read_text(encoding="utf-8")
    need('backend: "tensorrtllm"' in text, "the model repository is not of ENGINE=trtllm-engine")
    missing = [name for name in ALWAYS_READ if f'"{name}"' not in text]
    assert not missing, f"{config} leaves out {', '.join(missing)}"
    return f"{', '.join(ALWAYS_READ)} are in {config}"


def quantize_arguments() -> str:
    need(QUANTIZE.is_file(), f"{QUANTIZE} is not here")
    return _flags_exist(QUANTIZE.read_text(encoding="utf-8"), _used("quantize"), "quantize.py")


def build_flags() -> str:
    need(shutil.which("trtllm-build") is not None, "trtllm-build is not on PATH")
    done = subprocess.run(["trtllm-build", "--help"], capture_output=True, text=True, timeout=300)
    return _flags_exist(done.stdout + done.stderr, _used("build"), "trtllm-build --help")


def _used(function: str) -> set[str]:
    from flightline.engine_build.trtllm import commands

    return set(re.findall(r'"(--[a-z_0-9]+)"', inspect.getsource(getattr(commands, function))))


def _flags_exist(text: str, used: set[str], where: str) -> str:
    missing = sorted(flag for flag in used if not re.search(rf"{flag}\b", text))
    assert not missing, f"{where} does not know {', '.join(missing)}"
    return f"{where} knows all {len(used)} flags that we give"


def backend_parameters() -> str:
    config = MODELS / "tensorrt_llm/config.pbtxt"
    need(config.is_file(), f"{config} is not here")
    theirs = set(re.findall(r'^\s*key: "(\w+)"', config.read_text(encoding="utf-8"), flags=re.M))
    unknown, extra = (
        sorted(parameters.PARAMETERS.keys() - theirs),
        sorted(theirs - parameters.PARAMETERS.keys()),
    )
    assert not unknown, f"the backend's template lacks {', '.join(unknown)}"
    return f"{len(theirs)} parameters are ours" + (f"; new ones: {', '.join(extra)}" if extra else "")


def template_tensors() -> str:
    facts_file = ROOT / "tests/model_repository/data/io_tables.json"
    need(facts_file.is_file() and MODELS.is_dir(), "needs the project's tests/ and NVIDIA's container")
    facts, compared = json.loads(facts_file.read_text()), 0
    for model, sides in facts.items():
        text = (MODELS / model / "config.pbtxt").read_text(encoding="utf-8")
        names = re.findall(r'\bname: "(\w+)"', text)
        expected = [each["name"] for side in ("input", "output") for each in sides[side]]
        missing = sorted(set(expected) - set(names))
        assert not missing, f"{model}: the container's template lacks {', '.join(missing)}"
        compared += len(expected)
    return f"{compared} tensors of {len(facts)} models are in the container's templates"


def llm_api_surface() -> str:
    need(versions.installed() is not None, "TensorRT-LLM is not installed")
    import numpy as np
    import tensorrt_llm
    import tensorrt_llm.llmapi

    from flightline.supervisor.trtllm.llm_api import LlmConfig, llm_arguments, retention, sampling_arguments
    from flightline.torch_engine.core.request import GenerationRequest, SamplingParams
    from flightline.torch_engine.text.stream import TokenBytes

    version = tensorrt_llm.__version__
    arguments = llm_arguments(LlmConfig("m"), version, tensorrt_llm.llmapi)
    args_class = tensorrt_llm.llmapi.llm_args.TorchLlmArgs
    missing = sorted(arguments.keys() - set(args_class.model_fields))
    assert not missing, f"LLM() does not take {', '.join(missing)}"
    sampling = SamplingParams(0.7, 40, 0.9, 1.1, 0.1, 0.1, 7)
    request = GenerationRequest([1], 8, sampling, min_tokens=2, bad_ids=((2,), (3, 4)), return_log_probs=True)
    tokens = TokenBytes([b"a", b"b", b"c", b"d", b"e"])
    tensorrt_llm.SamplingParams(**sampling_arguments(request, (1, 2), tokens, versions.habits(version)))
    taken = inspect.signature(tensorrt_llm.LLM.generate_async).parameters
    if versions.habits(version).retention:
        lists = {"starts": [0], "ends": [-1], "priorities": [80]}
        inputs = {f"retention_token_range_{name}": np.array([values]) for name, values in lists.items()}
        kept = dataclasses.replace(request, lane_inputs=inputs)
        assert retention(kept, versions.habits(version), tensorrt_llm.llmapi)
        assert "kv_cache_retention_config" in taken, f"generate_async takes {', '.join(taken)}"
    if versions.habits(version).logits:
        assert "cache_salt" in taken, f"generate_async takes {', '.join(taken)}"
    for name in ("generate_async", "get_stats_async", "shutdown"):
        assert hasattr(tensorrt_llm.LLM, name), f"LLM has no {name}"
    sampler = ", ".join(f"{name}={value!r}" for name, value in versions.habits(version).sampler.items())
    return (
        f"LLM() takes our {len(arguments)} arguments (sampler: {sampler or 'its own'}), SamplingParams ours"
    )


def answers(url: str) -> Callable[[], str]:
    def check() -> str:
        need(_answers(f"{url}/v2/health/ready"), f"no server answers at {url}: make up (or make serve) first")
        prompt = "The capital of France is"
        body = {"text_input": prompt, "max_tokens": 16, "exclude_input_in_output": True}
        text = _same_text(
            lambda: _generate(url, "ensemble", body), lambda: _generate(url, "text_generation", body)
        )
        assert text.strip(), "the ensemble's answer is empty"
        assert not text.startswith(prompt), "the prompt is in the answer"
        same = _shared_prefix(text, _generate(url, "hf_baseline", body))
        return f"{text!r}; {same:.0%} of it as in Transformers"

    return check


def streaming(url: str) -> Callable[[], str]:
    def check() -> str:
        need(_answers(f"{url}/v2/health/ready"), f"no server answers at {url}")
        body = {"text_input": "Write three emoji and the word 日本:", "max_tokens": 48, "stream": True}
        pieces: list[str] = []

        def streamed() -> str:
            pieces[:] = _stream(url, "text_generation", body)
            return "".join(pieces)

        for _ in range(
            TRIES
        ):  # a busy host may have a small model's whole answer before it sends the first piece
            _same_text(streamed, lambda: _generate(url, "text_generation", {**body, "stream": False}))
            if len(pieces) > 1:
                break
        assert len(pieces) > 1, f"the whole text came in one piece, {TRIES} times"
        return f"{len(pieces)} pieces add up"

    return check


def metrics(url: str) -> Callable[[], str]:
    def check() -> str:
        need(_answers(url), f"no metrics at {url}")
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        missing = [name for name in FAMILIES if f"nv_trt_llm_{name}_metrics{{" not in text]
        assert not missing, f"no nv_trt_llm_{missing[0]}_metrics"
        return f"all {len(FAMILIES)} families are there"

    return check


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _generate(url: str, model: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(f"{url}/v2/models/{model}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(json.load(response)["text_output"])


def _stream(url: str, model: str, body: dict[str, Any]) -> list[str]:
    request = urllib.request.Request(f"{url}/v2/models/{model}/generate_stream", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as response:
        lines = [line.decode() for line in response if line.strip()]
    return [json.loads(line.removeprefix("data: "))["text_output"] for line in lines]


def _same_text(one: Callable[[], str], other: Callable[[], str]) -> str:
    """The text that both give, in one of :data:`TRIES`: beside other requests (the supervisor's probe is one) the sums
    of a step are added up in another order, which decides between two tokens that are equally likely.
    """
    texts = []
    for _ in range(TRIES):
        texts.append((one(), other()))
        if texts[-1][0] == texts[-1][1]:
            return texts[-1][0]
    raise AssertionError(f"the same request gave two texts, {TRIES} times: {texts[-1]}")


def _shared_prefix(ours: str, theirs: str) -> float:
    """Share of ``theirs`` up to the first difference."""
    same = len(os.path.commonprefix([ours, theirs]))  # noqa: RUF071 (text, not paths)
    return same / max(1, len(theirs))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flightline verify", description=__doc__.splitlines()[0])
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="HTTP address (%(default)s)")
    parser.add_argument(
        "--metrics", default="http://127.0.0.1:8002/metrics", help="metrics page (%(default)s)"
    )
    options = parser.parse_args(arguments)
    checks: dict[str, Callable[[], str]] = {
        "gpu and driver": gpu_and_driver,
        "release": release,
        "container layout": container_layout,
        "home folder": home,
        "tritonclient": tritons_client,
        "quantize.py arguments": quantize_arguments,
        "trtllm-build flags": build_flags,
        "backend parameters": backend_parameters,
        "parameters always read": parameters_always_read,
        "template tensors": template_tensors,
        "LLM API surface": llm_api_surface,
        "answers": answers(options.server),
        "streaming": streaming(options.server),
        "metrics": metrics(options.metrics),
    }
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for name, check in checks.items():
        try:
            outcome, detail = "PASS", check()
        except Skip as reason:
            outcome, detail = "SKIP", str(reason)
        except Exception as error:  # one broken check must not hide the others
            outcome, detail = "FAIL", str(error) or repr(error)
        counts[outcome] += 1
        print(f"{outcome}  {name:<24}{detail}", flush=True)
    print(", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items()))
    return 0 if counts["PASS"] and not counts["FAIL"] else 1


if __name__ == "__main__":
    sys.exit(main())
