"""A quantised checkpoint is loaded in the memory of what is kept and a few copies of one layer's largest weight.

The limit is the kernel's own, on private memory (RLIMIT_DATA), in a process of its own: no peak has to be caught.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.layout import count
from tests.packing import FORMATS
from tests.torch_engine.test_kernels import needs_compiler
from tests.torch_engine.test_triton_ops import HAS_TRITON

HIDDEN, INNER, LAYERS = 1024, 2816, 4
COPIES = 4
"""Bytes for each weight of the largest linear that may come and go."""
SPARE = 12 << 20
"""Of the allocator, and of tensors that every model has."""
NATIVE: dict[str, Any] = {"kernels": "native", "weight_precision": "int4"}
GPU: dict[str, Any] = {"kernels": "cuda", "compute_dtype": "bfloat16"}
LOADS = [("gptq", NATIVE, 0.66), ("gptq", GPU, 0.6), ("nvfp4", GPU, 0.78), ("hf-blocks", GPU, 1.04)]
"""Formats, what reads them, and the bytes of a weight that are kept, scales among them."""
CHILD = """
import json, resource, sys
import torch
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.kernels.choice import choose
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.model.weights import Checkpoint

for folder, settings, allowed in json.loads(sys.argv[1]):
    kernels = choose(EngineConfig(model_dir=folder, num_threads=1, **settings))
    checkpoint = Checkpoint(folder, load_spec(folder))
    checkpoint.raw("model.norm.weight")  # maps the file
    now = 1024 * int(open("/proc/self/status").read().split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now + allowed, resource.RLIM_INFINITY))
    kept = BEFORE
    model = Model(checkpoint, kernels, 64)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(kernels.describe(checkpoint.spec))
    del model, kept
"""
WIDE_COPY = "[coded.values(torch.bfloat16) for _, coded in checkpoint.codes()]"


def random_codes(folder: Path, name: str) -> Path:
    """A Llama whose linears are zeros in the format, so that it is written fast."""
    folder.mkdir()
    shape = {
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
    settings, pack = FORMATS[name]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    config |= (
        shape
        | heads
        | {"max_position_embeddings": 512, "quantization_config": settings, "hidden_act": "silu"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    packed = {
        size: pack("up", torch.randn(size) / 32)[0]
        for size in ((HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    }
    tensors = {"model.embed_tokens.weight": torch.zeros(512, HIDDEN, dtype=torch.bfloat16)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    attention = {f"self_attn.{each}_proj": (HIDDEN, HIDDEN) for each in "qkvo"}
    mlp = {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    for layer in range(LAYERS):
        for module, size in (attention | mlp).items():
            for leaf, tensor in packed[size].items():
                tensors[f"model.layers.{layer}.{module}.{leaf}"] = tensor.clone().contiguous()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folders: list[Path], library: str, before: str = "None") -> subprocess.CompletedProcess[str]:
    """Loads :data:`LOADS` one after the other; ``before`` is an expression whose value is kept beside each."""
    loads = []
    for folder, (_, settings, kept) in zip(folders, LOADS, strict=False):
        _, linear = count(load_spec(folder))
        allowed = int(kept * linear) + COPIES * 2 * INNER * HIDDEN + SPARE
        loads.append((str(folder), {**settings, "kernel_dir": library}, allowed))
    # Each large tensor is mapped for itself and given back at once.
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    return subprocess.run(
        [sys.executable, "-c", CHILD.replace("BEFORE", before), json.dumps(loads)],
        env={**os.environ, **memory, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton's language is not installed")
def test_no_format_passes_through_a_wide_copy(tmp_path: Path, library: str) -> None:
    """With one in bfloat16 beside what is kept, the same limit is too low."""
    folders = [random_codes(tmp_path / str(number), name) for number, (name, _, _) in enumerate(LOADS)]
    done = load(folders, library)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == len(LOADS) and "int4 weights" in told[0] and "16 FP4 W4A16 in groups of 16" in told[2]
    assert "can't allocate memory" in load(folders[:1], library, WIDE_COPY).stderr
