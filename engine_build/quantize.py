"""Stage 3: FP8 post-training quantisation with NVIDIA ModelOpt, and the pass that makes the result unambiguous.

The result is one Hugging Face folder in ModelOpt's unified FP8 format, which every backend loads: e4m3 weights with a
scalar ``weight_scale`` and ``input_scale`` for each linear layer, a ``k_scale`` and a ``v_scale`` for an e4m3 KV cache,
embeddings and norms in bf16. Of a model for images it is the language part alone.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from flightline.engine_build import source_model
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import (
    TOKENIZER_FILES,
    read_json,
    read_tensors,
    with_both_rope_spellings,
    with_common_tokenizer_class,
    write_json,
    write_tensors,
)
from flightline.engine_build.prompts import Sample
from flightline.torch_engine.model.config_json import load_spec, plain_config
from flightline.torch_engine.model.layout import plain_names
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.weights import Checkpoint

E4M3_MAX = 448.0
MAX_SAMPLE_TOKENS = 512
ANSWER_TOKENS = 32
MAX_ANSWERS = 8
"""Answers show calibration the activations of decoding; those to the shortest prompts do, at a fraction of the time."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines run as one matrix product, with one scale."""


@dataclass(frozen=True)
class Calibration:
    """What calibration saw."""

    samples: int
    tokens: int


def quantize(source: Path, samples: list[Sample], folder: Path, device: str, dtype: str) -> Calibration:
    """Writes the FP8 checkpoint of ``source`` into ``folder``.

    Args:
        source: bf16 checkpoint.
        samples: calibration prompts; chats that end with the user get the model's own greedy answer.
        folder: an empty folder.
        device: ``cpu`` or ``cuda``.
        dtype: of the calibration run; float32 where bf16 is slow.

    Raises:
        BuildError: ModelOpt does not know the model, or a scale came out zero or not finite.
    """
    model, tokenizer = source_model.load(source, device, dtype)
    batches = _calibration_ids(model, tokenizer, samples)
    raw = folder / "modelopt"
    _run_modelopt(model, [ids.to(device) for ids in batches], raw)
    del model
    _write_unified(source, raw, folder)
    shutil.rmtree(raw)
    return Calibration(len(batches), sum(ids.numel() for ids in batches))


def _calibration_ids(model: Any, tokenizer: Any, samples: list[Sample]) -> list[torch.Tensor]:
    """One ``[1, tokens]`` tensor a sample; unpadded, because padding would count in the activation maxima."""
    limit = min(MAX_SAMPLE_TOKENS, model.config.get_text_config().max_position_embeddings - ANSWER_TOKENS)
    rows = [source_model.encode(tokenizer, sample.render(tokenizer), limit) for sample in samples]
    asking = [index for index, sample in enumerate(samples) if sample.wants_answer]
    asking = sorted(asking, key=lambda index: len(rows[index]))[:MAX_ANSWERS]
    answers = source_model.greedy(model, [rows[index] for index in asking], ANSWER_TOKENS)
    for index, answer in zip(asking, answers, strict=True):
        rows[index] = rows[index] + answer
    return [torch.tensor([row]) for row in rows if row]


def _run_modelopt(model: Any, batches: list[torch.Tensor], folder: Path) -> None:
    def feed(model: Any) -> None:
        for ids in batches:
            model(ids, use_cache=False, logits_to_keep=1)

    with _quiet():
        import modelopt.torch.export as mte
        import modelopt.torch.quantization as mtq

        try:
            with torch.inference_mode():
                recipe = mtq.utils.update_quant_cfg_with_kv_cache_quant(
                    copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"]
                )
                model = mtq.quantize(model, recipe, feed)
                mte.export_hf_checkpoint(model, export_dir=folder)
        except (NotImplementedError, AssertionError, ValueError) as error:
            why = (str(error).splitlines() or ["no reason given"])[0]
            raise BuildError(
                f"ModelOpt cannot quantise {type(model).__name__} ({why}): use PRECISION=bf16"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints its progress and warns about itself; neither concerns the user."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _write_unified(source: Path, exported: Path, folder: Path) -> None:
    """The post-pass: shared scales for fused layers, weights quantised from the source, common spellings."""
    spec = load_spec(source)
    tensors, source_tensors = _plain_tensors(exported, spec), _plain_tensors(source, spec)
    linears = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    scales = {
        name: _scale(source_tensors[f"{name}.weight"].float().abs().max(), name, "weight") for name in linears
    }
    inputs = {name: _scale(tensors[f"{name}.input_scale"] * E4M3_MAX, name, "input") for name in linears}

    unified: dict[str, torch.Tensor] = {}
    for name, tensor in source_tensors.items():
        layer = name.removesuffix(".weight")
        if layer in linears and name.endswith(".weight"):
            group = _fused_group(layer, linears)
            scale = max(scales[member] for member in group)
            unified[name] = to_e4m3(tensor, scale)
            unified[f"{layer}.weight_scale"] = torch.tensor(scale, dtype=torch.float32)
            unified[f"{layer}.input_scale"] = torch.tensor(
                max(inputs[member] for member in group), dtype=torch.float32
            )
        elif not (spec.tie_embeddings and name == "lm_head.weight"):
            unified[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    for name, tensor in tensors.items():
        if name.endswith((".k_scale", ".v_scale")):
            unified[name] = torch.tensor(_scale(tensor * E4M3_MAX, name, "cached"), dtype=torch.float32)
    save_torch_state_dict(unified, folder, max_shard_size="5GB")
    _write_configs(source, exported, folder)


def _plain_tensors(folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The language model's tensors, by the names that they have without a wrapper."""
    tensors = dict(read_tensors(folder))
    return {plain: tensors[name] for plain, name in plain_names(tensors, spec, folder).items()}


def to_e4m3(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """Quantises in float32. The cast turns values beyond 464 into NaN, hence the clamp."""
    return (tensor.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _fused_group(layer: str, linears: set[str]) -> list[str]:
    parent, leaf = layer.rsplit(".", 1)
    for group in FUSED:
        if leaf in group:
            return [name for name in (f"{parent}.{member}" for member in group) if name in linears]
    return [layer]


def _scale(amax: torch.Tensor, layer: str, what: str) -> float:
    scale = torch.tensor(float(amax), dtype=torch.float32) / E4M3_MAX
    if not torch.isfinite(scale) or scale <= 0:
        raise BuildError(
            f"{layer}: the largest {what} value is {float(amax)}, so it has no FP8 scale: "
            "use PRECISION=bf16, or other calibration data (CALIB=)"
        )
    return float(scale)


def _write_configs(source: Path, exported: Path, folder: Path) -> None:
    """The configuration of the source's language part, plus ModelOpt's two descriptions of the quantisation."""
    config = with_both_rope_spellings(plain_config(read_json(source / "config.json")))
    config["quantization_config"] = read_json(exported / "config.json")["quantization_config"]
    config["torch_dtype"] = config["dtype"] = "bfloat16"
    # What the KV cache is made of is the engine's choice: the checkpoint has the scales for e4m3 and asks for nothing.
    config["quantization_config"].pop("kv_cache_scheme", None)
    write_json(folder / "config.json", config)
    described = read_json(exported / "hf_quant_config.json")
    described["quantization"]["kv_cache_quant_algo"] = None
    write_json(folder / "hf_quant_config.json", described)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.exists():
        write_json(tokenizer_config, with_common_tokenizer_class(read_json(tokenizer_config)))


def dequantize(source: Path, folder: Path) -> None:
    """Writes the bf16 checkpoint that a quantised one stands for: what plain Transformers can run."""
    write_tensors(Checkpoint(source, load_spec(source)).plain_tensors(torch.bfloat16), folder)
    config = with_both_rope_spellings(plain_config(read_json(source / "config.json")))
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
