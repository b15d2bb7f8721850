"""What ``config.json`` may say: every key is one that the engine uses, or one known not to change the forward pass.

An unknown key is refused by name: a checkpoint that asks for something that nobody looked at would run, and be wrong.
No torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that the engine does not implement; the message lists what it does."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


USED = _names(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act hidden_activation rms_norm_eps max_position_embeddings "
    "tie_word_embeddings rope_parameters rope_theta rope_scaling layer_types attention_bias mlp_bias eos_token_id "
    "quantization_config"
)
QWEN_MOE = _names(
    "sliding_window use_sliding_window max_window_layers num_experts num_local_experts num_experts_per_tok "
    "moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers"
)
USED_BY_FAMILY = {
    "MistralForCausalLM": frozenset({"sliding_window"}),
    "Qwen2ForCausalLM": frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
    "Qwen3ForCausalLM": frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
    "Qwen3MoeForCausalLM": QWEN_MOE,
    "Qwen2MoeForCausalLM": QWEN_MOE | {"qkv_bias", "shared_expert_intermediate_size"},
    "MixtralForCausalLM": _names("sliding_window num_local_experts num_experts_per_tok"),
    "Gemma2ForCausalLM": frozenset(
        {"sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
    ),
    "Gemma3ForCausalLM": _names(
        "sliding_window query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
        "sliding_window_pattern _sliding_window_pattern rope_local_base_freq"
    ),
}

GENERATION = _names(
    "bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id guidance_scale length_penalty max_length max_new_tokens min_length "
    "min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams num_return_sequences pad_token_id "
    "penalty_alpha remove_invalid_values renormalize_logits repetition_penalty sep_token_id suppress_tokens "
    "temperature top_k top_p typical_p"
)
"""Defaults of Transformers' ``generate`` that older versions saved with the model; here a request says such things."""
IRRELEVANT = GENERATION | _names(
    # Training: nothing is dropped, initialised or lost when a model only reads.
    "attention_dropout attn_pdrop classifier_dropout embd_pdrop gradient_checkpointing hidden_dropout "
    "initializer_range neftune_noise_alpha resid_pdrop residual_dropout router_aux_loss_coef router_jitter_noise "
    "tf_legacy_loss "
    # How Transformers runs it or returns it.
    "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled attn_implementation cache_implementation "
    "chunk_size_feed_forward dtype is_decoder logits_to_keep num_logits_to_keep output_attentions "
    "output_hidden_states output_router_logits output_scores pretraining_tp return_dict return_dict_in_generate "
    "torch_dtype torchscript use_bfloat16 use_cache "
    # Names and notes.
    "_commit_hash _name_or_path cross_attention_hidden_size finetuning_task id2label is_llama_config label2id "
    "model_max_length prefix problem_type sliding_window_size task_specific_params tokenizer_class "
    "transformers.js_config transformers_version unsloth_fixed unsloth_version"
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
"""Keys that would change the forward pass, with the values at which they do not."""

ROPE_SETTINGS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": _names(
        "factor original_max_position_embeddings beta_fast beta_slow truncate attention_factor mscale "
        "mscale_all_dim"
    ),
}
"""What each ``rope_type`` has besides ``rope_theta``."""
ROPE_NEEDED = {"linear": ROPE_SETTINGS["linear"], "llama3": ROPE_SETTINGS["llama3"], "yarn": {"factor"}}

MOST = 2**31 - 1
"""Of any size: positions, ids and rows are 32 bits wide on a GPU."""


def check_keys(config: dict[str, Any], architecture: str, folder: Path) -> None:
    """Raises UnsupportedModel that names the first key which is neither used nor irrelevant; null says nothing."""
    used = USED | USED_BY_FAMILY.get(architecture, frozenset())
    for key, value in config.items():
        if value is None or key in used or key in IRRELEVANT:
            continue
        if key == "auto_map":
            if "AutoModelForCausalLM" not in value:
                continue
            raise UnsupportedModel(
                f"{folder}/config.json: auto_map brings model code of its own, which is not run: use a checkpoint "
                f"of plain {architecture}"
            )
        if key not in NEUTRAL:
            raise UnsupportedModel(
                f"{folder}/config.json: {key}={_short(value)} is not known for {architecture}, and may change what "
                "the model computes: remove the key if it does not, else use another checkpoint"
            )
        if value not in NEUTRAL[key]:
            raise UnsupportedModel(
                f"{folder}/config.json: {key}={_short(value)} is not implemented "
                f"(only {_short(NEUTRAL[key][0])}): use another checkpoint"
            )


class Fields:
    """Values of ``config.json`` with their types checked; a null counts as absent.

    The methods raise UnsupportedModel in one line that names the field, its value and what it must be.
    """

    def __init__(self, config: dict[str, Any], source: Path | str) -> None:
        self.config = config
        self.source = source

    def refuse(self, name: str, remedy: str) -> UnsupportedModel:
        value = _short(self.config.get(name))
        return UnsupportedModel(f"{self.source}: {name}={value} is not valid: {remedy}")

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= MOST:
            raise self.refuse(name, f"it must be a whole number from {least} to {MOST}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(name, "it must be a positive number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.refuse(name, "it must be true or false")
        return value

    def table(self, name: str) -> dict[str, Any]:
        value = self.config.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, "it must be an object")
        return value or {}

    def words(self, name: str) -> list[str]:
        value = self.config.get(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(word, str) for word in value)
        ):
            raise self.refuse(name, "it must be a list of words")
        return value or []

    def ids(self, name: str) -> tuple[int, ...] | None:
        """One token id or a list of them."""
        value = self.config.get(name)
        if value is None:
            return None
        found = value if isinstance(value, list) else [value]
        if not all(type(each) is int and 0 <= each <= MOST for each in found):
            raise self.refuse(name, "it must be a token id or a list of them")
        return tuple(found)

    def _get(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        if value is not None:
            return value
        if default is None:
            raise UnsupportedModel(f"{self.source} lacks {name}: fetch the checkpoint again")
        return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
