"""``docs/MODELS.md``, made from the table of families: ``python -m flightline.engine_build.models_page``."""

from __future__ import annotations

from pathlib import Path

from flightline.torch_engine.model.families import BY_MODEL_TYPE, FAMILIES, WRAPPERS, Family, Wrapper

PAGE = Path(__file__).resolve().parents[1] / "docs/MODELS.md"
RAN_ON_GPU = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
)
"""Families of which tiny checkpoints ran on an H200, all of them against Transformers."""
HEAD = """# Models

Made from `torch_engine/model/families.py` by `python -m flightline.engine_build.models_page`; a test holds the two
together. `make preflight MODEL=...` says of one folder or hub id in a second whether it runs, in which precision, what
memory it takes and about how fast one request will be answered.

What is not in these tables is refused by name before anything is built: every key of `config.json`, every setting of a
rotary embedding or of a quantisation and every tensor of a checkpoint is used, or known to change nothing.

## Families

For each, a tiny random checkpoint with its switches away from Llama's gives the logits and the greedy tokens of
Transformers in float32: ragged batches, prompts in pieces, reused prefixes (`tests/torch_engine/test_models.py`). That
is what *tested* means here; *ran* says that the same was seen on an H200; where it was never run, its
kernels were checked in Triton's interpreter. ENGINE=torch is meant; TensorRT-LLM has a list of its own.

| architecture | models | CPU, compiled kernels | CPU, PyTorch | GPU |
|---|---|---|---|---|
"""
WRAPPED = """
## Models for images

The language part is served alone, for text; weights of eyes and ears are left out.

| architecture | language part | models |
|---|---|---|
"""


def page() -> str:
    """The whole text."""
    rows = "".join(_row(family) for family in FAMILIES.values())
    limits = "".join(
        f"\n`{family.architecture}`: {family.limits}.\n" for family in FAMILIES.values() if family.limits
    )
    wrapped = "".join(_wrapped(name, wrapper) for name, wrapper in WRAPPERS.items())
    return HEAD + rows + limits + WRAPPED + wrapped


def _wrapped(name: str, wrapper: Wrapper) -> str:
    parts = ", ".join(f"`{BY_MODEL_TYPE[text].architecture}`" for text in wrapper.texts)
    return f"| `{name}` | {parts} | {wrapper.models} |\n"


def _row(family: Family) -> str:
    gpu = "ran" if family.architecture in RAN_ON_GPU else "never run"
    return f"| `{family.architecture}` | {family.models} | tested | tested | {gpu} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
