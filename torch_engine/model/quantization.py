"""How the linears of a quantised checkpoint are stored: read from its configuration, proven by its tensors. No torch.

The configuration only says what tensors cannot (whether activations are quantised, the layout of 4-bit codes); each
linear's form follows from the tensors that are there. What is not implemented is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flightline.torch_engine.model.fields import Fields, UnsupportedModel

FP8 = "F8_E4M3"
PLAIN = ("F32", "BF16", "F16")
BLOCK = 128
"""Rows and columns of a weight that share a scale in FP8 by blocks."""
SUPPORTED = (
    "bf16 and fp16; FP8 of ModelOpt, compressed-tensors and Hugging Face (a scale for each tensor, output or block of "
    "128x128); 4 bits of GPTQ, AWQ and compressed-tensors (W4A16); NVFP4 of ModelOpt and compressed-tensors; "
    "MXFP4 of gpt-oss; GGUF files"
)
NVFP4_GROUP = 16
"""Inputs that share a scale in NVFP4."""
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")
"""ModelOpt and compressed-tensors, then Hugging Face FP8."""
KV_SCALES = ("k_scale", "v_scale")
BESIDE_CODES = (*WEIGHT_SCALES, *INPUT_SCALES)
"""What FP8 codes may have beside them."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Quantization:
    """What the configuration says of all quantised linears."""

    name: str
    """For people."""
    static: bool
    """Activations have one scale, known beforehand; else they are quantised as they come."""
    blocks: bool = False
    """A scale for each 128x128 weights."""
    packing: Literal["", "compressed", "gptq", "awq", "nvfp4", "modelopt-nvfp4", "mxfp4", "flightline"] = ""
    """How codes of 4 bits lie in words or bytes, or integers of any format in our own layout; empty for FP8."""
    group: int = 0
    """Inputs that share a scale, of codes of 4 bits; 0 = all."""
    symmetric: bool = False
    """8 means zero, of codes of 4 bits; else each group has its own zero."""
    zero_plus_one: bool = False
    """Zeros are stored less one."""

    @property
    def int4(self) -> bool:
        return bool(self.packing)

    @property
    def inputs_of_a_scale(self) -> int:
        """Neighbouring inputs that no cut may part; 0 = all may, or only the tensors tell."""
        return BLOCK if self.blocks else self.group

    @property
    def experts_alone(self) -> bool:
        """Attention is stored as it is."""
        return self.packing == "mxfp4"

    @property
    def floats(self) -> bool:
        """Codes of 4 bits are floating-point numbers."""
        return self.packing in ("nvfp4", "modelopt-nvfp4")


# The configuration --------------------------------------------------------------------------------------------------


def read_quantization(folder: Path, fields: Fields) -> Quantization | None:
    """From ``hf_quant_config.json`` or ``quantization_config``; None for a checkpoint that is not quantised.

    Raises UnsupportedModel that names the format, or the first setting of one that is not implemented.
    """
    path = folder / "hf_quant_config.json"
    if path.exists():
        own = Fields(_read_json(path), path).table("quantization")
        return _modelopt(folder, Fields(own, path)) if own else None
    settings = fields.table("quantization_config") or _in_a_file_of_its_own(folder)
    if not settings:
        return None
    asked = Fields(settings, f"{folder}/config.json: quantization_config")
    method = settings.get("quant_method")
    if "quant_algo" in settings:
        return _modelopt(folder, asked)
    if method == "fp8":
        return _hugging_face_fp8(folder, asked)
    if method == "compressed-tensors":
        return _compressed_tensors(folder, asked)
    if method == "flightline":
        return Quantization(str(asked.config.get("name")), static=False, packing="flightline")
    if method == "mxfp4":
        _only(asked, "quant_method modules_to_not_convert dequantize")
        return Quantization("MXFP4, 4 bits in groups of 32", False, packing="mxfp4", group=32)
    if method == "gptq":
        return _gptq(asked)
    if method == "awq":
        return _awq(asked)
    raise refuse_format(folder, method)


def _in_a_file_of_its_own(folder: Path) -> dict[str, Any]:
    """As the first tools for GPTQ and AWQ wrote it."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).exists():
            return {"quant_method": method} | _read_json(folder / name)
    return {}


def refuse_format(folder: Path, name: object) -> UnsupportedModel:
    return UnsupportedModel(f"{folder}: quantisation {name!r} is not supported; supported are {SUPPORTED}")


def _modelopt(folder: Path, asked: Fields) -> Quantization:
    algorithm = asked.config.get("quant_algo")
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return Quantization("ModelOpt FP8, a scale for each output", static=False)
    if algorithm in ("NVFP4", "W4A16_NVFP4"):  # the same weights; activations stay as they are
        _expect(asked, group_size=(NVFP4_GROUP, None))
        return Quantization(f"ModelOpt {algorithm}", False, packing="modelopt-nvfp4", group=NVFP4_GROUP)
    if algorithm != "FP8":
        raise refuse_format(folder, algorithm or asked.config.get("quant_method"))
    return Quantization("ModelOpt FP8", static=True)


def _hugging_face_fp8(folder: Path, asked: Fields) -> Quantization:
    _only(
        asked,
        "quant_method activation_scheme weight_block_size modules_to_not_convert ignored_layers fmt scale_fmt "
        "kv_cache_scheme dequantize",
    )
    scheme = asked.config.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise asked.refuse("activation_scheme", "it must be static or dynamic")
    if asked.config.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise asked.refuse("fmt", "only e4m3 is implemented")
    if asked.config.get("scale_fmt") not in (None, "float"):
        raise asked.refuse("scale_fmt", "only scales in floating point are implemented")
    block = asked.config.get("weight_block_size")
    if block is None:
        return Quantization(f"Hugging Face FP8, {scheme} activations", static=scheme == "static")
    if block != [BLOCK, BLOCK]:
        raise asked.refuse("weight_block_size", f"only blocks of [{BLOCK}, {BLOCK}] are implemented")
    if scheme == "static":
        raise asked.refuse("activation_scheme", "blocks have dynamic activations")
    return Quantization("Hugging Face FP8 in blocks of 128x128", static=False, blocks=True)


def _compressed_tensors(folder: Path, asked: Fields) -> Quantization:
    _only(
        asked,
        "quant_method format config_groups ignore kv_cache_scheme quantization_status global_compression_ratio "
        "sparsity_config transform_config version run_compressed",
    )
    if asked.table("transform_config"):
        raise asked.refuse("transform_config", "rotations of weights and activations are not implemented")
    if asked.table("sparsity_config").get("format", "dense") != "dense":
        raise asked.refuse("sparsity_config", "sparse weights are not implemented")
    if asked.config.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise asked.refuse("quantization_status", "the checkpoint must be saved compressed")
    groups = asked.table("config_groups")
    found = {_compressed_group(folder, asked, name, group) for name, group in groups.items()}
    if len(found) != 1:
        raise asked.refuse("config_groups", "exactly one scheme for all quantised linears is implemented")
    return found.pop()


def _compressed_group(folder: Path, asked: Fields, name: str, group: Any) -> Quantization:
    source = f"{asked.source}: {name}"
    if not isinstance(group, dict):
        raise asked.refuse("config_groups", "each group must be an object")
    one = Fields(group, source)
    _only(one, "targets weights input_activations output_activations format")
    form = group.get("format") or asked.config.get("format")
    if one.table("output_activations"):
        raise one.refuse("output_activations", "quantised outputs are not implemented")
    weights = Fields(one.table("weights"), f"{source}: weights")
    inputs = Fields(one.table("input_activations"), f"{source}: input_activations")
    if form in ("float-quantized", "naive-quantized") and weights.config.get("type") == "float":
        return _compressed_fp8(weights, inputs)
    if form == "pack-quantized" and weights.config.get("type") == "int" and not inputs.config:
        return _compressed_int4(folder, weights)
    if form == "nvfp4-pack-quantized" and weights.config.get("type") == "float":
        _expect(
            weights, num_bits=(4,), group_size=(NVFP4_GROUP,), dynamic=(False, None), symmetric=(True, None)
        )
        return Quantization("compressed-tensors NVFP4", False, packing="nvfp4", group=NVFP4_GROUP)
    raise refuse_format(folder, f"compressed-tensors {form}")


def _compressed_fp8(weights: Fields, inputs: Fields) -> Quantization:
    _expect(weights, num_bits=(8,), symmetric=(True, None), dynamic=(False, None))
    strategy = weights.config.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        raise weights.refuse("strategy", "a scale for each tensor, channel or block is implemented")
    blocks = strategy == "block"
    if blocks and weights.config.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        raise weights.refuse("block_structure", f"only blocks of [{BLOCK}, {BLOCK}] are implemented")
    static = False
    if inputs.config:
        _expect(inputs, num_bits=(8,), type=("float",), symmetric=(True, None))
        dynamic = inputs.config.get("dynamic", False)
        if dynamic not in (True, False):
            raise inputs.refuse("dynamic", "it must be true or false")
        static = not dynamic
        if static and inputs.config.get("strategy") not in ("tensor", None):
            raise inputs.refuse("strategy", "static activations have one scale for each tensor")
    scale = {"tensor": "tensor", "channel": "output", "block": "block of 128x128"}[strategy]
    name = (
        f"compressed-tensors FP8, a scale for each {scale}, {'static' if static else 'dynamic'} activations"
    )
    return Quantization(name, static=static, blocks=blocks)


def _compressed_int4(folder: Path, weights: Fields) -> Quantization:
    bits = weights.config.get("num_bits")
    if bits != 4:
        raise refuse_format(folder, f"compressed-tensors pack-quantized of {bits} bits")
    _expect(weights, dynamic=(False, None))
    if weights.config.get("strategy") not in ("group", "channel"):
        raise weights.refuse("strategy", "a scale for each group or channel is implemented")
    group = weights.whole("group_size") if weights.config["strategy"] == "group" else 0
    return _int4("compressed-tensors W4A16", "compressed", group, weights.flag("symmetric", True))


def _gptq(asked: Fields) -> Quantization:
    _only(
        asked,
        "quant_method bits group_size desc_act sym checkpoint_format static_groups true_sequential damp_percent "
        "damp_auto_increment model_name_or_path model_file_base_name pack_dtype meta lm_head dataset tokenizer "
        "batch_size block_name_to_quantize cache_block_outputs disable_exllama exllama_config max_input_length "
        "model_seqlen module_name_preceding_first_block modules_in_block_to_quantize pad_token_id use_cuda_fp16 "
        "use_exllama quantizer act_group_aware mse",
    )
    _expect(asked, bits=(4,), pack_dtype=("int32", None), checkpoint_format=("gptq", "gptq_v2", None))
    first = asked.config.get("checkpoint_format") != "gptq_v2"
    return _int4("GPTQ", "gptq", _group_size(asked, "group_size"), asked.flag("sym", True), first)


def _awq(asked: Fields) -> Quantization:
    _only(
        asked,
        "quant_method bits w_bit group_size q_group_size zero_point version modules_to_not_convert backend do_fuse "
        "exllama_config fuse_max_seq_len modules_to_fuse",
    )
    bits = "bits" if "bits" in asked.config else "w_bit"
    _expect(asked, **{bits: (4,)})
    if str(asked.config.get("version", "gemm")).lower() != "gemm":
        raise asked.refuse("version", "only the layout 'gemm' is implemented")
    _expect(asked, zero_point=(True, None))
    group = "group_size" if "group_size" in asked.config else "q_group_size"
    return _int4("AWQ", "awq", _group_size(asked, group), symmetric=False)


def _group_size(asked: Fields, name: str) -> int:
    return 0 if asked.config.get(name) == -1 else asked.whole(name, 128)


def _int4(
    name: str,
    packing: Literal["compressed", "gptq", "awq"],
    group: int,
    symmetric: bool,
    zero_plus_one: bool = False,
) -> Quantization:
    words = f"{name}, 4 bits in groups of {group}" if group else f"{name}, 4 bits"
    return Quantization(words, False, False, packing, group, symmetric, zero_plus_one)


def _only(asked: Fields, known: str) -> None:
    for key, value in asked.config.items():
        if key not in known.split() and value not in (None, False, {}, []):
            raise asked.refuse(key, "the setting is not known, and may change what the codes mean")


def _expect(asked: Fields, **wanted: tuple[Any, ...]) -> None:
    for name, values in wanted.items():
        if asked.config.get(name) not in values:
            raise asked.refuse(name, f"only {values[0]!r} is implemented")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} is not a JSON object: fetch the checkpoint again")
    return value


# The tensors ---------------------------------------------------------------------------------------------------------


def scale_shapes(shape: tuple[int, ...], blocks: bool) -> dict[tuple[int, ...], str]:
    """Shapes that the scales of FP8 codes of ``shape`` [N, K] may have, and what a scale is for."""
    if blocks:
        return {tuple(-(-size // BLOCK) for size in shape): "block of 128x128"}
    return {(): "tensor", (1,): "tensor", (1, 1): "tensor", (shape[0], 1): "output", (shape[0],): "output"}


BESIDE_INT4: dict[str, tuple[str, ...]] = {
    "compressed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "modelopt-nvfp4": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "mxfp4": ("blocks", "scales"),
    "flightline": ("codes", "scales", "zeros", "minima", "bits"),
}
"""The tensors of a module of 4-bit codes by their last names, the codes first."""
CODES_PER_WORD = 8
PACKED = ("I32", "U8")
"""The types of tensors of such codes."""


def codes_of(module: str, quantization: Quantization | None) -> str | None:
    """The tensor that holds a module's codes of 4 bits, if its checkpoint has such; of another type it has none."""
    if quantization is None or not quantization.packing:
        return None
    between = "_" if quantization.packing == "mxfp4" else "."
    return f"{module}{between}{BESIDE_INT4[quantization.packing][0]}"


def check_int4(
    module: str,
    shape: tuple[int, ...],
    stored: Mapping[str, Stored],
    quantization: Quantization,
    folder: Path,
) -> None:
    """Checks the tensors of a module [N, K] of 4-bit codes; of MXFP4, of all experts [E, K, N].

    Raises UnsupportedModel that names the tensor which is missing or misshapen.
    """
    if quantization.packing == "mxfp4":
        experts, inputs, outputs = shape
        groups = -(-inputs // quantization.group)
        for leaf, last in (("blocks", (quantization.group // 2,)), ("scales", ())):
            _expect_shape(f"{module}_{leaf}", (experts, outputs, groups, *last), stored, quantization, folder)
        return
    outputs, inputs = shape
    group = quantization.group or inputs
    groups = -(-inputs // group)

    def words(size: int) -> int:
        return -(-size // CODES_PER_WORD)

    wanted: dict[str, tuple[int, ...]]
    if quantization.packing == "flightline":
        found = stored[f"{module}.codes"].shape
        wanted = {
            "codes": (outputs, inputs // 2 if found == (outputs, inputs // 2) else inputs),
            "bits": (1,),
        }
        optional: dict[str, tuple[int, ...]] = {}
    elif quantization.floats:
        codes, scales, whole, inputs_whole = BESIDE_INT4[quantization.packing]
        if inputs % group:
            raise UnsupportedModel(f"{folder}: {module} has {inputs} inputs, no multiple of NVFP4's {group}")
        wanted = {codes: (outputs, inputs // 2), scales: (outputs, groups), whole: ()}
        optional = {inputs_whole: ()}
    elif quantization.packing == "compressed":
        wanted = {"weight_packed": (outputs, words(inputs)), "weight_scale": (outputs, groups)}
        if not quantization.symmetric:
            wanted["weight_zero_point"] = (words(outputs), groups)
        optional = {"weight_shape": (2,), "weight_g_idx": (inputs,)}
    else:
        gptq = quantization.packing == "gptq"
        wanted = {
            "qweight": (words(inputs), outputs) if gptq else (inputs, words(outputs)),
            "scales": (groups, outputs),
        }
        optional = {"qzeros": (groups, words(outputs))}
        if not quantization.symmetric:
            wanted, optional = wanted | optional, {}
        if gptq:
            optional["g_idx"] = (inputs,)
    for leaf, extents in (wanted | optional).items():
        name = f"{module}.{leaf}"
        if name in stored or leaf in wanted:
            _expect_shape(name, extents, stored, quantization, folder)


def _expect_shape(
    name: str,
    extents: tuple[int, ...],
    stored: Mapping[str, Stored],
    quantization: Quantization,
    folder: Path,
) -> None:
    if name not in stored:
        raise UnsupportedModel(f"{folder} lacks the tensor {name}: fetch the checkpoint again")
    if stored[name].shape != extents and (extents or stored[name].shape != (1,)):
        raise UnsupportedModel(
            f"{folder}: {name} has shape {list(stored[name].shape)}, and {quantization.name} has {list(extents)} "
            "there: fetch the checkpoint again"
        )


def check_codes(
    module: str,
    shape: tuple[int, ...],
    stored: Mapping[str, Stored],
    quantization: Quantization | None,
    folder: Path,
) -> None:
    """Checks what FP8 codes ``<module>.weight`` [N, K] need beside them.

    Raises UnsupportedModel that names the tensor which is missing or misshapen.
    """
    scale = next((f"{module}.{leaf}" for leaf in WEIGHT_SCALES if f"{module}.{leaf}" in stored), None)
    if quantization is None or scale is None:
        raise UnsupportedModel(
            f"{folder}: {module}.weight is FP8 but has no weight_scale: fetch the checkpoint again"
        )
    found = stored[scale]
    wanted = scale_shapes(shape, quantization.blocks)
    if found.shape not in wanted or found.dtype not in PLAIN:
        raise UnsupportedModel(
            f"{folder}: {scale} is {found.dtype} {list(found.shape)}, and {quantization.name} has for {list(shape)} a "
            f"float for each {' or '.join(dict.fromkeys(wanted.values()))}: fetch the checkpoint again"
        )
    inputs = next((f"{module}.{leaf}" for leaf in INPUT_SCALES if f"{module}.{leaf}" in stored), None)
    if quantization.static and inputs is None:
        raise UnsupportedModel(
            f"{folder}: {module} has no input_scale, and its configuration says that activations are static: fetch "
            "the checkpoint again"
        )
    if inputs is not None and stored[inputs].shape not in ((), (1,), (1, 1)):
        raise UnsupportedModel(
            f"{folder}: {inputs} has shape {list(stored[inputs].shape)}, and one scale for each tensor is implemented"
        )
