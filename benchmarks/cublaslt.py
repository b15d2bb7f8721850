"""cuBLASLt's own interface, as far as an FP8 product needs it: the algorithms that the library offers, one by one.

PyTorch asks the library for its favourite and takes that. The numbers are those of ``cublasLt.h`` and
``library_types.h`` (CUDA 12 and 13); the library is the one that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int8, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

COMPUTE_32F = 68
R_32F, R_16BF, R_8F_E4M3 = 0, 14, 28
TRANS_A, TRANS_B, A_SCALE, B_SCALE, FAST_ACCUM = 3, 4, 17, 18, 25
"""Attributes of a product."""
MAX_WORKSPACE_BYTES = 1
"""Attribute of a preference."""
TRANSPOSED, AS_IT_IS = 1, 0
WORKSPACE = 64 << 20


class Algorithm(Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def loaded_library() -> ctypes.CDLL:
    """Raises LookupError if PyTorch has loaded none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcublasLt.so" in line:
            return ctypes.CDLL(line[line.index("/") :])
    raise LookupError("no libcublasLt is loaded: multiply something on the GPU first")


class Fp8Products:
    """``x`` [rows, inputs] times ``weight`` [outputs, inputs], both e4m3, in bf16; scales are scalars on the device."""

    def __init__(self, rows: int, outputs: int, inputs: int, scale: torch.Tensor) -> None:
        self.library = loaded_library()
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self.alpha, self.beta = c_float(1.0), c_float(0.0)
        self.handle = self._made("cublasLtCreate")
        self.product = self._made("cublasLtMatmulDescCreate", c_int(COMPUTE_32F), c_int(R_32F))
        for name, value in (
            (TRANS_A, c_int(TRANSPOSED)), (TRANS_B, c_int(AS_IT_IS)), (A_SCALE, c_void_p(scale.data_ptr())),
            (B_SCALE, c_void_p(scale.data_ptr())), (FAST_ACCUM, c_int8(1)),
        ):  # fmt: skip
            self._set("cublasLtMatmulDescSetAttribute", self.product, name, value)
        # The library counts by columns: a matrix of ours is its transpose there, and the weight its left operand.
        self.weight = self._layout(R_8F_E4M3, inputs, outputs)
        self.x = self._layout(R_8F_E4M3, inputs, rows)
        self.out = self._layout(R_16BF, outputs, rows)
        self.preference = self._made("cublasLtMatmulPreferenceCreate")
        limit = c_uint64(WORKSPACE)
        self._set("cublasLtMatmulPreferenceSetAttribute", self.preference, MAX_WORKSPACE_BYTES, limit)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    def _made(self, name: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        self._call(name, byref(made), *arguments)
        return made

    def _set(self, name: str, of: c_void_p, attribute: int, value: Any) -> None:
        self._call(name, of, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)))

    def _layout(self, kind: int, rows: int, columns: int) -> c_void_p:
        return self._made(
            "cublasLtMatrixLayoutCreate", c_int(kind), c_uint64(rows), c_uint64(columns), c_int64(rows)
        )

    def algorithms(self, most: int) -> list[Algorithm]:
        """What the library thinks best, the first first."""
        found, count = (Algorithm * most)(), c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self.handle, self.product, self.weight, self.x, self.out, self.out,
            self.preference, c_int(most), found, byref(count),
        )  # fmt: skip
        return [each for each in found[: count.value] if each.state == 0]

    def run(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, algorithm: Algorithm) -> None:
        """On PyTorch's current stream; ``out`` [rows, outputs] bf16."""
        a, b, d, workspace = (c_void_p(each.data_ptr()) for each in (weight, x, out, self.workspace))
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call(
            "cublasLtMatmul", self.handle, self.product, byref(self.alpha), a, self.weight, b, self.x, byref(self.beta),
            d, self.out, d, self.out, ctypes.cast(algorithm.algo, POINTER(c_uint64)), workspace, c_size_t(WORKSPACE),
            stream,
        )  # fmt: skip
