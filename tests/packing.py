"""Writers of the quantised formats that people have, by the rules of those who defined them, for tiny checkpoints.

Each writes a folder in the format and, beside it, a plain one with the weights that the format's own rule gives back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E4M3 = torch.float8_e4m3fn
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors of a module by their last names, and the weight [N, K] float32 that they mean."""


def rewrite(
    source: Path, target: Path, quantization: dict[str, Any], pack: Callable[[str, torch.Tensor], Packed]
) -> tuple[Path, Path]:
    """``source`` with its decoder's linears packed; returns that folder and the plain one, in float32."""
    tensors = load_file(source / "model.safetensors")
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            packed[name], plain[name] = tensor, tensor.float()
            continue
        module = name.removesuffix(".weight")
        stored, plain[name] = pack(module, tensor.float())
        packed |= {f"{module}.{leaf}": value.contiguous() for leaf, value in stored.items()}
    return _write(source, target, quantization, packed, plain)


def _write(
    source: Path,
    target: Path,
    quantization: dict[str, Any],
    packed: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
) -> tuple[Path, Path]:
    """``source`` with other tensors: quantised ones, and those that they mean."""
    config = json.loads((source / "config.json").read_text())
    for folder, content, extra in (
        (target / "packed", packed, {"quantization_config": quantization}),
        (target / "plain", plain, {"dtype": "float32"}),
    ):
        shutil.copytree(source, folder)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra))
    return target / "packed", target / "plain"


# FP8 -----------------------------------------------------------------------------------------------------------------


def fp8_codes(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (weight / scale).clamp(-448, 448).to(E4M3)
    return codes, codes.float() * scale


def fp8_tensor(names: tuple[str, str | None]) -> Callable[[str, torch.Tensor], Packed]:
    """A scale for each tensor, under these names of weight and input scale."""

    def pack(module: str, weight: torch.Tensor) -> Packed:
        scale = weight.abs().amax() / 448
        codes, values = fp8_codes(weight, scale)
        stored = {"weight": codes, names[0]: scale.clone()}
        if names[1]:
            stored[names[1]] = torch.tensor(0.05 if "down" in module else 0.02)
        return stored, values

    return pack


def fp8_channel(module: str, weight: torch.Tensor) -> Packed:
    """compressed-tensors' FP8-dynamic: bf16 scales [N, 1]."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes, values = fp8_codes(weight, scale.float())
    return {"weight": codes, "weight_scale": scale}, values


def fp8_blocks(name: str) -> Callable[[str, torch.Tensor], Packed]:
    def pack(module: str, weight: torch.Tensor) -> Packed:
        rows, columns = (-(-size // 128) for size in weight.shape)
        scales = torch.empty(rows, columns)
        codes, values = torch.empty(weight.shape, dtype=E4M3), torch.empty_like(weight)
        for row in range(rows):
            for column in range(columns):
                at = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
                scales[row, column] = weight[at].abs().amax() / 448
                codes[at], values[at] = fp8_codes(weight[at], scales[row, column])
        return {"weight": codes, name: scales}, values

    return pack


def compressed_fp8(strategy: str, inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """``quantization_config`` as llm-compressor writes it."""
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False,
        "group_size": None, "block_structure": None, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | more,
                "input_activations": inputs,
                "output_activations": None,
                "format": "float-quantized",
            }
        },
    }


def float_inputs(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def hugging_face_fp8(scheme: str, block: list[int] | None) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": scheme,
        "weight_block_size": block,
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
    }


FP8_FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], Packed]]] = {
    "compressed-static": (
        compressed_fp8("tensor", float_inputs("tensor", False)), fp8_tensor(("weight_scale", "input_scale")),
    ),
    "compressed-dynamic": (compressed_fp8("channel", float_inputs("token", True)), fp8_channel),
    "compressed-blocks": (
        compressed_fp8("block", float_inputs("group", True), block_structure=[128, 128]),
        fp8_blocks("weight_scale"),
    ),
    "hf-static": (
        hugging_face_fp8("static", None), fp8_tensor(("weight_scale_inv", "activation_scale")),
    ),
    "hf-blocks": (hugging_face_fp8("dynamic", [128, 128]), fp8_blocks("weight_scale_inv")),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor(("weight_scale", "input_scale")),
    ),
}  # fmt: skip
# 4 bits --------------------------------------------------------------------------------------------------------------


def int4_codes(
    weight: torch.Tensor, group: int, symmetric: bool, index: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], scales [N, G] fp16, zeros [N, G], and what they mean; ``index`` [K] is the group of each input."""
    rows, inputs = weight.shape
    index = torch.arange(inputs) // group if index is None else index
    groups = int(index.max()) + 1
    scales, zeros = torch.empty(rows, groups), torch.full((rows, groups), 8)
    for number in range(groups):
        part = weight[:, index == number]
        if symmetric:
            scales[:, number] = part.abs().amax(1) / 7.5
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, number] = (high - low) / 15
            zeros[:, number] = (-low / scales[:, number]).round().clamp(0, 15).long()
    if not symmetric:  # a group with each of the zeros at the ends
        zeros[0, 0], zeros[1, 0] = 0, 15
    scales = scales.half()
    wide, offset = scales.float()[:, index], zeros[:, index]
    codes = ((weight / wide).round() + offset).clamp(0, 15).long()
    return codes, scales, zeros, (codes - offset) * wide


def words(codes: torch.Tensor, dim: int, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours along ``dim`` in 32 bits: the j-th at bits 4 * places[j]; filled up with zeros."""
    moved = codes.movedim(dim, -1)
    padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = sum(padded[..., j].long() << 4 * place for j, place in enumerate(places))
    return packed.to(torch.int64).sub((packed >> 31) * 2**32).to(torch.int32).movedim(-1, dim)


def scattered(inputs: int, group: int, seed: int) -> torch.Tensor:
    """The group of each input, as act-order leaves it: sizes alike, members anywhere."""
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
    index = torch.empty(inputs, dtype=torch.int64)
    index[order] = torch.arange(inputs) // group
    return index


def gptq(
    group: int, symmetric: bool, stored_less: int, act_order: bool = False
) -> Callable[[str, torch.Tensor], Packed]:
    def pack(module: str, weight: torch.Tensor) -> Packed:
        inputs = weight.shape[1]
        alike = 3 if "mlp" in module else 5  # modules that read the same were quantised in one order
        index = scattered(inputs, group, inputs + alike) if act_order else torch.arange(inputs) // group
        codes, scales, zeros, values = int4_codes(weight, group, symmetric, index)
        stored = {
            "qweight": words(codes.t(), 0),
            "qzeros": words((zeros.t() - stored_less) & 15, 1),
            "scales": scales.t(),
            "g_idx": index.to(torch.int32),
        }
        return stored, values

    return pack


def gptq_config(group: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    own = {"bits": 4, "group_size": group, "sym": symmetric, "desc_act": False, "true_sequential": True}
    return {"quant_method": "gptq", **own, "damp_percent": 0.01, "lm_head": False, **more}


def awq(group: int) -> Callable[[str, torch.Tensor], Packed]:
    def pack(module: str, weight: torch.Tensor) -> Packed:
        codes, scales, zeros, values = int4_codes(weight, group, symmetric=False)
        # Of eight neighbouring outputs the packed ones are 0, 2, 4, 6, 1, 3, 5, 7.
        places = (0, 4, 1, 5, 2, 6, 3, 7)
        stored = {"qweight": words(codes.t(), 1, places), "qzeros": words(zeros.t(), 1, places)}
        return stored | {"scales": scales.t()}, values

    return pack


def compressed_int4(
    group: int, symmetric: bool, act_order: bool = False
) -> Callable[[str, torch.Tensor], Packed]:
    def pack(module: str, weight: torch.Tensor) -> Packed:
        inputs = weight.shape[1]
        index = scattered(inputs, group, inputs + 1) if act_order else torch.arange(inputs) // group
        codes, scales, zeros, values = int4_codes(weight, group, symmetric, index)
        stored = {
            "weight_packed": words(codes, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = words(zeros, 0)
        if act_order:
            stored["weight_g_idx"] = index.to(torch.int32)
        return stored, values

    return pack


def compressed_int4_config(group: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    config = compressed_fp8("group", None)
    (scheme,) = config["config_groups"].values()
    scheme["weights"] |= {"num_bits": 4, "type": "int", "group_size": group, "symmetric": symmetric, **more}
    scheme["format"] = config["format"] = "pack-quantized"
    return config


def e2m1(code: int) -> float:
    """What four bits mean: sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
    return -size if code & 8 else size


def nvfp4(names: tuple[str, str, str], divides: bool) -> Callable[[str, torch.Tensor], Packed]:
    """Under these names of codes, whole scale and scale of the inputs; whether the whole scale is a divisor."""
    table = torch.tensor([e2m1(code) for code in range(16)])

    def pack(module: str, weight: torch.Tensor) -> Packed:
        whole = weight.abs().amax() / (6 * 448)
        groups = weight.unflatten(1, (-1, 16))
        scales = (groups.abs().amax(-1) / 6 / whole).clamp(2**-9, 448).to(E4M3)
        wide = (scales.float() * whole)[..., None]
        codes = ((groups / wide)[..., None] - table).abs().argmin(-1)
        codes[0, 0, :] = torch.arange(16)
        flat = codes.flatten(1).to(torch.uint8)
        stored = {names[0]: flat[:, ::2] | flat[:, 1::2] << 4, "weight_scale": scales}
        stored |= {names[1]: (1 / whole if divides else whole).reshape(1 if divides else ())}
        return stored | {names[2]: torch.tensor(0.01)}, (table[codes] * wide).flatten(1)

    return pack


def compressed_nvfp4_config() -> dict[str, Any]:
    inputs = {**float_inputs("tensor_group", False), "num_bits": 4, "group_size": 16, "dynamic": "local"}
    config = compressed_fp8("tensor_group", inputs, num_bits=4, group_size=16)
    (scheme,) = config["config_groups"].values()
    scheme["format"] = config["format"] = "nvfp4-pack-quantized"
    return config


NVFP4_FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], Packed]]] = {
    "nvfp4": (
        compressed_nvfp4_config(), nvfp4(("weight_packed", "weight_global_scale", "input_global_scale"), True),
    ),
    "modelopt-nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        nvfp4(("weight", "weight_scale_2", "input_scale"), False),
    ),
}  # fmt: skip
INT4_FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], Packed]]] = {
    "gptq": (gptq_config(32, False), gptq(32, False, stored_less=1)),
    "gptq-symmetric": (gptq_config(64, True), gptq(64, True, stored_less=1)),
    "gptq-v2": (gptq_config(64, False, checkpoint_format="gptq_v2"), gptq(64, False, stored_less=0)),
    "gptq-act-order": (gptq_config(32, True, desc_act=True), gptq(32, True, stored_less=1, act_order=True)),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, awq(64),
    ),
    "w4a16": (compressed_int4_config(64, True), compressed_int4(64, True)),
    "w4a16-asymmetric": (compressed_int4_config(32, False), compressed_int4(32, False)),
    "w4a16-act-order": (
        compressed_int4_config(32, True, actorder="group"), compressed_int4(32, True, act_order=True),
    ),
}  # fmt: skip
FORMATS = FP8_FORMATS | NVFP4_FORMATS | INT4_FORMATS


# MXFP4 ---------------------------------------------------------------------------------------------------------------

MXFP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``weight`` [E, K, N] to blocks [E, N, K / 32, 16], exponents [E, N, K / 32] and the weight that they mean.

    OCP Microscaling Formats 1.0: the exponent of 32 inputs is that of their largest, less that of e2m1's largest, 2.
    """
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents = groups.abs().amax(-1).clamp_min(2.0**-60).log2().floor() - 2
    scaled = groups / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - MXFP4_VALUES).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    signs = torch.where(codes < 8, 1.0, -1.0)
    means = signs * MXFP4_VALUES[nearest] * exponents.exp2()[..., None]
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks, (exponents + 127).to(torch.uint8), means.flatten(2).transpose(1, 2)


def rewrite_experts(source: Path, target: Path) -> tuple[Path, Path]:
    """A gpt-oss with its experts in MXFP4 as published; returns that folder and the plain one, in float32."""
    packed, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            blocks, exponents, means = mxfp4(tensor)
            packed |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": exponents}
            plain[name] = means.contiguous()
        else:
            packed[name], plain[name] = tensor, tensor.float()
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip
    return _write(source, target, quantization, packed, plain)
