"""The real small model: greedy output equals Transformers'.

By induction, not by generating twice: the engine's tokens are greedy if at each position Transformers'
most likely token, given the same tokens before, is the engine's next one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from flightline.engine_build.cache import FileHashes
from flightline.engine_build.checkpoint import obtain
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.kernels.cpu.toolchain import compiler

NEW_TOKENS = 12
BF16_STEP = 0.125
"""Distance of neighbouring bfloat16 numbers between 16 and 32, where this model's best logits are."""
PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):\n", "List three animals:", "1 2 3 4 5 6 7",
    "Water boils at", "The opposite of hot is", "Dear Sir or Madam,", "import numpy as np\n", "E = mc^2 means",
    "Roses are red,", "To be or not to be,", "Ein Hund ist", "La capitale de l'Italie est", "日本の首都は",
    "🙂 means", "SELECT name FROM users WHERE", "In 1969, Neil Armstrong", "The three primary colours are",
    "A haiku about the sea:\n",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint as the build makes it."""
    root = tmp_path_factory.mktemp("build")
    return obtain("", root, FileHashes(root), False).folder


def engine_tokens(
    make_engine, folder: Path, texts: list[str] = PROMPTS, **settings: object
) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) of every text, all in flight together."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in texts]
    sizes = {
        "num_kv_blocks": 256,
        "block_size": 16,
        "max_batch_size": 32,
        "max_num_tokens": 64,
        "num_threads": 1,
    }
    engine = make_engine(folder, **sizes, **settings)
    outputs = engine.generate([GenerationRequest(prompt, NEW_TOKENS, end_id=-1) for prompt in prompts])
    return [(prompt, output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)]


@pytest.fixture(scope="module")
def is_greedy(smollm2: Path) -> Callable[[list[int], list[int]], bool]:
    """Whether an output is what Transformers' float32 model finds likeliest; asked once for equal outputs."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    known: dict[tuple, bool] = {}

    def ask(prompt: list[int], output: list[int]) -> bool:
        key = tuple(prompt), tuple(output)
        if key not in known:
            known[key] = reference_logits(model, prompt, output).argmax(-1).tolist() == output
        return known[key]

    return ask


@torch.inference_mode()
def reference_logits(model: AutoModelForCausalLM, prompt: list[int], output: list[int]) -> torch.Tensor:
    """[output tokens, vocab]: Transformers' logits for each position of the engine's output."""
    tokens = torch.tensor([prompt + output[:-1]])
    return model(tokens, use_cache=False).logits[0, len(prompt) - 1 :].float()


@pytest.mark.parametrize("kernels", ["pytorch", "native"])
def test_float32_tokens_equal(make_engine, smollm2: Path, is_greedy, library: str, kernels: str) -> None:
    if kernels == "native" and compiler() is None:
        pytest.skip("no C++ compiler: the build takes the PyTorch kernels")
    texts = PROMPTS if kernels == "native" else PROMPTS[::2]
    for prompt, output in engine_tokens(make_engine, smollm2, texts, kernels=kernels, kernel_dir=library):
        assert is_greedy(prompt, output)


def test_bfloat16_tokens_differ_only_where_rounding_decides(make_engine, smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()
    ties, texts = 0, PROMPTS[::2]  # a second each where a processor has no bfloat16
    found = engine_tokens(make_engine, smollm2, texts, compute_dtype="bfloat16")
    for number, (prompt, output) in enumerate(found):
        logits = reference_logits(model, prompt, output)
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        gaps = logits.max(-1).values - chosen
        for position in gaps.nonzero().flatten().tolist():
            ties += 1
            print(f"prompt {number}, token {position}: {gaps[position]:.3f} below Transformers' best")
        assert gaps.max() <= 4 * BF16_STEP, f"prompt {number}: not a matter of rounding"
    assert ties < 0.05 * NEW_TOKENS * len(texts)
