"""What the plan decides, the GPU's kernels do or refuse; they decide nothing again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flightline.torch_engine.core.config import FP8_CAPABILITY, ConfigError, EngineConfig
from flightline.torch_engine.model.coded import Coded

pytest.importorskip(
    "triton"
)  # there are machines without it; a fault in our own modules is no reason to skip
from flightline.torch_engine.kernels.gpu import cuda


def kernels(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], **settings: str):
    properties = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = EngineConfig("model", device="cuda", compute_dtype="bfloat16", kernels="cuda", **settings)
    return cuda.CudaKernels(config, torch.device("cuda"), torch.bfloat16)


def test_the_kv_cache_is_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), FP8_CAPABILITY):
        assert kernels(monkeypatch, capability).kv == "bfloat16"
        assert kernels(monkeypatch, capability, kv_dtype="int8").kv == "int8"
    assert kernels(monkeypatch, FP8_CAPABILITY, kv_dtype="fp8").kv == "fp8"
    with pytest.raises(ConfigError, match=r"kv_dtype='fp8' needs compute capability 8\.9: use another value"):
        kernels(monkeypatch, (8, 6), kv_dtype="fp8")


def test_fp8_weights_are_not_quietly_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    stored = Coded(codes, torch.ones(16, 1), 16, input_scale=torch.ones(()))
    checkpoint = SimpleNamespace(
        fused_coded=lambda modules, dtype, device: (stored, None),
        fused=lambda modules, dtype: (torch.zeros(16, 16, dtype=dtype), None),
    )
    old = kernels(monkeypatch, (8, 0))
    with pytest.raises(
        ConfigError, match=r"FP8 needs compute capability 8\.9: use 'dequantised' on this GPU"
    ):
        old.load_linear(checkpoint, ["q_proj"])
    assert isinstance(
        kernels(monkeypatch, FP8_CAPABILITY).load_linear(checkpoint, ["q_proj"]), cuda.Fp8Linear
    )
