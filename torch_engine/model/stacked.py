"""Experts whose weights lie in one tensor, as gpt-oss stores them: which part of it an expert's module is. No torch.

As plain numbers the inputs come first, and the outputs of gate and up in turns: ``gate_up_proj`` [E, N, 2 I] and
``down_proj`` [E, I, N], beside ``gate_up_proj_bias`` [E, 2 I] and ``down_proj_bias`` [E, N]. In MXFP4 the outputs come
first: ``gate_up_proj_blocks`` [E, 2 I, N / 32, 16] and ``gate_up_proj_scales`` [E, 2 I, N / 32], ``down_proj`` alike.
E experts, I inner size of an expert, N hidden size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flightline.torch_engine.model.mixture import EXPERT_INNER, MixtureSpec

STACKED_CODES = ("blocks", "scales")
"""What ends the names of the tensors that a weight in MXFP4 has."""
GATE_UP = f"2 * {EXPERT_INNER}"
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj$")


@dataclass(frozen=True)
class Place:
    """Where an expert's module is stored."""

    tensor: str
    """All experts' weights; ``<tensor>_bias`` are their biases."""
    expert: int
    outputs: slice
    """Of the stored ones."""


def place_of(module: str) -> Place | None:
    """Of an expert's ``gate_proj``, ``up_proj`` or ``down_proj``; None for any other module."""
    found = EXPERT.match(module)
    if found is None:
        return None
    experts, number, kind = found.groups()
    if kind == "down":
        return Place(f"{experts}.down_proj", int(number), slice(None))
    return Place(f"{experts}.gate_up_proj", int(number), slice(0 if kind == "gate" else 1, None, 2))


def stacked_tensors(mixture: MixtureSpec) -> dict[str, tuple[str, ...]]:
    """The tensors of all experts, below a layer, to what their extents are; none if each expert has its own."""
    if not mixture.stacked:
        return {}
    experts = f"{mixture.names.block}.experts"
    return {
        f"{experts}.gate_up_proj": ("experts", "hidden_size", GATE_UP),
        f"{experts}.gate_up_proj_bias": ("experts", GATE_UP),
        f"{experts}.down_proj": ("experts", EXPERT_INNER, "hidden_size"),
        f"{experts}.down_proj_bias": ("experts", "hidden_size"),
    }


def stacked_sizes(mixture: MixtureSpec) -> dict[str, int]:
    """Extents that only stacked experts have."""
    return {GATE_UP: 2 * mixture.inner}
