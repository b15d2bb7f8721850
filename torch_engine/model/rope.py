"""Rotary position embedding: cosines and sines for every position, all scalings that we support.

Sources: RoFormer (Su et al. 2021); linear interpolation (Chen et al. 2023); Llama 3.1's frequency
bands (Meta's reference ``apply_scaling``); YaRN (Peng et al. 2023); LongRoPE (Ding et al. 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flightline.torch_engine.model.spec import Rope


def rope_table(rope: Rope, head_dim: int, length: int, max_position_embeddings: int) -> torch.Tensor:
    """Cosines and sines: [length, 2, head_dim / 2] float32, the attention factor of YaRN and LongRoPE included.

    Pairs that do not turn come last: their cosine is 1.
    """
    table = torch.zeros(length, 2, head_dim // 2)
    table[:, 0] = 1.0
    dims = head_dim if rope.dims is None else rope.dims
    if dims:
        table[:, :, : dims // 2] = _turning(rope, dims, length, max_position_embeddings)
    return table


def _turning(rope: Rope, dims: int, length: int, max_position_embeddings: int) -> torch.Tensor:
    """[length, 2, dims / 2]."""
    settings = dict(rope.scaling)
    frequencies = rope.theta ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    factor = 1.0
    kind = settings.get("rope_type")
    if kind == "linear":
        frequencies = frequencies / settings["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings)
    elif kind == "yarn":
        frequencies, factor = _yarn(frequencies, settings, rope.theta, dims, max_position_embeddings)
    elif kind == "longrope":
        frequencies, factor = _longrope(frequencies, settings, length, max_position_embeddings)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * factor


def _longrope(
    frequencies: torch.Tensor, settings: dict[str, Any], length: int, max_position_embeddings: int
) -> tuple[torch.Tensor, float]:
    """Divides each frequency by a factor of its own, out of one list for short contexts and one for long ones.

    The longest sequence decides once for all of them: keys that are in the cache could not change from one list to the
    other when their sequence grows.
    """
    old = settings["original_max_position_embeddings"]
    factors = torch.tensor(settings["long_factor" if length > old else "short_factor"])
    scale = settings.get("factor") or max_position_embeddings / old
    factor = settings.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(scale) / math.log(old)) if scale > 1 else 1.0
    return frequencies / factors, float(factor)


def _llama3(frequencies: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Keeps high frequencies, divides low ones, blends between."""
    old = settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = old * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    blended: torch.Tensor = blend * frequencies + (1 - blend) * frequencies / settings["factor"]
    return blended


def _yarn(
    frequencies: torch.Tensor,
    settings: dict[str, Any],
    theta: float,
    head_dim: int,
    max_position_embeddings: int,
) -> tuple[torch.Tensor, float]:
    old = settings.get("original_max_position_embeddings") or max_position_embeddings
    scale = settings["factor"]

    def dimension(turns: float) -> float:
        """The dimension whose wave makes ``turns`` turns over the original context."""
        return head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)
    interpolate = ramp.clamp(0.0, 1.0)
    blended = frequencies / scale * interpolate + frequencies * (1 - interpolate)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    factor = settings.get("attention_factor")
    if factor is None:
        mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
        factor = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return blended, float(factor)
