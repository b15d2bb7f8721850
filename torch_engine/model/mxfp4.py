"""MXFP4 as gpt-oss stores it: floating point numbers of 4 bits, of which 32 neighbouring inputs share a power of two.

Source of the form: the OCP Microscaling Formats specification 1.0, and Transformers' ``integrations/mxfp4.py``.
"""

from __future__ import annotations

import torch

from flightline.torch_engine.model.coded import Coded

GROUP = 32


def read_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> Coded:
    """From ``blocks`` [N, G, 16], two inputs in a byte, the lower one first, and ``exponents`` [N, G], both uint8.

    A scale is 2^(exponent - 127), in bfloat16, which holds all of them but the smallest: that becomes 0.
    """
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(1)
    scales = (exponents.to(torch.int16) << 7).view(torch.bfloat16)
    return Coded(codes, scales, GROUP, bits=4, e2m1=True)
