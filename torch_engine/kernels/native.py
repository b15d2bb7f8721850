"""The kernel interface in compiled C++ for CPUs: float32 activations, bfloat16 weights.

``compile_library`` is what ``make build-engines`` runs; the library lands in the engine folder. It needs a
C++20 compiler and nothing else (no PyTorch headers: two seconds, not a minute).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import torch

from torch_engine.config import ConfigError
from torch_engine.kernels.pytorch import Linear, PyTorchKernels, StepInput
from torch_engine.toolchain import compiler

SOURCE = Path(__file__).with_name("native.cpp")
LIBRARY = "kernels.so"
# No -ffast-math: it would break infinities and set the flush-to-zero flag of the whole process.
FLAGS = [
    *(
        "-O3",
        "-march=native",
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-pthread",
        "-fopenmp-simd",
        "-ffp-contract=fast",
    ),
    *(
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-signed-zeros",
        "-fassociative-math",
        "-freciprocal-math",
    ),
]

I64, F32, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
SIGNATURES = {
    "fl_set_threads": (I64,),
    "fl_pack": (POINTER, I64, I64, POINTER),
    "fl_linear": (POINTER, I64, I64, POINTER, POINTER, I64, POINTER),
    "fl_rms_norm": (POINTER, I64, I64, I64, POINTER, F32, POINTER),
    "fl_silu_mul": (POINTER, I64, I64, POINTER),
    "fl_rotate": (POINTER, I64, I64, I64, I64, POINTER, POINTER),
    "fl_write_cache": (POINTER, POINTER, I64, I64, I64, I64, POINTER, POINTER),
    "fl_attend_decodes": (
        *(POINTER, I64, I64, I64, I64, I64),
        *(POINTER, I64, POINTER, I64, POINTER, F32, I64, F32, POINTER),
    ),
    "fl_attend_prefill": (
        *(POINTER, I64, I64, I64, I64, I64),
        *(POINTER, I64, POINTER, I64, F32, I64, F32, POINTER),
    ),
    "fl_argmax": (POINTER, I64, I64, POINTER),
}


class NoCompiler(RuntimeError):
    """The kernels cannot be compiled on this machine; the message says why."""


def compile_library(folder: str | Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compiles the kernels for this machine's CPU into ``folder``; returns the library's path.

    Raises:
        NoCompiler: there is no C++ compiler, or it failed.
    """
    command = compiler()
    if command is None:
        raise NoCompiler("no C++ compiler found (CXX, g++, clang++)")
    target = Path(folder) / LIBRARY
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    run = subprocess.run(
        [command, *FLAGS, *extra_flags, "-o", str(partial), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        partial.unlink(missing_ok=True)
        reason = (run.stderr.strip().splitlines() or ["no message"])[0]
        raise NoCompiler(f"{command} failed: {reason}")
    os.replace(partial, target)
    return target


def _load(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ConfigError(
            f"kernel_library={path!r} cannot be loaded ({error}): run 'make build-engines' again on this machine"
        ) from None
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.fl_panel.restype = I64
    return library


class NativeKernels(PyTorchKernels):
    """Compiled kernels on threads of their own; PyTorch's are not used, so that the two do not compete.

    One caller a process: the library's threads serve one at a time.
    """

    name = "native"

    def __init__(self, device: torch.device, dtype: torch.dtype, library: str, threads: int) -> None:
        super().__init__(device, dtype)
        if device.type != "cpu" or dtype != torch.float32:
            raise ConfigError(f"kernels='native' computes in float32 on a CPU, not in {dtype} on {device}")
        if not library:
            raise ConfigError(
                "kernels='native' needs kernel_library: run 'make build-engines', or use kernels='pytorch'"
            )
        self._library = _load(library)
        self._library.fl_set_threads(threads)
        torch.set_num_threads(1)
        self._panel = self._library.fl_panel()

    def describe(self) -> str:
        return f"compiled CPU kernels (bfloat16 weights, {self._panel // 2}-lane vectors)"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        rows, columns = weight.shape
        padded = -(-rows // self._panel) * self._panel
        packed = torch.empty(padded * columns, dtype=torch.bfloat16)
        weight = weight.float().contiguous()
        self._library.fl_pack(weight.data_ptr(), rows, columns, packed.data_ptr())
        bias = None if bias is None else bias.float().contiguous()
        run, packed_at = self._library.fl_linear, packed.data_ptr()
        bias_at = None if bias is None else bias.data_ptr()

        def linear(x: torch.Tensor, _keep: tuple = (packed, bias)) -> torch.Tensor:
            x = x.contiguous()
            out = torch.empty(x.shape[0], rows)
            run(x.data_ptr(), x.shape[0], columns, packed_at, bias_at, rows, out.data_ptr())
            return out

        return linear

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        size = x.shape[-1]
        if x.dim() == 3:
            return self.rms_norm(x.reshape(-1, size), weight, eps).view(x.shape)
        out = torch.empty(x.shape)
        self._library.fl_rms_norm(
            x.data_ptr(), x.shape[0], size, x.stride(0), weight.data_ptr(), eps, out.data_ptr()
        )
        return out

    def gate(self, gate_up: torch.Tensor, activation: str, reader: Linear | None = None) -> torch.Tensor:
        if activation != "silu":
            return super().gate(gate_up, activation)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size)
        self._library.fl_silu_mul(gate_up.data_ptr(), rows, size, out.data_ptr())
        return out

    def rotate(self, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """In place: ``x`` is the model's own fresh projection."""
        rows, heads, size = x.shape
        self._library.fl_rotate(
            x.data_ptr(), rows, heads, size, x.stride(0), table.data_ptr(), positions.data_ptr()
        )
        return x

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, step: StepInput) -> None:
        rows, heads, size = k.shape
        self._library.fl_write_cache(
            *(k.data_ptr(), v.data_ptr(), rows, heads * size, k.stride(0), v.stride(0)),
            *(step.slots.data_ptr(), cache.data_ptr()),
        )

    def attend_decodes(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        step: StepInput,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        rows, width = step.decode_blocks.shape
        block_size, _, kv_heads, size = cache.shape[1:]
        out = torch.empty(rows, q.shape[1], size)
        self._library.fl_attend_decodes(
            *(q.data_ptr(), rows, q.stride(0), kv_heads, q.shape[1] // kv_heads, size),
            *(
                cache.data_ptr(),
                block_size,
                step.decode_blocks.data_ptr(),
                width,
                step.decode_lengths.data_ptr(),
            ),
            *(scale, window or 0, softcap or 0.0, out.data_ptr()),
        )
        return out

    def attend_prefill(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        step: StepInput,
        number: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        chunk = step.prefills[number]
        block_size, _, kv_heads, size = cache.shape[1:]
        q = q[chunk.start : chunk.end]
        out = torch.empty(q.shape)
        self._library.fl_attend_prefill(
            *(q.data_ptr(), q.shape[0], q.stride(0), kv_heads, q.shape[1] // kv_heads, size),
            *(cache.data_ptr(), block_size, chunk.blocks.data_ptr(), chunk.context),
            *(scale, window or 0, softcap or 0.0, out.data_ptr()),
        )
        return out

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        self._library.fl_argmax(logits.data_ptr(), *logits.shape, out.data_ptr())
        return out
