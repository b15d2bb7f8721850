"""The tables of ``docs/MODELS.md``, made from those of the families."""

from __future__ import annotations

from flightline.torch_engine.model.families import BY_MODEL_TYPE, FAMILIES, WRAPPERS, Family, Wrapper

RAN_ON_GPU = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *(
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
        "SmolLM3ForCausalLM",
        "GraniteForCausalLM",
    ),
    *("GlmForCausalLM", "Glm4ForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Ministral3ForCausalLM"),
    *(
        "Qwen3MoeForCausalLM",
        "Qwen2MoeForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "Glm4MoeForCausalLM",
    ),
)
"""Families of which tiny checkpoints ran on an H200, all of them against Transformers."""
FAMILIES_HEAD = """| architecture | models | CPU, compiled kernels | CPU, PyTorch | GPU | several ranks (`TP`) |
|---|---|---|---|---|---|
"""
WRAPPERS_HEAD = """| architecture | language part | models |
|---|---|---|
"""


def parts() -> dict[str, str]:
    """The page's tables."""
    limits = (
        f"\n`{family.architecture}`: {family.limits}.\n" for family in FAMILIES.values() if family.limits
    )
    return {
        "families": FAMILIES_HEAD + "".join(map(_row, FAMILIES.values())) + "".join(limits),
        "images": WRAPPERS_HEAD + "".join(_wrapped(name, each) for name, each in WRAPPERS.items()),
    }


def _wrapped(name: str, wrapper: Wrapper) -> str:
    parts = ", ".join(f"`{BY_MODEL_TYPE[text].architecture}`" for text in wrapper.texts)
    return f"| `{name}` | {parts} | {wrapper.models} |\n"


def _row(family: Family) -> str:
    gpu = "ran" if family.architecture in RAN_ON_GPU else "never run"
    return f"| `{family.architecture}` | {family.models} | tested | tested | {gpu} | tested |\n"
