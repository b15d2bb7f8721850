"""A model that GPUs share is the model of one: tokens, draws, graphs and NCCL.

``python3 -m pytest -v -n 3 -m gpu --noconftest tests/torch_engine/test_tp_gpu.py`` on a machine with two GPUs or more:
eight starts of an engine, three of them at once. With two workers and nothing compiled yet four of the six took 170 s.
Without, a part of it runs in Triton's interpreter over gloo and without graphs (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import contextlib
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
    if INTERPRETED:
        return every[2:5]
    guided = GenerationRequest([5, 6], 16, guide=Guide("regex", "[ab]{12}"))
    return [*every, GenerationRequest([5, 6, 7] * 8, 24, end_id=-1), guided]  # one to guess the tokens of


def told(
    folder: Path, asked: list[GenerationRequest], fp8: bool = False, **settings: Any
) -> tuple[str, list[Any]]:
    """What the engine says of itself; and tokens, and their log-probabilities where they are asked for.

    Ranks have a process of their own: PyTorch has one group of GPUs in a process.
    """
    if INTERPRETED or settings.get("tensor_parallel_size", 1) == 1:
        return _told(folder, asked, fp8, settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(_told, (folder, asked, fp8, settings)).get(timeout=120)


def _told(
    folder: Path, asked: list[GenerationRequest], fp8: bool, settings: dict[str, Any]
) -> tuple[str, list[Any]]:
    engine = small_engine(folder, SharedFp8View(folder) if fp8 else None, **settings)
    try:
        whole = engine.generate(asked)
        engine.audit()
    finally:
        engine.close()
    one_kernel = getattr(engine.kernels, "exchange", None) is not None
    described = f"{engine.info.description}, {type(engine.ranks.group).__name__}, one kernel: {one_kernel}"
    return described, [(each.token_ids, each.log_probs) for each in whole]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("family", "all_reduce"), [("llama", "nccl"), ("llama", "fused"), ("gemma2", "fused"), ("olmo2", "auto")]
)
def test_ranks_together_say_what_one_says(family: str, all_reduce: str, ranks: int, tmp_path: Path) -> None:
    """In graphs and out of them (prompts in steps of 16 tokens), greedy and drawn, guessed and by a schema, one step
    ahead. The one is on the CPU, in plain PyTorch."""
    folder = model(tmp_path, family)
    guesses = 0 if INTERPRETED else 4
    plain = {"kernels": "pytorch", "device": "cpu", "speculation_tokens": guesses}
    _, alone = told(folder, requests(), **plain)
    linked = "auto" if INTERPRETED else all_reduce
    described, shared = told(
        folder, requests(), tensor_parallel_size=ranks, all_reduce=linked, speculation_tokens=guesses
    )
    print(described)
    assert f"shared by {ranks} ranks" in described
    if ON_GPU:
        assert " CUDA graphs (" in described
        assert {"nccl": "Together, one kernel: False", "fused": "Linked, one kernel: True"}.get(
            linked, "Linked"
        ) in described
    for (tokens, log_probs), (expected, likely) in zip(shared, alone, strict=True):
        assert tokens == expected
        assert log_probs == pytest.approx(likely, abs=0.02)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has the case above")
def test_fp8_in_shares(tmp_path: Path) -> None:
    """Sums of another order round otherwise, so that a token may part: the first ones do not."""
    folder = tiny_checkpoint(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    every = {"compute_dtype": "bfloat16", "kv_dtype": "fp8", "lm_head_precision": "fp8"}
    both = []
    for ranks in (1, 2):
        how = {"tensor_parallel_size": ranks, "all_reduce": "auto" if ranks == 1 else "fused"}
        described, answers = told(folder, requests()[:3], fp8=True, **how, **every)
        assert "FP8 W8A8" in described
        both.append([tokens[:3] for tokens, _ in answers])
    assert both[0] == both[1]


SERVED = """
import sys
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.engine import Engine
engine = Engine(EngineConfig(sys.argv[1], device="cuda", kernels="cuda", compute_dtype="float32", num_kv_blocks=256,
    max_seq_len=2048, tensor_parallel_size=2))
print(*engine.ranks.pids, flush=True)
while True:
    engine.generate([GenerationRequest([5, 6, 7], 1000, end_id=-1)])
"""


@pytest.mark.skipif(INTERPRETED, reason="test_tensor_parallel.py and test_server.py do that on a CPU")
def test_ranks_end_with_their_engine_and_it_with_them(tmp_path: Path) -> None:
    """Though a GPU waits for another. Three engines at once: a rank is killed, one stopped, an engine asked to end."""
    folder = model(tmp_path / "model", "llama")
    EngineConfig(
        str(folder), device="cuda", kernels="cuda", compute_dtype="float32", tensor_parallel_size=2
    ).save(tmp_path)
    before = set(os.listdir("/dev/shm"))
    busy = [sys.executable, "-c", SERVED, str(folder)]
    server = [sys.executable, "-m", "flightline.torch_engine.process.server"]
    server += ["--engine-dir", str(tmp_path), "--socket", str(tmp_path / "s")]
    killed, stopped, asked = (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in (busy, busy, server)
    )
    faults = (
        (killed, signal.SIGKILL, "was killed by SIGKILL"),
        (stopped, signal.SIGSTOP, "hangs: no sign of life"),
    )
    for process, fault, how in faults:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        time.sleep(1)
        os.kill(rank, fault)
        started = time.monotonic()
        _, said = process.communicate(timeout=30)
        print(f"ended {time.monotonic() - started:.1f} s after {fault.name}")
        assert process.returncode == 1 and f"rank 1 of 2 (pid {rank}) {how}" in said
        assert not Path(f"/proc/{rank}").exists()
    assert asked.stdout is not None and "engine ready" in asked.stdout.readline()
    others = Path(f"/proc/{asked.pid}/task/{asked.pid}/children").read_text().split()
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(timeout=30) == 0
    assert len(others) >= 1 and not any(Path(f"/proc/{pid}").exists() for pid in others)
    left = set(os.listdir("/dev/shm")) - before
    assert not left - mapped_anywhere()  # other tests of this file run at the same time


def mapped_anywhere() -> set[str]:
    """Names of shared memory that a process uses."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended
            names |= {
                line.split("/dev/shm/")[1].split()[0]
                for line in maps.read_text().splitlines()
                if "/dev/shm/" in line
            }
    return names
