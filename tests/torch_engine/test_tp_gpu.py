"""A model that GPUs share is the model of one: tokens, draws, graphs and NCCL.

``python3 -m pytest -q -m gpu --noconftest tests/torch_engine/test_tp_gpu.py`` on a machine with two GPUs or more.
Without, a part of it runs in Triton's interpreter over gloo and without graphs (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest, Guide, SamplingParams
from flightline.torch_engine.model.coded import Coded
from tests.tiny import tiny_checkpoint
from tests.torch_engine.test_gpu_engine import Fp8View, small_engine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPUS = torch.cuda.device_count()
ON_GPU = GPUS >= 2 and not INTERPRETED
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not (ON_GPU or INTERPRETED),
        reason="needs two CUDA devices",
    ),
]
RANKS = [2, 4] if GPUS >= 4 and ON_GPU else [2]
COUNT = 3 if INTERPRETED else 12
"""Tokens of an answer: a step takes a second in the interpreter."""
ROOT = Path(__file__).parents[2]


class SharedFp8View(Fp8View):
    """Codes of one scale for the whole tensor, whatever part of it a rank has: so do checkpoints keep theirs."""

    def fused_coded(
        self, modules: list[str], dtype: torch.dtype, device: torch.device
    ) -> tuple[Coded, torch.Tensor | None]:
        weight, bias = self.fused(modules, torch.float32)
        scales = torch.full((len(weight), 1), 4 / 448)
        codes = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        coded = Coded(codes, scales, weight.shape[1], input_scale=torch.tensor(16 / 448)).to(device)
        return coded, None if bias is None else bias.to(device, dtype)


def model(folder: Path, family: str) -> Path:
    return tiny_checkpoint(folder, family, num_hidden_layers=1 if INTERPRETED else 2)


def requests() -> list[GenerationRequest]:
    """Of every kind that takes another way to its tokens; the first are greedy."""
    drawn = SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=3, repetition_penalty=1.3)
    prompts = ([5, 9, 4], list(range(3, 22 if INTERPRETED else 40)), [7, 8])
    every = [
        *(GenerationRequest(prompt, COUNT, end_id=-1) for prompt in prompts),
        GenerationRequest(prompts[1], COUNT, drawn, end_id=-1),
        GenerationRequest(prompts[0], COUNT, end_id=-1, return_log_probs=True, top_log_probs=2),
        GenerationRequest(prompts[2], COUNT, min_tokens=COUNT),
    ]
    return every[2:5] if INTERPRETED else every


def told(
    folder: Path, asked: list[GenerationRequest], fp8: bool = False, **settings: Any
) -> tuple[str, list[Any]]:
    """What the engine says of itself; and tokens, and their log-probabilities where they are asked for.

    In a process of its own: PyTorch has one group of GPUs in a process.
    """
    if INTERPRETED:
        return _told(folder, asked, fp8, settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(_told, (folder, asked, fp8, settings)).get(timeout=240)


def _told(
    folder: Path, asked: list[GenerationRequest], fp8: bool, settings: dict[str, Any]
) -> tuple[str, list[Any]]:
    engine = small_engine(folder, SharedFp8View(folder) if fp8 else None, **settings)
    try:
        whole = engine.generate(asked)
        engine.audit()
    finally:
        engine.close()
    described = f"{engine.info.description}, {type(engine.ranks.group).__name__}"
    return described, [(each.token_ids, each.log_probs) for each in whole]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("family", "all_reduce"), [("llama", "nccl"), ("llama", "auto"), ("qwen3", "auto"), ("gemma2", "auto")]
)
def test_ranks_together_say_what_one_says(family: str, all_reduce: str, ranks: int, tmp_path: Path) -> None:
    """In graphs and out of them (prompts in steps of 16 tokens), greedy and drawn, one step ahead."""
    folder = model(tmp_path, family)
    plain = {"kernels": "pytorch"} if INTERPRETED else {}
    _, alone = told(folder, requests(), **plain)
    described, shared = told(folder, requests(), tensor_parallel_size=ranks, all_reduce=all_reduce)
    print(described)
    assert f"shared by {ranks} ranks" in described
    if ON_GPU:
        assert " CUDA graphs (" in described and (all_reduce == "auto" or "Together" in described)
    for (tokens, log_probs), (expected, likely) in zip(shared, alone, strict=True):
        assert tokens == expected
        assert log_probs == pytest.approx(likely, abs=0.02)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has the case above")
@pytest.mark.parametrize("settings", [{"compute_dtype": "bfloat16"}, {"lm_head_precision": "fp8"}])
def test_fp8_in_shares(settings: dict[str, Any], tmp_path: Path) -> None:
    """Sums of another order round otherwise, so that a token may part: the first ones do not."""
    folder = tiny_checkpoint(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    both = []
    for ranks in (1, 2):
        every = {"compute_dtype": "bfloat16", "kv_dtype": "fp8"} | settings
        described, answers = told(folder, requests()[:3], fp8=True, tensor_parallel_size=ranks, **every)
        assert "FP8 W8A8" in described
        both.append([tokens[:3] for tokens, _ in answers])
    assert both[0] == both[1]


@pytest.mark.skipif(INTERPRETED, reason="the host is ahead on GPUs only")
def test_guesses_and_schemas_in_shares(tmp_path: Path) -> None:
    folder = model(tmp_path, "llama")
    asked = [
        GenerationRequest([5, 6, 7] * 8, 24, end_id=-1),
        GenerationRequest([5, 6], 16, guide=Guide("regex", "[ab]{12}")),
    ]
    answers = [told(folder, asked, tensor_parallel_size=ranks, speculation_tokens=4)[1] for ranks in (1, 2)]
    assert answers[0] == answers[1]


SERVED = """
import sys
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
engine = Engine(EngineConfig(sys.argv[1], device="cuda", kernels="cuda", compute_dtype="float32", num_kv_blocks=256,
    max_seq_len=2048, tensor_parallel_size=2))
print(*engine.ranks.pids, flush=True)
while True:
    engine.generate([GenerationRequest([5, 6, 7], 1000, end_id=-1)])
"""


@pytest.mark.skipif(INTERPRETED, reason="tests/torch_engine/test_tensor_parallel.py does that over gloo")
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_process_though_the_gpu_waits(fault: signal.Signals, tmp_path: Path) -> None:
    folder = model(tmp_path, "llama")
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", SERVED, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    time.sleep(1)
    os.kill(rank, fault)
    started = time.monotonic()
    _, said = process.communicate(timeout=30)
    print(f"ended {time.monotonic() - started:.1f} s after {fault.name}")
    how = "was killed by SIGKILL" if fault is signal.SIGKILL else "hangs: no sign of life"
    assert process.returncode == 1 and f"rank 1 of 2 (pid {rank}) {how}" in said
    assert not Path(f"/proc/{rank}").exists() and set(os.listdir("/dev/shm")) <= before


@pytest.mark.skipif(INTERPRETED, reason="tests/torch_engine/test_server.py does that without ranks")
def test_sigterm_ends_all_ranks(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "llama")
    EngineConfig(
        str(folder), device="cuda", kernels="cuda", compute_dtype="float32", tensor_parallel_size=2
    ).save(tmp_path)
    command = [sys.executable, "-m", "flightline.torch_engine.process.server"]
    command += ["--engine-dir", str(tmp_path), "--socket", str(tmp_path / "s")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and "engine ready" in process.stdout.readline()
    others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert len(others) >= 1 and not any(Path(f"/proc/{pid}").exists() for pid in others)
