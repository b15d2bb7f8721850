"""Blocks of a GGUF tensor to codes with scales: which number a code is stays as the file has it.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. N rows of B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flightline.torch_engine.model.coded import Coded

Bytes = np.ndarray[Any, Any]
"""uint8."""
PLAIN = ("F32", "F16", "BF16")


def to_coded(raw: Bytes, kind: str) -> Coded:
    """``raw`` [N, bytes of a row] of a type in ``CODED``, by the name that GGUF has for it."""
    block, bits, group, read = CODED[kind]
    codes, scales, offsets = read(raw.reshape(len(raw), -1, block))
    return Coded(_rows(codes), _rows(scales), group, _rows(offsets), bits)


def _rows(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.reshape(len(values), -1)))


def _half(blocks: Bytes, at: int) -> np.ndarray[Any, Any]:
    """A float16 of each block: [N, B, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)


def _halves(pairs: Bytes) -> Bytes:
    """The low halves of bytes, then the high ones."""
    return np.concatenate([pairs & 15, pairs >> 4], axis=-1)


def _constant(value: int, like: np.ndarray[Any, Any]) -> Bytes:
    return np.full(like.shape, value, dtype=np.uint8)


def _q4_0(blocks: Bytes) -> tuple[Any, Any, Any]:
    scale = _half(blocks, 0)
    return _halves(blocks[..., 2:]), scale, _constant(8, scale)


def _q4_1(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _halves(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    return np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little") << 4


def _q5_0(blocks: Bytes) -> tuple[Any, Any, Any]:
    scale = _half(blocks, 0)
    return _halves(blocks[..., 6:]) | _fifth_bits(blocks, 2), scale, _constant(16, scale)


def _q5_1(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _halves(blocks[..., 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Any, Any, Any]:
    scale = _half(blocks, 0)
    return blocks[..., 2:] ^ 128, scale, _constant(128, scale)  # signed, moved up by 128


def _scales_of_k(blocks: Bytes) -> tuple[Any, Any]:
    """Scales and minima [N, B, 8] of the eight parts of a block: two float16, then twelve bytes of 6-bit numbers."""
    b = blocks[..., 4:16]
    low, high, both = b[..., :4], b[..., 4:8], b[..., 8:]
    scales = np.concatenate([low & 63, both & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([high & 63, both >> 4 | high >> 6 << 4], axis=-1)
    wide = np.float32
    return _half(blocks, 0).astype(wide) * scales, -_half(blocks, 2).astype(wide) * minima


def _parts(pairs: Bytes) -> Bytes:
    """128 bytes to the codes of eight parts of 32, [N, B, 8, 32]: low halves of 32 bytes, then their high halves."""
    each = pairs.reshape(*pairs.shape[:2], 4, 32)
    return np.stack([each & 15, each >> 4], axis=3).reshape(*pairs.shape[:2], 8, 32)


def _q4_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    return _parts(blocks[..., 16:]), *_scales_of_k(blocks)


def _q5_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    part = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> part & 1) << 4
    return _parts(blocks[..., 48:]) | fifth, *_scales_of_k(blocks)


def _q6_k(blocks: Bytes) -> tuple[Any, Any, Any]:
    lower = _halves(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))
    pairs = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    upper = pairs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = lower | upper.reshape(lower.shape) << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8) * _half(blocks, 208).astype(np.float32)
    return codes, scales, _constant(32, scales)


Reader = Callable[[Bytes], tuple[Any, Any, Any]]
CODED: dict[str, tuple[int, int, int, Reader]] = {
    "Q4_0": (18, 4, 32, _q4_0),
    "Q4_1": (20, 4, 32, _q4_1),
    "Q5_0": (22, 5, 32, _q5_0),
    "Q5_1": (24, 5, 32, _q5_1),
    "Q8_0": (34, 8, 32, _q8_0),
    "Q4_K": (144, 4, 32, _q4_k),
    "Q5_K": (176, 5, 32, _q5_k),
    "Q6_K": (210, 6, 16, _q6_k),
}
"""Bytes of a block, bits of a code, weights that share a scale, and how to read a block."""
