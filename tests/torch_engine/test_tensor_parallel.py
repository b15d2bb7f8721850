"""A model that several ranks share is the model of one, in logits and tokens; and what happens when a rank fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.request import FinishReason, GenerationRequest, SamplingParams
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.shard import Shard, refusal
from flightline.torch_engine.model.weights import Checkpoint
from flightline.torch_engine.parallel import ranks as watch
from flightline.torch_engine.parallel.group import Alone, Together
from flightline.torch_engine.parallel.ranks import Assignment, Follower, Leader, RankLost
from tests.packing import FORMATS, rewrite
from tests.tiny import FAMILIES, tiny_checkpoint
from tests.torch_engine.test_models import VARIANTS, prompts

ROOT = Path(__file__).parents[2]


def at_once(size: int, work: Callable[[Together], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks, which are threads that reach each other over gloo."""
    store, results = dist.HashStore(), [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            with torch.inference_mode():
                results[rank] = work(Together(dist.ProcessGroupGloo(store, rank, size, options)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    return results


@pytest.mark.parametrize("variant", [*FAMILIES, "llama-bias", "llama-tied"])
def test_ranks_together_have_the_logits_of_one(variant: str, tmp_path: Path, make_engine) -> None:
    """Every step of a ragged batch with prompts in pieces; four ranks share two key/value heads."""
    folder = tiny_checkpoint(tmp_path, **VARIANTS[variant])
    engine = make_engine(folder)
    forward, steps = engine.model.forward, []

    def record(step: Any, caches: Any) -> torch.Tensor:
        steps.append((dataclasses.replace(step), forward(step, caches)))
        return steps[-1][1]

    engine.model.forward = record
    engine.generate([GenerationRequest(p, 6, end_id=-1) for p in prompts(engine.info.vocab_size)])
    assert any(len(step.prefills) > 1 for step, _ in steps) and any(step.num_decodes > 3 for step, _ in steps)
    checkpoint = Checkpoint(folder, load_spec(folder))
    for size in (2, 4):

        def replay(group: Together, size: int = size) -> list[torch.Tensor]:
            kernels = PyTorchKernels(torch.device("cpu"), torch.float32)
            kernels.group = group
            model = Model(checkpoint.part(Shard(group.rank, size)), kernels, 128)
            caches = model.new_caches(64, 4)
            return [model.forward(dataclasses.replace(step), caches) for step, _ in steps]

        of_ranks = at_once(size, replay)
        for number, (_, expected) in enumerate(steps):
            ours = of_ranks[0][number]
            assert (ours - expected).abs().max() / expected.std() < 1e-4
            assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()
            assert all(torch.equal(each[number], ours) for each in of_ranks)


def test_a_rank_reads_its_part_only(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", attention_bias=True, tie_word_embeddings=False)
    whole = Checkpoint(folder, load_spec(folder))
    for size in (2, 4):
        parts = [whole.part(Shard(rank, size)) for rank in range(size)]
        for name, along in (("q_proj", 0), ("o_proj", 1)):
            tensor = f"model.layers.0.self_attn.{name}.weight"
            assert torch.equal(torch.cat([part.raw(tensor) for part in parts], along), whole.raw(tensor))
        assert torch.equal(
            torch.cat([part.raw("lm_head.weight") for part in parts]), whole.raw("lm_head.weight")
        )
        keys = [part.raw("model.layers.0.self_attn.k_proj.weight") for part in parts]
        assert [len(part) for part in keys] == [16] * size  # with four ranks, two have the same head
        assert ["model.layers.0.self_attn.o_proj.bias" in part for part in parts] == [
            True,
            *[False] * (size - 1),
        ]


READ = """
import re, sys
from pathlib import Path
import torch
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.layout import LINEARS
from flightline.torch_engine.model.shard import Shard
from flightline.torch_engine.model.weights import Checkpoint

def own() -> int:
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

spec = load_spec(sys.argv[1])
part = Checkpoint(sys.argv[1], spec).part(Shard(1, 2))
torch.ones(1 << 20).sum()
before, most = own(), 0
for module in ["model.embed_tokens", "lm_head"] + [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]:
    coded = part.coded(module)
    held = part.weight(module, torch.bfloat16) if coded is None else coded
    most = max(most, own() - before)
print(most)
"""


@pytest.mark.parametrize("quantised", [False, True])
def test_reading_takes_less_memory_than_a_file_of_the_checkpoint(quantised: bool, tmp_path: Path) -> None:
    """Of several files, each held open: a tensor is read when it is asked for, and let go."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    folder = tiny_checkpoint(
        tmp_path / "source", "llama", **sizes, num_key_value_heads=4, tie_word_embeddings=False
    )
    if quantised:
        folder, _ = rewrite(folder, tmp_path, *FORMATS["modelopt"])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places: dict[str, str] = {}
    for layer in (0, 1):
        name = f"model-{layer}.safetensors"
        own = {key: value for key, value in tensors.items() if (f"layers.{1 - layer}." not in key)}
        own = {key: value for key, value in own.items() if key not in places}
        save_file(own, folder / name, {"format": "pt"})
        places |= dict.fromkeys(own, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    read = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (
        int(read.stdout)
        < 1.2 * largest
        < 0.7 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    )


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 384},
            2,
            r"2 does not divide the heads; use TP=3",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 384},
            2,
            r"neither of 2 .* divides the other; use TP=3",
        ),
        ({"intermediate_size": 130}, 4, r"4 does not divide the MLP; use TP=2"),
    ],
)
def test_what_does_not_divide_is_refused(
    changes: dict[str, int], size: int, said: str, tmp_path: Path
) -> None:
    spec = load_spec(tiny_checkpoint(tmp_path, "llama"))
    names = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}
    changed = dataclasses.replace(spec, **{names.get(name, name): value for name, value in changes.items()})
    with pytest.raises(UnsupportedModel, match=said):
        Shard(0, size).of(changed)
    assert not refusal(spec, 4)


def test_a_tensor_that_nobody_knows_to_cut_is_refused(tmp_path: Path) -> None:
    spec = load_spec(tiny_checkpoint(tmp_path, "llama"))
    with pytest.raises(UnsupportedModel, match=r"anchors is cut up; use TP=1"):
        Shard(0, 2).part("model.layers.0.self_attn.anchors", (spec.num_heads,), spec)


# Processes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return tiny_checkpoint(tmp_path_factory.mktemp("shared"), "qwen3", **windows)


def small(folder: Path, ranks: int, **settings: Any) -> Engine:
    defaults = {
        "num_kv_blocks": 24, "block_size": 4, "max_seq_len": 80, "max_batch_size": 8, "max_num_tokens": 16,
        "num_threads": 1, "batch_scheduler_policy": "max_utilization", "num_host_kv_blocks": 20,
    }  # fmt: skip
    config = EngineConfig(str(folder), **{**defaults, **settings}, tensor_parallel_size=ranks)
    return Engine(config)


@pytest.fixture
def shared(folder: Path) -> Iterator[Engine]:
    engine = small(folder, 2)
    yield engine
    engine.close()
    assert not any(map(psutil.pid_exists, engine.ranks.pids))


def test_two_processes_are_one_engine(folder: Path, shared: Engine) -> None:
    """Ragged, in pieces, preempted, cancelled, drawn; twice, so that the second time prefixes are there."""
    drawn = SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=11, repetition_penalty=1.2)

    def answers(engine: Engine) -> list[Any]:
        told = []
        batch = [GenerationRequest(p, 12, end_id=-1) for p in prompts(engine.info.vocab_size)]
        batch += [
            GenerationRequest(p, 12, end_id=-1, sampling=drawn) for p in prompts(engine.info.vocab_size)
        ]
        for _ in range(2):
            for key, request in enumerate(batch):
                engine.add(key, request)
            engine.add("cancelled", GenerationRequest([5] * 20, 40, end_id=-1))
            tokens: dict[Any, list[int]] = {}
            while engine.busy:
                for key, output in engine.step():
                    assert output.error is None
                    tokens.setdefault(key, []).extend(output.token_ids)
                if len(tokens.get("cancelled", [])) >= 3 and "cancelled" in engine.sequences:
                    ended = engine.cancel("cancelled")
                    assert ended is not None and ended.finish_reason is FinishReason.CANCELLED
            tokens.pop("cancelled", None)
            told.append(tokens)
            engine.audit()
        assert engine.scheduler.num_preemptions > 0
        assert engine.blocks.windows == (None, 8) and engine.stats.host_kv_hits > 0
        return told

    assert answers(shared) == answers(small(folder, 1))
    assert "shared by 2 ranks" in shared.info.description


def stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def starved(pid: int) -> None:
    """No more memory than it has."""
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms,) * 2)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (stopped, r"^rank 1 of 2 \(pid \d+\) hangs: no sign of life for 2 s"),
        (starved, r"^rank 1 of 2 \(pid \d+\) is out of memory"),
    ],
)
def test_a_lost_rank_ends_the_engine_with_its_name_and_the_cause(
    fault: Callable[[int], None], cause: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENT_S", 2.0)
    engine = small(folder, 2, max_num_tokens=2048, max_seq_len=2048, num_kv_blocks=512)
    engine.generate([GenerationRequest([3, 4], 2, end_id=-1)])
    pid = engine.ranks.pids[0]
    fault(pid)
    with pytest.raises(RankLost, match=cause):
        for _ in range(1000):
            engine.generate([GenerationRequest([3, 4] * 900, 20, end_id=-1)])
    assert not psutil.pid_exists(pid)
    with pytest.raises(RankLost):
        engine.generate([GenerationRequest([3, 4], 2, end_id=-1)])
    engine.close()


@pytest.mark.parametrize(("all_reduce", "linked"), [("nccl", False), ("auto", True), ("fused", True)])
def test_all_ranks_link_up_alike(
    all_reduce: str, linked: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one waits for what the others never do, before anybody watches."""
    joined: list[tuple[Any, ...]] = []
    monkeypatch.setattr(watch, "join", lambda *args: joined.append(args) or Alone())
    config = EngineConfig(str(folder), device="cuda", tensor_parallel_size=2, all_reduce=all_reduce)
    monkeypatch.setattr(Follower, "_beat", lambda self: None)  # which ends this process with the pipe
    ours, theirs = multiprocessing.Pipe()
    follower = Follower(Assignment(config, 1, 5, None), theirs)
    monkeypatch.setattr(watch, "_check_gpus", lambda wanted: None)
    monkeypatch.setattr(Leader, "_start", staticmethod(lambda assignment: None))
    monkeypatch.setattr(Leader, "_watch", lambda self: None)
    monkeypatch.setattr(Leader, "_await", lambda self, reached: None)
    Leader(config, None)
    follower.join()
    assert [(rank, device.index, told[-1]) for rank, _, device, *told in joined] == [
        (0, 0, linked),
        (1, 1, linked),
    ]
    assert ours.recv() == ("met", {})


def test_kernels_of_one_process_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 is not valid: the compiled CPU kernels"):
        small(folder, 2, kernels="native", kernel_dir="x")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's language")
def test_the_gpus_way_in_the_interpreter() -> None:
    """The runner that is a step ahead, on two ranks over gloo; on GPUs the same tests have graphs and NCCL."""
    script = Path(__file__).with_name("test_tp_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "gpu",
        "--noconftest",
        "-k",
        "llama-nccl",
        str(script),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout[-3000:]
