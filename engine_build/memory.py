"""The memory calculator: what weights and KV cache of a model take on each GPU. One place for every backend."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class BuildCost:
    """Upper bounds of an FP8 build: calibration, export and the accuracy gate."""

    device_bytes: int
    """GPU memory; 0 if it runs on the CPU."""
    host_bytes: int
    """Memory that cannot be taken back; the pages of mapped files are not in it."""
    disk_bytes: int
    seconds: float


def fp8_build_cost(parameters: int, linear: int, on_gpu: bool) -> BuildCost:
    """What an FP8 build takes at most.

    The model runs in bf16 (on a CPU up to float32), its export holds the FP8 weights beside it, and writing the
    final checkpoint holds source, export and result in host memory. Times assume two minutes for starting libraries, a
    disk of 0.3 GB/s and, on a CPU, 50 GFLOP/s for the 25,000 tokens that calibration and gate run.
    """
    source, result = 2 * parameters, linear + 2 * (parameters - linear)
    running = source if on_gpu else 2 * source
    writing = source + result + linear
    host = max(writing, 0 if on_gpu else running + linear)
    computing = 60.0 if on_gpu else 2 * parameters * 25_000 / 50e9
    return BuildCost(
        device_bytes=running + linear + (3 << 30) if on_gpu else 0,
        host_bytes=int(1.1 * host) + (2 << 30),
        disk_bytes=2 * result + (16 << 20),
        seconds=120.0 + 3 * (source + result) / 0.3e9 + computing,
    )
