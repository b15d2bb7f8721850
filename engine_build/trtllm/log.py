"""What TensorRT-LLM says only in its log: options it has switched off, and errors with a known remedy."""

from __future__ import annotations

from dataclasses import dataclass

_FP8_HARDWARE = "FP8 needs compute capability 8.9: use PRECISION=int8_sq or PRECISION=int4_awq"
_BLACKWELL = "use PRECISION=fp8 or PRECISION=nvfp4"
_REBUILD = "build it again on this GPU in the serving container: make build-engines"


@dataclass(frozen=True)
class Sign:
    """Words in a log and what they mean."""

    text: str
    remedy: str


OVERRIDES = (
    Sign(
        "FP8 Context FMHA is disabled because it must be used together with the fp8 quantization workflow",
        "the checkpoint's weights are not FP8: build again with PRECISION=fp8 --force",
    ),
    Sign("FP8 context FMHA is disabled because it is only supported on Ada and Hopper Arch", _FP8_HARDWARE),
    Sign(
        "FP8 Paged Context FMHA is disabled because it must be used together with fp8 KV Cache",
        "the checkpoint has no FP8 KV cache: build again with --force, so that quantize.py gets --kv_cache_dtype fp8",
    ),
    Sign(
        "Paged Context FMHA is disabled because it doesn't work with int8 kv cache currently",
        "an INT8 KV cache costs KV reuse and chunked context: use a 16-bit KV cache",
    ),
)
"""The builder goes on without these and still ends with status 0."""

ERRORS = (
    Sign("Networks with FP8 precision require hardware with FP8 support", _FP8_HARDWARE),
    Sign("Networks with FP8 Q/DQ layers require hardware with FP8 support", _FP8_HARDWARE),
    Sign("FP8 FMHA cannot be enabled except on Ada or Hopper or Blackwell Arch.", _FP8_HARDWARE),
    Sign("Unsupported SM version for FP8 block scaling GEMM", "use a checkpoint with one scale a tensor"),
    Sign("The engine plan file is generated on an incompatible device", _REBUILD),
    Sign("expecting library version", _REBUILD),
    Sign("INT8/INT4 quantization is not supported on SM>=100.", _BLACKWELL),
    Sign("SmoothQuant is not supported on SM>=100.", _BLACKWELL),
    Sign("Per-channel or per-token scaling is not supported on SM>=100.", _BLACKWELL),
    Sign(
        "Both encoder and decoder model paths are empty", "gpt_model_path is empty: make build-engines again"
    ),
    Sign(
        "Invalid gpt_model_type. Must be v1/inflight_batching/inflight_fused_batching.",
        "gpt_model_type is wrong: set it to inflight_fused_batching",
    ),
    Sign("has no value named $", "a placeholder of a config.pbtxt was left: make build-engines again"),
    Sign(
        "Streaming is only supported if model is deployed using decoupled mode.",
        "tensorrt_llm is not decoupled: make build-engines again",
    ),
    Sign(
        "Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy",
        "tensorrt_llm is not decoupled: make build-engines again",
    ),
    Sign("Maximum queue size of", "more requests wait than max_queue_size: send them again later"),
    Sign(
        "must be large enough to process at least 1 sequence to completion",
        "the KV cache holds no sequence of full length: lower MAX_SEQ_LEN, or raise "
        "kv_cache_free_gpu_mem_fraction",
    ),
    Sign(
        "MPI worldSize is expected to be equal to tp*pp",
        "one tritonserver must run for each GPU of the engine: start it with make serve",
    ),
    Sign(
        "mpiSize == tp * pp", "one tritonserver must run for each GPU of the engine: start it with make serve"
    ),
    Sign("request_output_len is not present in the request", "the request lacks max_tokens: send it"),
    Sign("Trying to stop a request but request ID is not provided", "send stop with the request's id"),
    Sign(
        "ModuleNotFoundError: No module named 'tensorrt_llm.bindings'",
        "the working folder is a clone of TensorRT-LLM: start from another one",
    ),
    Sign(
        "exceeds maximum input length",
        "the prompt is longer than max_num_tokens: set enable_chunked_context=true or raise MAX_SEQ_LEN",
    ),
    Sign("GPU is required for inference.", "calibration needs a GPU: start the container with one (--gpus)"),
    Sign("No space left on device", "the disk is full: free some space and build again"),
    Sign(
        "CUDA out of memory", "calibration did not fit in GPU memory: use a larger GPU or more of them (TP=)"
    ),
    Sign(
        "Pre SM 80 GPUs do not support bfloat16",
        "the GPU is too old: use one of compute capability 8.0 or more",
    ),
)


def overrides_in(text: str) -> list[Sign]:
    """Options that the builder has switched off, in the order of ``OVERRIDES``."""
    return [sign for sign in OVERRIDES if sign.text in text]


def error_in(text: str) -> Sign | None:
    """The first known error of a log."""
    found = [(text.index(sign.text), sign) for sign in ERRORS if sign.text in text]
    return min(found, key=lambda each: each[0])[1] if found else None


def explain(text: str) -> str:
    """The remedy for a log's first known error as a line to show, or nothing."""
    sign = error_in(text)
    return f"{sign.text!r}: {sign.remedy}" if sign else ""
