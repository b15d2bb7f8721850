"""The engine on a GPU: every family against Transformers, a real model, and many requests at once.

``python3 -m pytest -m gpu tests/torch_engine/test_gpu_engine.py``; without a GPU the same runs in Triton's interpreter,
where a family takes minutes: ``TRITON_INTERPRET=1 python3 -m pytest -m gpu -k llama-tied ...``. Needs no fixture of
other files (``--noconftest``).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from flightline.engine_build.build import CALIBRATION, GATE_PROMPTS
from flightline.engine_build.cache import FileHashes
from flightline.engine_build.checkpoint import obtain
from flightline.engine_build.prompts import read_prompts
from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.request import GenerationRequest, SamplingParams
from flightline.torch_engine.core.speculation import Speculation
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.config_json import load_spec, transformers_class
from flightline.torch_engine.model.weights import Checkpoint
from tests.packing import FORMATS, rewrite, rewrite_experts
from tests.tiny import tiny_checkpoint
from tests.torch_engine.test_models import VARIANTS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not (ON_GPU or INTERPRETED),
        reason="needs a CUDA device",
    ),
]
BATCH_ONE: dict[str, Any] = {"enable_kv_cache_reuse": False, "cuda_graphs": False}


def small_engine(folder: Path, checkpoint: Checkpoint | None = None, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "device": DEVICE, "kernels": "cuda", "compute_dtype": "float32", "num_kv_blocks": 256, "block_size": 16,
        "max_seq_len": 256, "max_batch_size": 8, "max_num_tokens": 16,
    }  # fmt: skip
    return Engine(EngineConfig(model_dir=str(folder), **{**defaults, **settings}), checkpoint)


def greedy(engine: Engine, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    """The engine's tokens, all prompts in flight together; nothing of them stays behind."""
    whole = engine.generate([GenerationRequest(prompt, count, end_id=-1) for prompt in prompts])
    engine.audit()
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    return [output.token_ids for output in whole]


# Families ------------------------------------------------------------------------------------------------------------


@dataclass
class Family:
    """A tiny checkpoint of one variant, and what Transformers makes of it."""

    folder: Path
    exact: Any
    """The model in float32."""
    prompts: list[list[int]]

    @property
    def mixture(self) -> bool:
        return any(layer.mixture for layer in load_spec(self.folder).layers)

    @torch.inference_mode()
    def logits(self, tokens: list[int], model: Any = None) -> torch.Tensor:
        ids = torch.tensor([tokens], device=DEVICE)
        return (model or self.exact)(ids, use_cache=False).logits[0].float()

    def rounding(self) -> float:
        """Relative error of Transformers' own logits in bf16."""
        rounded = reference(self.folder, torch.bfloat16)
        truth = torch.cat([self.logits(prompt) for prompt in self.prompts])
        theirs = torch.cat([self.logits(prompt, rounded) for prompt in self.prompts])
        return relative_error(theirs, truth)


class Fp8View(Checkpoint):
    """An unquantised checkpoint as if it had been quantised to FP8 with generous input scales."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, load_spec(folder))

    def fused_coded(
        self, modules: list[str], dtype: torch.dtype, device: torch.device
    ) -> tuple[Coded, torch.Tensor | None]:
        weight, bias = self.fused(modules, torch.float32)
        scale = weight.abs().amax() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        scales = scale.expand(weight.shape[0], 1).contiguous()
        coded = Coded(codes, scales, weight.shape[1], input_scale=torch.tensor(64 / 448)).to(device)
        return coded, None if bias is None else bias.to(device, dtype)


def reference(folder: Path, dtype: torch.dtype) -> Any:
    auto_class = getattr(transformers, transformers_class(folder))
    model = auto_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval().to(DEVICE)


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.fixture(scope="module", params=VARIANTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])
    exact = reference(folder, torch.float32)
    vocab, generator = exact.config.get_text_config().vocab_size, torch.Generator().manual_seed(7)
    lengths = (1, 3, 9, 33, 50, 100)
    prompts = [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
    return Family(folder, exact, prompts)


@torch.inference_mode()
def logit_error(family: Family, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> float:
    """Relative error of the logits of a chunked prefill and of 12 decodes, one prompt after the other."""
    seen: list[torch.Tensor] = []
    raw_logits = engine.model.raw_logits

    def record(step: Any, caches: Any) -> torch.Tensor:
        logits = raw_logits(step, caches)
        seen.append(engine.model.finished(logits.clone())[-1:])
        return logits

    monkeypatch.setattr(engine.model, "raw_logits", record)
    ours, theirs = [], []
    for prompt in family.prompts:
        seen.clear()
        tokens = greedy(engine, [prompt])[0]
        ours.append(torch.cat(seen[-len(tokens) :]))
        theirs.append(family.logits(prompt + tokens[:-1])[len(prompt) - 1 :])
    return relative_error(torch.cat(ours), torch.cat(theirs))


def test_float32_logits(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert logit_error(family, monkeypatch, small_engine(family.folder, **BATCH_ONE)) < 1e-3


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_float32_greedy_tokens(family: Family, graphs: bool, reuse: bool) -> None:
    """Those of the PyTorch kernels; then the same prompts again, which the prefix cache may know."""
    expected = greedy(small_engine(family.folder, kernels="pytorch"), family.prompts)
    engine = small_engine(family.folder, cuda_graphs=graphs, enable_kv_cache_reuse=reuse)
    for _ in range(2):
        assert greedy(engine, family.prompts) == expected


def test_guesses_change_no_greedy_token(family: Family) -> None:
    """Prompts that repeat themselves; whether answers do, so that guesses are made, is up to the random weights."""
    prompts = [[5, 6, 7, 8, 9] * 8, [11, 12] * 15, list(range(20, 60))]
    count = 150 if ON_GPU else 48
    expected = greedy(small_engine(family.folder, cuda_graphs=False, kernels="pytorch"), prompts, count)
    engine = small_engine(family.folder, cuda_graphs=False, speculation_tokens=4)
    engine.scheduler.speculation = Speculation(4, row_cost=-0.01, margin=-1.0)  # whatever a lookup finds
    assert greedy(engine, prompts, count) == expected
    always = SamplingParams(logit_bias=((9, 1e4),))
    engine.generate([GenerationRequest(prompts[0], 12, always, end_id=-1)])
    assert engine.stats.accepted_tokens > 0


@pytest.mark.parametrize(("kv", "limit"), [("bfloat16", 1.5), ("int8", 2.5), ("fp8", 12.0)])
def test_bf16_logits(family: Family, monkeypatch: pytest.MonkeyPatch, kv: str, limit: float) -> None:
    """Within so many times the error of Transformers in bf16; twice as many where a token between two experts may go to
    the other one."""
    limit *= 2 if family.mixture else 1
    engine = small_engine(family.folder, compute_dtype="bfloat16", kv_dtype=kv, **BATCH_ONE)
    assert logit_error(family, monkeypatch, engine) < limit * family.rounding()


# Random layers amplify rounding, hence the wide limits; test_triton_ops.py holds each linear to a few per cent.


def test_fp8_w8a8_logits(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Fp8View(family.folder)
    engine = small_engine(family.folder, checkpoint, compute_dtype="bfloat16", kv_dtype="int8", **BATCH_ONE)
    assert logit_error(family, monkeypatch, engine) < 0.4


def test_int8_w8a8_logits_with_an_fp8_head(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    precision: dict[str, Any] = {
        "compute_dtype": "bfloat16",
        "weight_precision": "int8",
        "lm_head_precision": "fp8",
    }
    if family.mixture:
        with pytest.raises(ConfigError, match="not for mixtures"):
            small_engine(family.folder, **precision, **BATCH_ONE)
        return
    engine = small_engine(family.folder, **precision, **BATCH_ONE)
    assert logit_error(family, monkeypatch, engine) < 0.4


@pytest.mark.parametrize(
    "name", ["hf-blocks", "gptq", "awq", "w4a16", "w4a16-asymmetric", "nvfp4", "modelopt-nvfp4"]
)
def test_experts_of_each_format(name: str, tmp_path: Path) -> None:
    """Greedy tokens are those of the PyTorch kernels: few rows and many, of codes with activations as they are."""
    shape = {
        "hidden_size": 192,
        "moe_intermediate_size": 160,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "head_dim": 64,  # a linear of one group has activations in FP8, as one with a scale for each output
    }
    source = tiny_checkpoint(tmp_path / "source", "qwen3_moe", mlp_only_layers=[1], **shape)
    packed, _ = rewrite(source, tmp_path, *FORMATS[name])
    prompts = [[5, 6, 7], list(range(20, 61))]
    expected = greedy(small_engine(packed, kernels="pytorch"), prompts)
    engine = small_engine(packed)
    assert "2 FP8 in groups of 128 of experts" in engine.info.description or re.search(
        r"2 (FP4 )?W4A16 in groups of \d+ of experts", engine.info.description
    )
    assert greedy(engine, prompts) == expected


@pytest.mark.skipif(not ON_GPU, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nothing_is_compiled_while_it_serves(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's first call takes a second, in which all answers wait: whatever a step may look like, its kernels are
    there when the engine has been loaded. Prompts short and long, beside 0 to 23 decodes, drawn and not."""
    folder = tiny_checkpoint(tmp_path, family, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    engine = small_engine(
        folder, compute_dtype="bfloat16", kv_dtype="fp8", num_kv_blocks=5000, max_seq_len=8192, max_batch_size=24,
        max_num_tokens=4096,
    )  # fmt: skip
    compiled: list[str] = []
    import triton  # not there on every machine that collects this

    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *_, fn, **__: compiled.append(fn.name)
    )
    chance = random.Random(1)
    drawn = SamplingParams(0.8, top_k=20, top_p=0.9, seed=3, repetition_penalty=1.2)
    for number in range(24):
        length = (5000, 300, 2500, 20, 6000)[number % 5]
        prompt = [chance.randrange(3, 250) for _ in range(length)]
        engine.add(
            number, GenerationRequest(prompt, 60, drawn if number % 3 else SamplingParams(), end_id=-1)
        )
        for _ in range(2):
            engine.step()
    while engine.busy:
        engine.step()
    assert compiled == []


def test_gpt_oss_in_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts stay codes of 4 bits, of a row by itself and in blocks of many rows."""
    packed, plain = rewrite_experts(tiny_checkpoint(tmp_path / "source", "gpt_oss"), tmp_path)
    prompts = [[5, 6, 7], list(range(20, 60))]
    case = Family(packed, reference(plain, torch.float32), prompts)
    engine = small_engine(packed, **BATCH_ONE)
    assert "FP4 W4A16 in groups of 32 of experts" in engine.info.description
    assert logit_error(case, monkeypatch, engine) < 1e-3
    expected = greedy(small_engine(packed, kernels="pytorch"), prompts)
    assert greedy(small_engine(packed), prompts) == expected


def test_what_gpt_oss_has_in_bf16_is_kept_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and head, unless the checkpoint is to be read as it is. In float32 nothing is narrowed."""
    source = tiny_checkpoint(tmp_path / "source", "gpt_oss", vocab_size=304)
    packed, plain = rewrite_experts(source, tmp_path)
    narrow = {**BATCH_ONE, "compute_dtype": "bfloat16"}
    engine = small_engine(packed, **narrow)
    layers = len(engine.model.layers)
    assert f"{2 * layers} FP8 W8A8 by output and row" in engine.info.description
    assert "1 FP8 head" in engine.info.description
    whole = small_engine(packed, weight_precision="dequantised", **narrow)
    assert "FP8" not in whole.info.description
    if ON_GPU:  # the interpreter has no constants in bf16
        case = Family(packed, reference(plain, torch.float32), [list(range(20, 60))])
        # A token whose best experts are almost equal may go to another one.
        assert logit_error(case, monkeypatch, engine) < 0.8


# A real model --------------------------------------------------------------------------------------------------------


@dataclass
class RealModel:
    """SmolLM2-135M-Instruct, prompts, and its answers in float32 on the CPU."""

    folder: Path
    model: Any
    prompts: list[list[int]]
    answers: list[list[int]]


SIZES: dict[str, Any] = {"max_num_tokens": 512, "max_seq_len": 1024, "max_batch_size": 32}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    root = tmp_path_factory.mktemp("real")
    folder = obtain("", root, FileHashes(root), False).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = [*read_prompts(GATE_PROMPTS), *read_prompts(CALIBRATION)][:20]
    texts = [sample.render(tokenizer) for sample in samples]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = greedy(small_engine(folder, **SIZES, device="cpu", kernels="pytorch"), prompts, 48)
    return RealModel(folder, model, prompts, answers)


@torch.inference_mode()
def difference(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How far apart the logits of the first two differing tokens are; 0 if all are equal."""
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return 0.0
    logits = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
    return (logits[theirs[at]] - logits[ours[at]]).abs().item()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_models_greedy_answers(real: RealModel, dtype: str, graphs: bool) -> None:
    engine = small_engine(real.folder, **SIZES, compute_dtype=dtype, kv_dtype=dtype, cuda_graphs=graphs)
    answers = greedy(engine, real.prompts, 48)
    if dtype == "float32":
        assert answers == real.answers
        return
    # Logits of about 20 lie 0.125 apart in bf16: where two answers part, it was a tie.
    for prompt, ours, theirs in zip(real.prompts, answers, real.answers, strict=True):
        assert difference(real.model, prompt, ours, theirs) <= 0.5


@torch.inference_mode()
def test_a_prompts_log_probabilities(tmp_path: Path) -> None:
    """Transformers', in pieces, beside a decode, and with the cache full of the same prompt."""
    engine = small_engine(tiny_checkpoint(tmp_path), max_num_tokens=8)
    prompt = [7 + (11 * number) % 90 for number in range(20)]
    asked = GenerationRequest(prompt, 2, end_id=-1, return_prompt_log_probs=True, top_log_probs=2)
    expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(torch.tensor([prompt]))
        .logits[0, :-1]
        .double()
        .log_softmax(-1)
    )
    (alone,) = engine.generate([dataclasses.replace(asked, return_prompt_log_probs=False)])
    plain, output = engine.generate([GenerationRequest(prompt[:3], 6, end_id=-1), asked])
    own = expected[torch.arange(19), prompt[1:]]
    torch.testing.assert_close(torch.tensor(output.prompt_log_probs).double(), own, atol=1e-3, rtol=0)
    tops = torch.tensor([[value for _, value in top] for top in output.prompt_top_log_probs]).double()
    torch.testing.assert_close(tops, expected.topk(2).values, atol=1e-3, rtol=0)
    assert output.token_ids == alone.token_ids and len(plain.token_ids) == 6


# Many requests -------------------------------------------------------------------------------------------------------


def test_all_end_and_everything_returns(tmp_path: Path) -> None:
    """1,000 requests of random lengths, some cancelled, with too few KV blocks for those in flight."""
    chance = random.Random(5)
    count = 1000 if ON_GPU else 10
    engine = small_engine(
        tiny_checkpoint(tmp_path), compute_dtype="bfloat16" if ON_GPU else "float32", num_kv_blocks=64,
        max_batch_size=32, max_num_tokens=128, batch_scheduler_policy="max_utilization", max_queue_size=0,
    )  # fmt: skip
    wanted = {}
    for number in range(count):
        prompt = [chance.randrange(3, 250) for _ in range(chance.randrange(1, 120))]
        wanted[number] = chance.randrange(1, 60)
        engine.add(number, GenerationRequest(prompt, wanted[number], end_id=-1))
    ended: dict[int, int] = defaultdict(int)
    cancelled = steps = memory = 0
    while engine.busy:
        steps += 1
        for number, output in engine.step():
            ended[number] += len(output.token_ids)
            assert output.error is None
        if chance.random() < 0.1 and engine.sequences:
            engine.cancel(chance.choice(list(engine.sequences)))
            cancelled += 1
        if steps == 100 and ON_GPU:
            memory = torch.cuda.memory_reserved()
    engine.audit()
    assert sum(ended[number] == length for number, length in wanted.items()) >= count - cancelled
    assert engine.stats.kv_blocks_free == 64
    if ON_GPU:
        assert engine.scheduler.num_preemptions > 0 and cancelled
        assert torch.cuda.memory_reserved() - memory <= 2**26
