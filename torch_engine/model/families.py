"""Which decoders the engine runs, as data: what each family does differently from Llama. No torch.

A family is here what its ``config.json`` cannot say of itself: the settings that its files may have, the values that
they leave out, and the names of its modules. ``config_json.py`` reads a file with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flightline.torch_engine.model.fields import Fields, names
from flightline.torch_engine.model.mixture import (
    Mixtures,
    glm_mixtures,
    gpt_oss_mixtures,
    mixtral_mixtures,
    qwen_mixtures,
)
from flightline.torch_engine.model.spec import Fused, Norms, QkNorm

FULL, SLIDING = "full_attention", "sliding_attention"
LayerKinds = Callable[[Fields, int], list[str]]
"""From a configuration and the number of its layers to the kind of each."""


def _all_sliding(fields: Fields, count: int) -> list[str]:
    return [SLIDING] * count


def _first_of_two_sliding(fields: Fields, count: int) -> list[str]:
    return [SLIDING if index % 2 == 0 else FULL for index in range(count)]


def _last_of_pattern_full(fields: Fields, count: int) -> list[str]:
    pattern = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 6))
    return [SLIDING if (index + 1) % pattern else FULL for index in range(count)]


def _last_of_four_full(fields: Fields, count: int) -> list[str]:
    return [SLIDING if (index + 1) % 4 else FULL for index in range(count)]


def _sliding_from_some_layer_on(fields: Fields, count: int) -> list[str]:
    first = fields.whole("max_window_layers", 28, least=0)
    return [SLIDING if index >= first else FULL for index in range(count)]


def _sliding_where_nothing_turns(fields: Fields, count: int) -> list[str]:
    return [FULL if turns else SLIDING for turns in turning_layers(fields, count)]


def _first_of_two_of_the_first_sliding(fields: Fields, count: int) -> list[str]:
    windows = fields.whole("max_window_layers", 28, least=0)
    return [SLIDING if index % 2 == 0 and index < windows else FULL for index in range(count)]


def turning_layers(fields: Fields, count: int) -> list[bool]:
    """Whether each layer has a rotary embedding, in a family some of whose layers have none."""
    listed = fields.config.get("no_rope_layers")
    if listed is None:
        interval = fields.whole("no_rope_layer_interval", 4)
        return [bool((index + 1) % interval) for index in range(count)]
    if not isinstance(listed, list) or len(listed) < count or not set(listed) <= {0, 1}:
        raise fields.refuse("no_rope_layers", f"it must be a list with 1 or 0 for each of {count} layers")
    return [bool(each) for each in listed[:count]]


LLAMA_NORMS = Norms()


@dataclass(frozen=True)
class Family:
    """What a family does differently from Llama."""

    architecture: str
    """As ``config.json`` names it."""
    model_type: str
    """As the configuration of a model that wraps it names it."""
    keys: frozenset[str] = frozenset()
    """Settings that its files may have besides :data:`fields.USED`."""
    sliding_ropes_are_plain: bool = False
    """``rope_scaling`` is of full attention alone."""
    rope_keys: frozenset[str] = frozenset()
    """Settings of its rotary embedding that do nothing within the context that is served."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of settings that its files leave out, as its class in Transformers has them."""
    activation: str = "silu"
    """If the file names none."""
    fixed_activation: str | None = None
    """Whatever the file names."""
    windowed_layers: LayerKinds = _all_sliding
    """Layer kinds of a file with a window and without ``layer_types``."""
    norms: Norms = LLAMA_NORMS
    norm_plus_one: bool = False
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    """Always; otherwise ``attention_bias`` says."""
    out_bias: bool = True
    """The output projection has a bias where ``attention_bias`` says so."""
    scales_embedding: bool = False
    """By the root of the hidden size."""
    sinks: bool = False
    """Each query head has a learned score that nothing is read for."""
    interleaved: bool = False
    """The rotary embedding pairs neighbours."""
    fused: Fused = ()
    mixtures: Mixtures | None = None
    """How its MLPs are routed; None: they are dense."""
    models: str = ""
    """Published models of the family, for the page."""
    limits: str = ""
    """What of it is not served, for the page."""
    code: str | None = None
    """The class of its own code that its files name in ``auto_map``; it computes the same."""


_QWEN_WINDOW = names("sliding_window use_sliding_window max_window_layers")
_GEMMA_CAPS = names("sliding_window query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping")
_GEMMA_NORMS = Norms(
    attention_out="post_attention_layernorm",
    mlp="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_OLMO_NORMS = Norms(
    attention=None,
    attention_out="post_attention_layernorm",
    mlp=None,
    mlp_out="post_feedforward_layernorm",
)
_FUSED_GATE: Fused = (("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),)
_FUSED_QKV: Fused = (("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),)
_GLM_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
_QWEN_MIXTURE = names(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step "
    "mlp_only_layers"
)
_FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        models="Llama 2, 3 to 3.3; SmolLM2, TinyLlama, Yi, DeepSeek R1 Distill Llama",
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        models="Mistral 7B, Nemo, Small 2409 and 2501",
        keys=names("sliding_window"),
        defaults={"sliding_window": 4096},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        models="Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ, DeepSeek R1 Distill Qwen",
        keys=_QWEN_WINDOW,
        windowed_layers=_sliding_from_some_layer_on,
        qkv_bias=True,
        out_bias=False,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        models="Qwen3 0.6B to 32B",
        keys=_QWEN_WINDOW,
        windowed_layers=_sliding_from_some_layer_on,
        qk_norm="head",
    ),
    Family(
        "GemmaForCausalLM",
        "gemma",
        models="Gemma, CodeGemma",
        defaults={"tie_word_embeddings": True},
        fixed_activation="gelu_pytorch_tanh",  # its "gelu" has always meant the tanh form
        norm_plus_one=True,
        scales_embedding=True,
    ),
    Family(
        "Gemma2ForCausalLM",
        "gemma2",
        models="Gemma 2",
        keys=_GEMMA_CAPS,
        defaults={
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation="gelu_pytorch_tanh",
        windowed_layers=_first_of_two_sliding,
        norms=_GEMMA_NORMS,
        norm_plus_one=True,
        scales_embedding=True,
    ),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        models="Gemma 3 270M and 1B",
        keys=_GEMMA_CAPS | names("sliding_window_pattern _sliding_window_pattern rope_local_base_freq"),
        defaults={  # the wrappers of the 4B to 27B name few of their sizes
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        activation="gelu_pytorch_tanh",
        windowed_layers=_last_of_pattern_full,
        norms=_GEMMA_NORMS,
        norm_plus_one=True,
        qk_norm="head",
        sliding_ropes_are_plain=True,
        scales_embedding=True,
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        models="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
        keys=names("sliding_window partial_rotary_factor original_max_position_embeddings"),
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        fused=(*_FUSED_QKV, *_FUSED_GATE),
        limits="beyond its first context (LongRoPE), all requests get the factors for long ones: MAX_SEQ_LEN decides",
        code="modeling_phi3.Phi3ForCausalLM",
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        models="SmolLM3",
        keys=_QWEN_WINDOW | names("no_rope_layers no_rope_layer_interval"),
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        windowed_layers=_sliding_where_nothing_turns,
    ),
    Family(
        "GraniteForCausalLM",
        "granite",
        models="Granite 3.0 to 3.3, dense",
        keys=names("embedding_multiplier attention_multiplier residual_multiplier logits_scaling"),
        defaults=dict.fromkeys(
            ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
        ),
    ),
    Family(
        "GlmForCausalLM",
        "glm",
        models="GLM-4-9B in the format of Transformers (-hf)",
        keys=names("partial_rotary_factor"),
        defaults=_GLM_DEFAULTS,
        out_bias=False,
        interleaved=True,
        fused=_FUSED_GATE,
    ),
    Family(
        "Glm4ForCausalLM",
        "glm4",
        models="GLM-4-0414, GLM-Z1",
        keys=names("partial_rotary_factor"),
        defaults=_GLM_DEFAULTS,
        out_bias=False,
        norms=Norms(
            attention_out="post_self_attn_layernorm",
            mlp="post_attention_layernorm",
            mlp_out="post_mlp_layernorm",
        ),
        interleaved=True,
        fused=_FUSED_GATE,
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        models="OLMo 2",
        defaults={"rms_norm_eps": 1e-5},
        norms=_OLMO_NORMS,
        qk_norm="row",
    ),
    Family(
        "Olmo3ForCausalLM",
        "olmo3",
        models="OLMo 3",
        keys=names("sliding_window rope_local_base_freq"),
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        windowed_layers=_last_of_four_full,
        norms=_OLMO_NORMS,
        qk_norm="row",
        sliding_ropes_are_plain=True,
    ),
    Family(
        "Ministral3ForCausalLM",
        "ministral3",
        models="Ministral 3, without its eyes",
        keys=names("sliding_window"),
        rope_keys=names("llama_4_scaling_beta max_position_embeddings"),
        limits="contexts up to the one it was trained on (16,384): beyond, its queries are scaled by position",
        defaults={"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        models="Qwen3 30B-A3B and 235B-A22B, Qwen3-Coder 30B-A3B",
        keys=_QWEN_WINDOW | _QWEN_MIXTURE,
        defaults={"sliding_window": 4096, "num_key_value_heads": 4},
        qk_norm="head",
        mixtures=qwen_mixtures,
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        models="Qwen1.5-MoE-A2.7B, Qwen2 57B-A14B",
        keys=_QWEN_WINDOW | _QWEN_MIXTURE | names("qkv_bias shared_expert_intermediate_size"),
        defaults={
            "sliding_window": 4096,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 5632,
        },
        windowed_layers=_first_of_two_of_the_first_sliding,
        out_bias=False,
        mixtures=qwen_mixtures,
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        models="Mixtral 8x7B, 8x22B",
        keys=names("sliding_window num_local_experts num_experts_per_tok"),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        mixtures=mixtral_mixtures,
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        models="OLMoE 1B-7B",
        keys=_QWEN_MIXTURE - names("moe_intermediate_size decoder_sparse_step mlp_only_layers"),
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64},
        qk_norm="row",
        mixtures=qwen_mixtures,
    ),
    Family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        models="GLM-4.5, 4.5-Air, 4.6",
        limits="its layers for guesses are not read",
        keys=names(
            "n_routed_experts num_local_experts n_shared_experts num_experts_per_tok moe_intermediate_size n_group "
            "topk_group norm_topk_prob routed_scaling_factor first_k_dense_replace use_qk_norm "
            "num_nextn_predict_layers num_mtp_layers partial_rotary_factor"
        ),
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "partial_rotary_factor": 0.5,
        },
        out_bias=False,
        mixtures=glm_mixtures,
    ),
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        models="gpt-oss 20b and 120b",
        # initial_context_length is that of rope_scaling once more.
        keys=names(
            "sliding_window num_local_experts num_experts_per_tok experts_per_token swiglu_limit "
            "initial_context_length"
        ),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 131072,
            "sliding_window": 128,
            "attention_bias": True,
        },
        windowed_layers=_first_of_two_sliding,
        sinks=True,
        mixtures=gpt_oss_mixtures,
    ),
)
FAMILIES: Mapping[str, Family] = {family.architecture: family for family in _FAMILIES}
BY_MODEL_TYPE: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}


@dataclass(frozen=True)
class Wrapper:
    """A model for images whose language part is served alone."""

    texts: tuple[str, ...]
    """``model_type`` of that part."""
    keys: frozenset[str]
    """Settings of the parts that are left out."""
    models: str
    """Published ones, for the page."""


WRAPPERS: Mapping[str, Wrapper] = {
    "Gemma3ForConditionalGeneration": Wrapper(
        ("gemma3_text",),
        names("boi_token_index eoi_token_index image_token_index image_token_id mm_tokens_per_image"),
        "Gemma 3 4B, 12B and 27B",
    ),
    "Mistral3ForConditionalGeneration": Wrapper(
        ("mistral", "ministral3"),
        names(
            "image_token_index image_token_id multimodal_projector_bias projector_hidden_act spatial_merge_size "
            "vision_feature_layer"
        ),
        "Mistral Small 3.1 and 3.2, Ministral 3",
    ),
}

SUPPORTED_ARCHITECTURES = (*FAMILIES, *WRAPPERS)
