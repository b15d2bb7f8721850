"""The ``config.json`` of published models is read whole: no key is refused, and sizes left out are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flightline.torch_engine.model.config_json import load_spec

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu",
}  # fmt: skip
VISION = {"hidden_size": 1024, "image_size": 1540, "model_type": "pixtral", "patch_size": 14}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma 3 4b": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
            "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
            "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        {"vocab_size": 262208, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "end_ids": (1, 106),
         "attention_scale": 256**-0.5, "tie_embeddings": True},
    ),
    "mistral small 3.1": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
            "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
            "text_config": {
                "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
                "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
                "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e9, "sliding_window": None,
                "use_cache": True, "vocab_size": 131072,
            },
            "torch_dtype": "bfloat16", "vision_config": VISION, "vision_feature_layer": -1,
        },
        {"head_dim": 128, "num_layers": 40, "tie_embeddings": False, "wrapper": "Mistral3ForConditionalGeneration"},
    ),
    "phi-4-mini": (
        {
            **COMMON, "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
                "AutoTokenizer": "Xenova/gpt-4o",
            },
            "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_size": 3072, "intermediate_size": 8192,
            "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05, "rope_scaling": {
                "long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope",
            },
            "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
        },
        {"head_dim": 128, "max_position_embeddings": 131072, "tie_embeddings": True},
    ),
    "smollm3": (
        {
            **COMMON, "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_size": 2048,
            "intermediate_size": 11008, "layer_types": ["full_attention"] * 4, "max_position_embeddings": 65536,
            "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0], "num_attention_heads": 16, "num_hidden_layers": 4,
            "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
        },
        {"tie_embeddings": True, "head_dim": 128},
    ),
    "granite 3.3 2b": (
        {
            **COMMON, "architectures": ["GraniteForCausalLM"], "attention_bias": False,
            "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_size": 2048,
            "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40,
            "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 10000000.0, "tie_word_embeddings": True, "vocab_size": 49159,
        },
        {"attention_scale": 0.015625, "logit_divisor": 8.0},
    ),
    "glm-4 9b 0414": (
        {
            **COMMON, "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "head_dim": 128,
            "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
            "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "vocab_size": 151552,
        },
        {"qkv_bias": False, "num_kv_heads": 2},
    ),
    "olmo 3 7b": (
        {
            **COMMON, "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 65536, "model_type": "olmo3",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_attention_heads": 32,
            "num_hidden_layers": 4, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": {
                "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
            "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 100278,
        },
        {"qk_norm": "row"},
    ),
    "ministral 3": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
            "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
            "text_config": {
                "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
                "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 262144,
                "model_type": "ministral3", "num_attention_heads": 32, "num_hidden_layers": 34,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_parameters": {
                    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                    "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
                },
                "sliding_window": None, "use_cache": True, "vocab_size": 131072,
            },
            "tie_word_embeddings": False, "vision_config": VISION, "vision_feature_layer": -1,
        },
        {"max_position_embeddings": 16384, "num_layers": 34},
    ),
    "gpt-oss 20b": (
        {
            "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
            "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
            "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
            "output_router_logits": False, "pad_token_id": 199999, "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05, "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
            "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
            "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
            "vocab_size": 201088,
        },
        {"num_layers": 24, "head_dim": 64, "num_kv_heads": 8, "qkv_bias": True, "out_bias": True, "sinks": True,
         "stored": "MXFP4, 4 bits in groups of 32", "attention_scale": 0.125},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read(tmp_path: Path, name: str) -> None:
    config, facts = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(tmp_path)
    assert {fact: getattr(spec, fact) for fact in facts} == facts


def test_what_turns(tmp_path: Path) -> None:
    specs = {}
    for name in ("gemma 3 4b", "phi-4-mini", "smollm3", "glm-4 9b 0414", "olmo 3 7b"):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
        specs[name] = [layer.rope for layer in load_spec(tmp_path).layers]
    gemma = specs["gemma 3 4b"]
    assert gemma[0].theta == 1e4 and not gemma[0].scaling
    assert gemma[5].theta == 1e6 and dict(gemma[5].scaling) == {"rope_type": "linear", "factor": 8.0}
    assert specs["phi-4-mini"][0].dims == 96
    assert [rope.dims for rope in specs["smollm3"]] == [None, None, None, 0]
    assert specs["glm-4 9b 0414"][0].dims == 64 and specs["glm-4 9b 0414"][0].interleaved
    olmo = specs["olmo 3 7b"]
    assert not olmo[0].scaling and dict(olmo[3].scaling)["rope_type"] == "yarn"


def test_windows_and_experts_of_gpt_oss(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt-oss 20b"][0]))
    first, second, *_ = load_spec(tmp_path).layers
    assert first.window == 128 and second.window is None
    assert first.rope == second.rope and dict(first.rope.scaling)["truncate"] is False
    mixture = first.mixture
    assert mixture is not None
    assert (mixture.experts, mixture.chosen, mixture.inner, mixture.clamp) == (32, 4, 2880, 7.0)
