"""What preflight says about hosts that are not this one: GPUs come from a stand-in for ``nvidia-smi``."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flightline.engine_build import shape
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hardware import cpu
from flightline.engine_build.memory import fp8_build_cost
from flightline.engine_build.plan import available_precisions
from flightline.engine_build.shape import look_up
from flightline.engine_build.trtllm import host, versions
from flightline.supervisor import preflight
from tests.engine_build.test_plan import LLAMA_8B
from tests.serving import free_ports
from tests.tiny import tiny_checkpoint

H200 = "NVIDIA H200, 9.0, 143771, 143000, 590.44.01"
A100 = "NVIDIA A100-SXM4-80GB, 8.0, 81920, 81000, 580.95.05"
L4 = "NVIDIA L4, 8.9, 23034, 22500, 575.57.08"
OLD = "NVIDIA H100, 9.0, 81559, 81000, 550.54.14"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
Report = Callable[..., tuple[int, str]]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Llama-3.1-8B without its weights: preflight reads none."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama: Path
) -> Report:
    """Runs preflight on a host with these GPUs; returns exit code and output."""

    def run(*gpus: str, model: Path | str = llama, docker: bool = True, **variables: str) -> tuple[int, str]:
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir(exist_ok=True)
        rows = "\n".join(gpus)
        for name, script in (
            ("nvidia-smi", f"cat <<'end'\n{rows}\nend" if gpus else "exit 9"),
            ("docker", "exit 0"),
        ):
            path = bin_dir / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755 if name != "docker" or docker else 0o644)
        monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, port in zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), free_ports(3), strict=True):
            monkeypatch.setenv(name, str(port))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(preflight, "_host_memory", lambda model, chosen: "")
        code = preflight.main(["--model", str(model), "--build-dir", str(tmp_path / "build")])
        said = capsys.readouterr()
        return code, (said.out + said.err).replace(f" MODEL={model}", "")

    return run


def row(output: str, lane: str, precision: str) -> str:
    (line,) = [line for line in output.splitlines() if line[2:].split()[:2] == [lane, precision]]
    return line


def test_an_h200_runs_every_lane(report: Report) -> None:
    code, output = report(H200)
    assert code == 0
    for lane in ("trtllm-engine", "trtllm-pytorch"):
        assert "64 KiB" in row(output, lane, "fp8")
        assert "compatible" in row(output, lane, "fp8") and "8.5 GiB" in row(output, lane, "fp8")
    assert "impossible" in row(output, "trtllm-engine", "nvfp4")
    assert "container  nvcr.io/nvidia/tritonserver:26.06-trtllm-python-py3 (TensorRT-LLM 1.2.1)" in output
    assert output.splitlines()[-1] == "next       make bench ENGINE=torch PRECISION=fp8"


def test_a_speed_near_the_one_that_was_measured(report: Report) -> None:
    """374 tokens/s on an H200 (benchmarks/h200); nothing where the memory's rate is not known."""
    _, output = report(H200)
    assert ": LlamaForCausalLM, 8,030M parameters, context 131072" in output
    (line,) = [line for line in output.splitlines() if line.startswith("speed ")]
    assert 300 < int(line.split()[2]) < 420 and "4.8 TB/s" in line
    assert "speed " not in report("NVIDIA Unheard-of, 9.0, 143771, 143000, 590.44.01")[1]
    assert "a core's copy just now" in report()[1]


def test_a_mixture_reads_the_experts_of_a_token(report: Report, tmp_path: Path) -> None:
    """3.1 GB a step in FP8, of 30 GB (embeddings in bf16 not counted)."""
    qwen3 = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    }  # fmt: skip
    folder = tmp_path / "qwen3-30b-a3b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(qwen3))
    (folder / "tokenizer.json").write_text("{}")
    _, output = report(H200, model=folder)
    (line,) = [line for line in output.splitlines() if line.startswith("speed ")]
    assert 600 < int(line.split()[2]) < 1000 and "reads 3." in line


def test_an_a100_has_no_fp8(report: Report) -> None:
    code, output = report(A100, ENGINE="trtllm-engine")
    assert code == 0
    assert "8.9" in row(output, "trtllm-engine", "fp8") and "impossible" in row(output, "torch", "fp8")
    assert "compatible" in row(output, "trtllm-engine", "int4_awq")
    assert "container  nvcr.io/nvidia/tritonserver:26.02-trtllm-python-py3" in output
    assert output.splitlines()[-1] == "next       make up ENGINE=trtllm-engine PRECISION=int8_sq"


def test_asked_for_what_cannot_be(report: Report) -> None:
    code, output = report(A100, ENGINE="trtllm-engine", PRECISION="fp8")
    assert code == 1
    assert "problem    PRECISION=fp8 is not possible" in output
    assert "next       make preflight ENGINE=trtllm-engine PRECISION=int8_sq" in output


def test_driver_older_than_every_container(report: Report) -> None:
    code, output = report(OLD, ENGINE="trtllm-pytorch")
    assert code == 1
    line = row(output, "trtllm-pytorch", "fp8")
    assert "impossible: driver 550.54.14 is older than 580" in line and "26.02" in line
    assert "compatible" in row(output, "torch", "fp8")


def test_neither_tensorrt_llm_nor_docker(report: Report) -> None:
    _, output = report(H200, docker=False)
    assert "TensorRT-LLM is not installed and there is no docker" in row(output, "trtllm-engine", "fp8")


@pytest.mark.parametrize(
    ("version", "says"), [("1.3.0", "no compiled engines any more"), ("0.21.0", "older than 1.0")]
)
def test_installed_release(report: Report, monkeypatch: pytest.MonkeyPatch, version: str, says: str) -> None:
    monkeypatch.setattr(versions, "installed", lambda: version)
    code, output = report(H200, ENGINE="trtllm-engine")
    assert code == 1 and says in row(output, "trtllm-engine", "fp8")


def test_memory(report: Report) -> None:
    _, output = report(L4, MAX_SEQ_LEN="65536")
    assert "impossible: MAX_SEQ_LEN=65536 needs" in row(output, "torch", "bf16")
    _, output = report(H200, MAX_SEQ_LEN="131072")
    assert "low on memory: only" in row(output, "torch", "bf16")
    assert "lower MAX_SEQ_LEN" in row(output, "torch", "bf16")
    _, output = report(H200, HOST_KV_GIB="99999")
    assert "impossible: HOST_KV_GIB=99999 does not fit the host of" in row(output, "torch", "bf16")


def test_more_gpus_than_there_are(report: Report) -> None:
    _, output = report(H200, ENGINE="trtllm-engine", TP="2")
    assert "TP times PP is 2, but 1 GPU(s) are visible" in row(output, "trtllm-engine", "fp8")
    _, output = report(H200, H200, ENGINE="trtllm-engine", TP="2")
    assert "4.2 GiB" in row(output, "trtllm-engine", "fp8")
    assert " TP=2" in output.splitlines()[-1]
    _, output = report(H200, ENGINE="torch", DP="2", TP="1")
    assert "DP=2 wants a part of the machine for each engine, but 1 GPU(s) are visible" in row(
        output, "torch", "fp8"
    )
    _, output = report(H200, H200, ENGINE="torch", DP="2", TP="1")
    assert output.splitlines()[-1] == "next       make bench ENGINE=torch PRECISION=fp8 DP=2"


def test_no_gpu(report: Report) -> None:
    _, output = report(model="", docker=False)
    assert "no NVIDIA GPU is visible" in row(output, "trtllm-engine", "fp8")
    assert "compatible" in row(output, "torch", "fp8")
    default = available_precisions("torch", cpu())[0]
    assert output.splitlines()[-1].startswith(f"next       make bench ENGINE=torch PRECISION={default}")
    assert "int8 " not in "".join(line for line in output.splitlines() if "trtllm-pytorch" in line)


def test_problems_that_would_come_later(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full:
        free = 10 << 20

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Full)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = report(H200, HTTP_PORT=port)
    assert code == 1
    assert "problem    disk: " in output and "set BUILD_DIR" in output
    assert (
        "problem    /dev/shm has 10 MiB free and 256 MiB are needed: start the container with --shm-size=1g"
        in output
    )
    assert f"problem    port {port} is taken by" in output and "set HTTP_PORT" in output


def test_gated_model_without_a_token(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, check: object) -> Path:
        raise BuildError(f"MODEL={model} is gated: accept its licence on its hub page, then set HF_TOKEN")

    monkeypatch.setattr(shape, "fetch_configuration", refuse)
    code, output = report(H200, model="meta-llama/Llama-3.1-8B-Instruct")
    assert code == 1
    assert output.strip().endswith("is gated: accept its licence on its hub page, then set HF_TOKEN")


def test_hub_that_does_not_answer(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    hang = threading.Event()
    monkeypatch.setattr(shape, "fetch_configuration", lambda model, check: hang.wait(20))
    monkeypatch.setattr(shape, "HUB_PATIENCE_S", 0.05)
    code, output = report(H200, model="owner/name")
    hang.set()
    assert code == 1 and "the hub did not answer within" in output


def test_sizes_from_the_configuration(llama: Path, tmp_path: Path) -> None:
    """As many weights as the checkpoint itself has."""
    assert look_up(str(llama)).shape == LLAMA_8B
    from flightline.engine_build.hf_format import stored_tensors, weight_files

    for family in ("llama", "gemma2"):
        folder = tiny_checkpoint(tmp_path / family, family)
        tensors = stored_tensors(weight_files(folder))
        counted = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
        found = look_up(str(folder)).shape
        assert found.parameters == sum(counted.values())
        assert found.linear_parameters == sum(
            n for name, n in counted.items() if name.endswith("_proj.weight")
        )


def test_fp8_build_of_an_8b_model() -> None:
    cost = fp8_build_cost(LLAMA_8B.parameters, LLAMA_8B.linear_parameters, on_gpu=True)
    assert 16 < cost.device_bytes / 2**30 < 30 and 30 < cost.host_bytes / 2**30 < 40


def test_the_embedded_models_size() -> None:
    """The constant, against the header of the file itself."""
    from flightline.engine_build.checkpoint import EMBEDDED_FILE, EMBEDDED_PACKAGE
    from flightline.engine_build.gguf_file import GgufFile

    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    assert spec is not None and spec.origin is not None
    facts = GgufFile(Path(spec.origin).parent / EMBEDDED_FILE).facts
    known = shape.EMBEDDED_SHAPE
    assert (known.layers, known.max_position_embeddings) == (
        facts["llama.block_count"],
        facts["llama.context_length"],
    )
    hidden, heads, kv_heads = (
        facts[f"llama.{name}"]
        for name in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    assert (known.kv_heads, known.head_dim) == (kv_heads, hidden // heads)
    layer = 2 * hidden * known.head_dim * (heads + kv_heads) + 3 * hidden * facts["llama.feed_forward_length"]
    assert known.linear_parameters == known.layers * layer
    others = hidden * (1 + 2 * known.layers) + facts["llama.vocab_size"] * hidden
    assert known.parameters == known.linear_parameters + others


def test_it_needs_nothing_but_python(tmp_path: Path) -> None:
    """No package is installed yet when it is most needed; torch alone would take longer than all of it."""
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), map(str, free_ports(3)), strict=True))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "flightline.supervisor.preflight"],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            "PATH": "/bin",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "BUILD_DIR": str(tmp_path),
            **ports,
        },
    )
    assert "compatible" in row(done.stdout, "torch", "fp8"), done.stderr
    assert done.stdout.splitlines()[-1].startswith("next       make bench ENGINE=torch")


def test_gpus_that_share_a_model(report: Report) -> None:
    """What each would hold, for as many as there are and more; and what to type."""
    _, output = report(H200, H200, ENGINE="torch", TP="2", PRECISION="fp8")
    lines = {line.split()[0]: line for line in output.splitlines() if line}
    assert (
        "of weights" in lines["TP=1"]
        and "tokens" in lines["TP=2"]
        and "(2 of 8 GPUs are here)" in lines["TP=8"]
    )
    assert "does not tell" in lines["GPUs"]
    assert " TP=2" in output.splitlines()[-1]


@pytest.mark.parametrize(("link", "told"), [("NV18", "NVLink"), ("SYS", "PCIe")])
def test_links_between_gpus(link: str, told: str) -> None:
    text = f"\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \t{link}\t0-63\nGPU1\t{link}\t X \t0-63\n\nLegend:\n"
    assert host.parse_links(text) == told
    assert host.parse_links("Failed to initialize NVML") == ""
