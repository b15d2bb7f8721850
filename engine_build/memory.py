"""The memory calculator: what weights and KV cache of a model take on each GPU. One place for every lane."""

from __future__ import annotations

WEIGHT_BYTES = {"fp8": 1.0, "int8_sq": 1.0, "int4_awq": 0.5, "nvfp4": 0.5 + 1 / 16, "bf16": 2.0}
"""Bytes of one weight of a decoder's linear layer. NVFP4 has an 8-bit scale for each 16 weights."""


def kv_bytes_per_token(
    layers: int, kv_heads: int, head_dim: int, dtype_bytes: int, tp: int = 1, pp: int = 1
) -> int:
    """Bytes that one token takes in the KV cache of one GPU: keys and values of its layers.

    Args:
        tp: GPUs that share each layer's heads; more GPUs than heads hold copies of them.
        pp: GPUs that share the layers.
    """
    return 2 * -(-layers // pp) * -(-kv_heads // tp) * head_dim * dtype_bytes


def weight_bytes(
    parameters: int, linear: int, precision: str, wide: int = 2, tp: int = 1, pp: int = 1
) -> int:
    """Bytes of the weights on one GPU.

    Args:
        parameters: of the whole model.
        linear: of those, the weights of the decoder's linear layers, which ``precision`` makes smaller.
        wide: bytes of each of the others (embeddings, norms, output head); ``pp`` does not spread them evenly.
    """
    return int(linear * WEIGHT_BYTES[precision] / (tp * pp)) + (parameters - linear) * wide // tp
