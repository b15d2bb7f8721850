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


def names(text: str) -> frozenset[str]:
    """The words of ``text``."""
    return frozenset(text.split())


USED = names(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act hidden_activation rms_norm_eps max_position_embeddings "
    "tie_word_embeddings rope_parameters rope_theta rope_scaling partial_rotary_factor layer_types attention_bias "
    "mlp_bias eos_token_id quantization_config"
)
GENERATION = names(
    "bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id guidance_scale length_penalty max_length max_new_tokens min_length "
    "min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams num_return_sequences pad_token_id "
    "penalty_alpha remove_invalid_values renormalize_logits repetition_penalty sep_token_id suppress_tokens "
    "temperature top_k top_p typical_p"
)
"""Defaults of Transformers' ``generate`` that older versions saved with the model; here a request says such things."""
IRRELEVANT = GENERATION | names(
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
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
"""Keys that would change the forward pass, with the values at which they do not."""

WRAPPER = names(
    "architectures model_type text_config vision_config audio_config eos_token_id tie_word_embeddings "
    "quantization_config"
)
"""What stands around the ``text_config`` of a wrapper."""

MOST = 2**31 - 1
"""Of any size: positions, ids and rows are 32 bits wide on a GPU."""


def check_keys(
    config: dict[str, Any], architecture: str, own: frozenset[str], code: str | None, source: Path | str
) -> None:
    """Raises UnsupportedModel that names the first key which is neither used nor irrelevant; null says nothing.

    ``own`` are keys that the family has besides :data:`USED`; ``code`` is a class of model code that may be named,
    since it computes what the family does.
    """
    for key, value in config.items():
        if value is None or key in USED or key in own or key in IRRELEVANT:
            continue
        if key == "auto_map":
            if not isinstance(value, dict) or value.get("AutoModelForCausalLM") in (None, code):
                continue
            raise UnsupportedModel(
                f"{source}: auto_map brings model code of its own, which is not run: use a checkpoint "
                f"of plain {architecture}"
            )
        if key not in NEUTRAL:
            raise _unheard(key, value, architecture, source)
        if value not in NEUTRAL[key]:
            raise UnsupportedModel(
                f"{source}: {key}={short(value)} is not implemented "
                f"(only {short(NEUTRAL[key][0])}): use another checkpoint"
            )


def check_wrapper_keys(
    config: dict[str, Any], architecture: str, own: frozenset[str], source: Path | str
) -> None:
    """As :func:`check_keys`, for what stands around ``text_config``; ``own`` is of the parts that are left out."""
    for key, value in config.items():
        if value is not None and key not in own | WRAPPER | IRRELEVANT:
            raise _unheard(key, value, architecture, source)


def _unheard(key: str, value: Any, architecture: str, source: Path | str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source}: {key}={short(value)} is not known for {architecture}, and may change what "
        "the model computes: remove the key if it does not, else use another checkpoint"
    )


class Fields:
    """Values of ``config.json`` with their types checked; a null counts as absent.

    The methods raise UnsupportedModel in one line that names the field, its value and what it must be.
    """

    def __init__(self, config: dict[str, Any], source: Path | str) -> None:
        self.config = config
        self.source = source

    def refuse(self, name: str, remedy: str) -> UnsupportedModel:
        value = short(self.config.get(name))
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

    def positives(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self._get(name, None)
        if not isinstance(value, list) or not value:
            raise self.refuse(name, "it must be a list of numbers")
        return tuple(Fields({name: each}, self.source).positive(name) for each in value)

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


def short(value: Any) -> str:
    """``value`` for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
