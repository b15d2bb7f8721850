"""Thirty checkpoints that people have and that do not run here: each is refused by what it is, in one line.

The configurations are those of the hub, without their sizes where nobody reads that far.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flightline.engine_build.__main__ import main

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
}


def architecture(name: str, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "architectures": [name], **more}


def quantised(method: str, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": {"quant_method": method, **more}}


GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {
        "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    },
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # Architectures, of the language model alone or around it.
    "gpt-2": (architecture("GPT2LMHeadModel"), "architecture GPT2LMHeadModel"),
    "pythia": (architecture("GPTNeoXForCausalLM"), "architecture GPTNeoXForCausalLM"),
    "falcon": (architecture("FalconForCausalLM"), "architecture FalconForCausalLM"),
    "starcoder2": (architecture("Starcoder2ForCausalLM"), "architecture Starcoder2ForCausalLM"),
    "phi-2": (architecture("PhiForCausalLM"), "architecture PhiForCausalLM"),
    "command r": (architecture("CohereForCausalLM"), "architecture CohereForCausalLM"),
    "deepseek v3": (architecture("DeepseekV3ForCausalLM"), "architecture DeepseekV3ForCausalLM"),
    "llama 4": (architecture("Llama4ForConditionalGeneration"), "architecture Llama4ForConditionalGeneration"),
    "gemma 3n": (architecture("Gemma3nForConditionalGeneration"), "architecture Gemma3nFor"),
    "gemma 4": (architecture("Gemma4ForConditionalGeneration"), "architecture Gemma4For"),
    "qwen3-next": (architecture("Qwen3NextForCausalLM"), "architecture Qwen3NextForCausalLM"),
    "qwen3.5": (architecture("Qwen3_5ForConditionalGeneration"), "architecture Qwen3_5For"),
    "qwen2-vl": (architecture("Qwen2VLForConditionalGeneration"), "architecture Qwen2VLFor"),
    "mamba": (architecture("MambaForCausalLM"), "architecture MambaForCausalLM"),
    "nemotron-h": (architecture("NemotronHForCausalLM"), "architecture NemotronHForCausalLM"),
    "granite 4 hybrid": (architecture("GraniteMoeHybridForCausalLM"), "architecture GraniteMoeHybrid"),
    "t5": (architecture("T5ForConditionalGeneration"), "architecture T5ForConditionalGeneration"),
    "bert": (architecture("BertForMaskedLM"), "architecture BertForMaskedLM"),
    "a classifier": (architecture("LlamaForSequenceClassification"), "LlamaForSequenceClassification"),
    "chatglm, its own code": (architecture("ChatGLMModel"), "architecture ChatGLMModel"),
    "gemma 3 around another": (
        {**GEMMA3, "text_config": {"model_type": "gemma4_text"}}, "text_config of Gemma3ForConditionalGeneration",
    ),
    # Formats.
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "quantisation 'bitsandbytes'"),
    "hqq": (quantised("hqq", quant_config={}), "quantisation 'hqq'"),
    "aqlm": (quantised("aqlm", nbits_per_codebook=16), "quantisation 'aqlm'"),
    "mlx": ({**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, "quantization="),
    # Settings that would be silently wrong.
    "dynamic rope": ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "m-rope": (
        {**LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type 'mrope'",
    ),
    "a key of a rope nobody knows": (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_bias": 3}}, "['low_freq_bias']",
    ),
    "partial rotary": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "an encoder of gemma 3": (
        {**GEMMA3, "text_config": {**GEMMA3["text_config"], "use_bidirectional_attention": True}},
        "use_bidirectional_attention=True",
    ),
    "chunked attention": (
        {**LLAMA, "layer_types": ["chunked_attention", "full_attention"]}, "layer types ['chunked_attention']",
    ),
    "relu": ({**LLAMA, "hidden_act": "relu2"}, "hidden_act='relu2'"),
    "a key nobody knows": ({**LLAMA, "logit_scale": 0.0625}, "logit_scale=0.0625"),
    "a wrapper's key nobody knows": ({**GEMMA3, "text_scale": 2.0}, "text_scale=2.0"),
    "no architecture": ({"model_type": "llama"}, "names no architecture"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    config, why = REFUSED[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    assert main(["--model", str(folder), "--build-dir", str(tmp_path / "build")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and why in line, line


def test_what_is_no_checkpoint_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file, why in (
        ("adapter", "adapter_config.json", "LoRA adapter"),
        ("mistral's own", "params.json", "config.json is missing"),
        ("pickled", "pytorch_model.bin", "config.json is missing"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_text("{}")
        assert main(["--model", str(folder), "--build-dir", str(tmp_path / "build")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line, line
