"""The FP8 build of a large random model against what preflight predicts: memory of GPU and host, disk, time.

    python3 benchmarks/gpu_checkpoint.py               # Llama-3.1-8B's shape on a GPU
    python3 benchmarks/gpu_checkpoint.py --shape tiny  # the same on a CPU, in seconds

Needs torch, transformers, safetensors and nvidia-modelopt, and nothing else of this project's environment. Prints
one line of JSON a stage; exit code 1 if a prediction did not hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.words import write_tokenizer  # noqa: E402
from flightline.engine_build import gate  # noqa: E402
from flightline.engine_build.build import CALIBRATION, GATE_PROMPTS, GATE_TEXT  # noqa: E402
from flightline.engine_build.hf_format import read_tensors, write_json  # noqa: E402
from flightline.engine_build.memory import fp8_build_cost  # noqa: E402
from flightline.engine_build.prompts import read_prompts  # noqa: E402
from flightline.engine_build.quantize import quantize  # noqa: E402
from flightline.engine_build.shape import of_spec  # noqa: E402
from flightline.torch_engine.model.config_json import load_spec  # noqa: E402

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 8192}
SHAPES = {"llama-8b": LLAMA_8B, "tiny": TINY}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there, in source/ and fp8/")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(SHAPES[options.shape], options.folder or Path(scratch), device)
    if options.out:
        write_json(options.out, results)
    held = [result["held"] for result in results if "held" in result]
    return 0 if held and all(held) else 1


def measure(shape: dict[str, Any], folder: Path, device: str) -> list[dict[str, Any]]:
    """Builds source and FP8 checkpoint, runs the accuracy gate, and compares each figure with its prediction."""
    source, target = folder / "source", folder / "fp8"
    target.mkdir(parents=True)
    results: list[dict[str, Any]] = []

    def say(**result: Any) -> None:
        results.append(result)
        print(json.dumps(result), flush=True)

    start = time.monotonic()
    random_checkpoint(source, shape, device)
    spec = of_spec(load_spec(source))
    say(stage="source", parameters=spec.parameters, seconds=round(time.monotonic() - start, 1))

    predicted = fp8_build_cost(spec.parameters, spec.linear_parameters, device == "cuda")
    say(stage="prediction", **asdict(predicted))
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    host = HostMemory()
    dtype, start = "bfloat16" if device == "cuda" else "float32", time.monotonic()
    seen = quantize(source, read_prompts(CALIBRATION), target, device, dtype)
    say(stage="quantize", seconds=round(time.monotonic() - start, 1), **asdict(seen))
    text, prompts = GATE_TEXT.read_text(encoding="utf-8"), read_prompts(GATE_PROMPTS)
    become = functools.partial(gate.become_w8a8, quantized=target)
    gated = gate.measure(source, become, text, prompts, device, dtype)
    say(stage="gate", perplexity=gated.perplexity, agreement=gated.agreement)  # of noise: shows that it runs

    measured = {
        "device_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else 0,
        "host_bytes": host.peak(),
        "disk_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "seconds": time.monotonic() - start,
    }
    for name, value in measured.items():
        limit = getattr(predicted, name)
        say(figure=name, measured=value, predicted_at_most=limit, held=value <= limit)
    say(stage="layout", tensors=check_layout(target), held=True)
    return results


class HostMemory:
    """The most anonymous memory that this process had: what cannot be taken back (mapped files can)."""

    def __init__(self) -> None:
        self._most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
            self._most = max(self._most, int(kilobytes) * 1024)

    def peak(self) -> int:
        """Bytes; ends the watch."""
        self._done.set()
        self._thread.join()
        return self._most


def random_checkpoint(folder: Path, shape: dict[str, Any], device: str) -> None:
    """A Llama with random bf16 weights, a file a layer; tokenizer and names are real."""
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    query, key = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    index: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for tensor, size in shapes.items():
            values = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
            tensors[tensor] = (values * 0.02 if len(size) == 2 else torch.ones_like(values)).cpu()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    save("model-embed.safetensors", {"model.embed_tokens.weight": (shape["vocab_size"], hidden)})
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        rows = {
            "q_proj": (query, hidden),
            "k_proj": (key, hidden),
            "v_proj": (key, hidden),
            "o_proj": (hidden, query),
        }
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        sizes = {f"{prefix}.self_attn.{name}.weight": size for name, size in rows.items()}
        sizes |= {f"{prefix}.mlp.{name}.weight": size for name, size in mlp.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(
            f"model-{layer:03}.safetensors", sizes | {f"{prefix}.{name}.weight": (hidden,) for name in norms}
        )
    save(
        "model-head.safetensors",
        {"model.norm.weight": (hidden,), "lm_head.weight": (shape["vocab_size"], hidden)},
    )
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **shape}
    config |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
    write_json(folder / "config.json", config)
    write_tokenizer(folder, shape["vocab_size"])


def check_layout(folder: Path) -> int:
    """Every linear layer is e4m3 with two positive float32 scalars; returns the number of tensors."""
    tensors = {name: (value.dtype, tuple(value.shape), value) for name, value in read_tensors(folder)}
    for name, (dtype, shape, value) in tensors.items():
        if name.endswith("_proj.weight"):
            assert dtype == torch.float8_e4m3fn, name
        elif name.endswith("_scale"):
            assert (dtype, shape) == (torch.float32, ()) and value > 0, name
        else:
            assert dtype == torch.bfloat16, name
    return len(tensors)


if __name__ == "__main__":
    sys.exit(main())
