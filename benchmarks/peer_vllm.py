"""vLLM on the shapes of ``benchmarks/gpu.py``, with the same kinds of sampling; a peer for ``gpu_compare.py``.

Needs an environment with vLLM, nothing of ours but this folder. Random weights, random prompts, an FP8 KV cache, end of
sequence ignored, prefix caching off, wall clock with prefill. One line of JSON a case. ``--precision`` is as in
``gpu.py``: vLLM makes ``fp8`` of bf16 weights itself, with a scale for each tensor of weights and of activations as
they come; the others are what checkpoints have.

Several GPUs (``--tp``) get along without NVLink multicast on both sides, which not every machine allows: vLLM then sums
by its custom all-reduce, without the fusion of sum and norm that FlashInfer gives it where there is multicast.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kinds import ALL, parameters

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
REPEATED_UP_TO = 50_000
"""Output tokens of a case that is run ``--repeats`` times; larger ones once, they take seconds by themselves."""
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": SHAPE,
    "llama-70b": SHAPE | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": SHAPE | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    },
    "gpt-oss-20b": SHAPE | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
}  # fmt: skip
CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
SCHEME = {
    "targets": ["Linear"], "weights": CHANNEL,
    "input_activations": CHANNEL | {"strategy": "token", "dynamic": True},
}  # fmt: skip
STORED: dict[str, dict[str, Any]] = {
    "fp8-output": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": SCHEME}, "quantization_status": "compressed",
    },
    "fp8-blocks": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3",
    },
    "mxfp4": {
        "quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    },
    "int4": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}  # fmt: skip
"""What config.json says of the weights."""
WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}  # fmt: skip
UNFUSED = {"pass_config": {"fuse_allreduce_rms": False}}
"""What calls cuMulticastCreate without being asked, for several GPUs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", default="1:128:128,64:128:128,256:128:128", help="CONCURRENCY:INPUT:OUTPUT,..."
    )
    parser.add_argument("--sampling", default="greedy", help=f"comma-separated: {', '.join(ALL)}")
    parser.add_argument("--greedy-cases", default="", help="more cases, of greedy requests only")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share each layer")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--precision", choices=["fp8", *STORED, "bf16"], default="fp8")
    parser.add_argument("--kv", choices=["fp8", "auto"], default="fp8", help="auto: bf16")
    parser.add_argument("--kv-gib", type=float, help="KV cache, where several share the GPU; else 0.88 of it")
    parser.add_argument(
        "--after", type=Path, metavar="FILE",
        help="says that it is ready, and waits for FILE: several may load at once, and be measured one by one",
    )  # fmt: skip
    parser.add_argument(
        "--flashinfer", action="store_true", help="vLLM's FlashInfer sampler (compiles at first use)"
    )
    options = parser.parse_args()
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = str(int(options.flashinfer))
    several: dict[str, Any] = {}
    room: dict[str, Any] = {"gpu_memory_utilization": 0.88}
    if options.kv_gib:
        room = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": int(options.kv_gib * 2**30)}
    if options.tp > 1:
        os.environ.update(WITHOUT_MULTICAST)
        several = {"tensor_parallel_size": options.tp, "compilation_config": UNFUSED}

    import vllm

    folder = tempfile.mkdtemp()
    stored = STORED.get(options.precision)
    config = SHAPES[options.shape] | ({"quantization_config": stored} if stored else {})
    Path(folder, "config.json").write_text(json.dumps(config))
    llm = vllm.LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=512, max_logprobs=20,
        enable_prefix_caching=False, kv_cache_dtype=options.kv,
        quantization="fp8" if options.precision == "fp8" else None,
        **several, **room,
    )  # fmt: skip
    if options.after:
        print(json.dumps({"ready": True}), flush=True)
        while not options.after.exists():
            time.sleep(0.2)
    chance = random.Random(0)

    def run(kind: str, count: int, inputs: int, outputs: int) -> float:
        """Output tokens/s."""
        prompts: Any = [
            {"prompt_token_ids": [chance.randrange(5, 120000) for _ in range(inputs)]} for _ in range(count)
        ]
        wanted = [
            vllm.SamplingParams(
                max_tokens=outputs, ignore_eos=True, detokenize=False, **parameters(kind, number)
            )
            for number in range(count)
        ]
        started = time.perf_counter()
        whole = llm.generate(prompts, wanted, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in whole) / (time.perf_counter() - started)

    run("greedy", 4, 128, 16)
    cases = sizes_of(options.cases)
    for kind in options.sampling.split(","):
        wanted = cases + (sizes_of(options.greedy_cases) if kind == "greedy" else [])
        for count in sorted({16, *(case[0] for case in wanted)}):
            run(kind, count, 128, 16)  # the first of a kind and size compiles
        for count, inputs, outputs in wanted:
            for _ in range(options.repeats if count * outputs <= REPEATED_UP_TO else 1):
                rate = run(kind, count, inputs, outputs)
                line = {"version": vllm.__version__, "sampling": kind, "concurrency": count, "isl": inputs}
                line |= {"osl": outputs, "output_tokens_per_s": round(rate, 1)}
                print(json.dumps(line), flush=True)


def sizes_of(cases: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, case.split(":"))) for case in filter(None, cases.split(","))]


if __name__ == "__main__":
    main()
