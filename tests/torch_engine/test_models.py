"""Every family against Transformers on tiny random checkpoints: logits and greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.core.scheduler import Chunk
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.kernels.cpu.toolchain import compiler
from flightline.torch_engine.model.config_json import load_spec, transformers_class
from flightline.torch_engine.model.fields import UnsupportedModel
from tests.tiny import FAMILIES, tiny_checkpoint

needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler: the build takes the PyTorch kernels"
)
LENGTHS = (1, 3, 9, 33, 50)
NEW_TOKENS = 12
TOLERANCE = 2e-4
"""Of float32 logits, relative to their spread."""

VARIANTS = {
    **{family: {"family": family} for family in FAMILIES},
    "mistral-window": {"family": "mistral", "sliding_window": 8},
    "qwen2-window": {
        "family": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    },
    "llama-bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True},
    "llama3-rope": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "linear-rope": {
        "family": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "phi3-longrope": {
        "family": "phi3", "original_max_position_embeddings": 256, "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0], "long_factor": [2.0, 2.5, 3.0, 4.0, 6.0, 9.0],
        },
    },
    "olmo3-yarn": {
        "family": "olmo3", "num_hidden_layers": 4, "sliding_window": 16,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    },
    "yarn-rope": {
        "family": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint and what Transformers makes of it in float32."""

    folder: Path
    model: PreTrainedModel
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])
    model = reference(folder, torch.float32)
    batch = prompts(model.config.get_text_config().vocab_size)
    return Case(folder, model, batch, [greedy(model, prompt) for prompt in batch])


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def reference(model_dir: Path, dtype: torch.dtype, **changes: object) -> PreTrainedModel:
    """Transformers' own model, with ``changes`` in the configuration of its language part."""
    config = AutoConfig.from_pretrained(model_dir)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    options = {"dtype": dtype, "attn_implementation": "eager", "config": config}
    return getattr(transformers, transformers_class(model_dir)).from_pretrained(model_dir, **options).eval()


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def logits_of(engine, prompt: list[int], chunk_size: int) -> torch.Tensor:
    """The engine's logits after each chunk of the prompt."""
    sequence = Sequence.start("x", GenerationRequest(prompt, 4), (), engine.tokens, 1)
    sequence.adopt(engine.blocks, engine.blocks.match([]))
    sequence.grow(engine.blocks, engine.blocks.blocks_for(len(prompt)))
    steps, rows = engine.kernels.steps(4, engine.groups.windows), []
    for begin in range(0, len(prompt), chunk_size):
        sequence.tokens = prompt[: begin + chunk_size]
        chunk = Chunk(sequence, len(sequence.tokens) - begin, True)
        rows.append(engine.model.forward(steps.build([chunk]), engine.runner.caches)[0])
        sequence.num_computed = len(sequence.tokens)
    sequence.release_blocks(engine.blocks)
    return torch.stack(rows)


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """After every seventh token, like ``logits_of`` with chunks of seven."""
    ends = [min(begin + 7, len(prompt)) - 1 for begin in range(0, len(prompt), 7)]
    return model(torch.tensor([prompt]), use_cache=False).logits[0, ends].float()


def test_logits_equal_transformers_in_float32(case: Case, make_engine) -> None:
    engine = make_engine(case.folder)
    for prompt in case.prompts:
        expected = reference_logits(case.model, prompt)
        error = (logits_of(engine, prompt, 7) - expected).abs().max() / expected.std()
        assert error < TOLERANCE, f"{len(prompt)} tokens: relative error {error:.2g}"


def test_bfloat16_is_as_close_to_float32_as_transformers(case: Case, make_engine) -> None:
    engine = make_engine(case.folder, compute_dtype="bfloat16")
    rounded = reference(case.folder, torch.bfloat16)
    ours, theirs = 0.0, 0.0
    for prompt in case.prompts:
        truth = reference_logits(case.model, prompt)
        ours += (logits_of(engine, prompt, 7) - truth).abs().mean().item()
        theirs += (reference_logits(rounded, prompt) - truth).abs().mean().item()
    assert 0 < ours < 1.4 * theirs


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("kernels", ["pytorch", pytest.param("native", marks=needs_compiler)])
def test_greedy_tokens_equal_transformers(
    case: Case, make_engine, library: str, kernels: str, reuse: bool
) -> None:
    """Ragged batch, prompts longer than the token budget, then the same prompts again (reused or not)."""
    engine = make_engine(case.folder, enable_kv_cache_reuse=reuse, kernels=kernels, kernel_dir=library)
    assert engine.kernels.name == kernels
    for _ in range(2):
        outputs = engine.generate(
            [GenerationRequest(prompt, NEW_TOKENS, end_id=-1) for prompt in case.prompts]
        )
        assert [output.token_ids for output in outputs] == case.answers
        engine.audit()
    assert (engine.stats.kv_blocks_reused > 0) == reuse
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max


SWITCHES = [
    ("granite", "embedding_multiplier", 1.0),
    ("granite", "attention_multiplier", 0.25),
    ("granite", "residual_multiplier", 0.3),
    ("granite", "logits_scaling", 5.0),
    ("smollm3", "no_rope_layers", [1, 1, 1]),
    ("phi3", "sliding_window", None),
    ("phi3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ("glm4", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    ("gpt_oss", "sliding_window", 9),
    ("gpt_oss", "num_experts_per_tok", 2),
]


@pytest.mark.parametrize(("family", "name", "value"), SWITCHES)
def test_these_checkpoints_would_show_a_switch_that_is_ignored(
    tmp_path: Path, family: str, name: str, value: object
) -> None:
    """Weights as a library initialises them would hide most of these below any tolerance."""
    folder = tiny_checkpoint(tmp_path, family)
    prompt = prompts(300)[-1]
    right = reference_logits(reference(folder, torch.float32), prompt)
    wrong = reference_logits(reference(folder, torch.float32, **{name: value}), prompt)
    assert (right - wrong).abs().max() / right.std() > 100 * TOLERANCE


def test_a_long_context_has_the_long_factors_from_the_first_token_on(tmp_path: Path, make_engine) -> None:
    """As Transformers has them for a prompt that is longer than the context it was trained on."""
    shape = VARIANTS["phi3-longrope"] | {"original_max_position_embeddings": 32}
    folder = tiny_checkpoint(tmp_path, **shape)
    model, prompt = reference(folder, torch.float32), prompts(300)[-1]
    expected = reference_logits(model, prompt)
    error = (logits_of(make_engine(folder), prompt, 7) - expected).abs().max() / expected.std()
    assert error < TOLERANCE


def test_every_variant_uses_what_it_varies(tmp_path: Path) -> None:
    windowed = load_spec(tiny_checkpoint(tmp_path / "a", **VARIANTS["mistral-window"]))
    assert {layer.window for layer in windowed.layers} == {8}
    assert load_spec(tiny_checkpoint(tmp_path / "b", **VARIANTS["llama3-rope"])).layers[0].rope.scaling


def test_unsupported_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["FalconForCausalLM"]}')
    with pytest.raises(UnsupportedModel, match=r"FalconForCausalLM.*LlamaForCausalLM.*Gemma3ForCausalLM"):
        load_spec(tmp_path)
