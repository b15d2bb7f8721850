"""The planner as a table: hardware and wish to backend, precision, dtype, memory, or a refusal with the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flightline.engine_build import hardware as machine
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hardware import Hardware, detect
from flightline.engine_build.plan import ModelShape, kv_bytes_per_token, make_plan, require_tensorrt_llm

GIB = 1 << 30
H200 = Hardware("cuda", "NVIDIA H200", 141 * GIB, 140 * GIB, capability=(9, 0))
PAIR = dataclasses.replace(H200, count=2)
L4 = Hardware("cuda", "NVIDIA L4", 24 * GIB, 22 * GIB, capability=(8, 9))
A100 = Hardware("cuda", "NVIDIA A100", 80 * GIB, 79 * GIB, capability=(8, 0))
B200 = Hardware("cuda", "NVIDIA B200", 180 * GIB, 178 * GIB, capability=(10, 0))
T4 = Hardware("cuda", "Tesla T4", 16 * GIB, 15 * GIB, capability=(7, 5))
CPU = Hardware("cpu", "AMD EPYC", 24 * GIB, 20 * GIB, cores=2, flags=("avx2",))
CPU_COMPILER = dataclasses.replace(CPU, compiler="/usr/bin/g++")
CPU_BF16 = dataclasses.replace(CPU, flags=("avx2", "avx512_bf16"))

SMALL = ModelShape(30, 3, 64, 8192, 134_515_008, 106_168_320)
LLAMA_8B = ModelShape(
    32,
    8,
    128,
    131072,
    8_030_261_248,
    6_979_321_856,
    525_336_576,
    family="LlamaForCausalLM",
    splits=(2, 4, 8, 16),
)


@pytest.mark.parametrize(
    ("hardware", "lane", "precision", "want"),
    [
        (H200, "auto", "auto", ("torch", "fp8", "bfloat16")),
        (L4, "auto", "auto", ("torch", "fp8", "bfloat16")),
        (L4, "torch", "bf16", ("torch", "bf16", "bfloat16")),
        (A100, "auto", "auto", ("torch", "int8", "bfloat16")),
        (A100, "auto", "bf16", ("torch", "bf16", "bfloat16")),
        (A100, "trtllm-engine", "auto", ("trtllm-engine", "int8_sq", "bfloat16")),
        (A100, "trtllm-engine", "int4_awq", ("trtllm-engine", "int4_awq", "bfloat16")),
        (A100, "trtllm-pytorch", "auto", ("trtllm-pytorch", "bf16", "bfloat16")),
        (H200, "trtllm-pytorch", "auto", ("trtllm-pytorch", "fp8", "bfloat16")),
        (B200, "trtllm-engine", "auto", ("trtllm-engine", "fp8", "bfloat16")),
        (CPU, "auto", "auto", ("torch", "fp8", "float32")),
        (CPU_BF16, "auto", "auto", ("torch", "fp8", "bfloat16")),
        (CPU, "torch", "bf16", ("torch", "bf16", "float32")),
        (CPU_COMPILER, "auto", "auto", ("torch", "int4", "float32")),
        (CPU_COMPILER, "torch", "int8", ("torch", "int8", "float32")),
        (CPU_COMPILER, "torch", "fp8", ("torch", "fp8", "float32")),
    ],
)
def test_choice(hardware: Hardware, lane: str, precision: str, want: tuple[str, str, str]) -> None:
    plan = make_plan(SMALL, hardware, lane, precision)
    assert (plan.lane, plan.precision, plan.compute_dtype) == want
    assert plan.device == hardware.device


@pytest.mark.parametrize(
    ("hardware", "options", "says"),
    [
        (
            A100,
            {"precision": "fp8"},
            ["PRECISION=fp8", "8.9", "A100 has 8.0", "PRECISION=int8 or PRECISION=bf16", "torch"],
        ),
        (
            A100,
            {"precision": "fp8", "lane": "trtllm-engine"},
            ["8.9", "A100 has 8.0", "PRECISION=int8_sq", "PRECISION=int4_awq"],
        ),
        (
            CPU,
            {"precision": "int8_sq"},
            ["PRECISION=int8_sq", "ENGINE=torch", "PRECISION=fp8", "ENGINE=trtllm-engine"],
        ),
        (
            H200,
            {"precision": "int4_awq", "lane": "torch"},
            ["PRECISION=int4_awq", "fp8, int8, bf16", "ENGINE=trtllm-engine"],
        ),
        (B200, {"precision": "int8_sq", "lane": "trtllm-engine"}, ["int8_sq", "B200", "fp8, nvfp4, bf16"]),
        (CPU, {"lane": "trtllm-engine"}, ["ENGINE=trtllm-engine", "NVIDIA GPU", "ENGINE=torch"]),
        (T4, {}, ["Tesla T4", "7.5", "8.0", "CUDA_VISIBLE_DEVICES"]),
        (CPU, {"precision": "fp4"}, ["PRECISION=fp4", "fp8, nvfp4, int8, int4, int8_sq, int4_awq, bf16"]),
        (A100, {"lane": "trtllm-engine", "precision": "nvfp4"}, ["nvfp4", "A100", "int8_sq, int4_awq, bf16"]),
        (H200, {"tp": 2}, ["TP times PP is 2, but 1 GPU(s) are visible"]),
        (PAIR, {"pp": 2}, ["PP=2 is for the TensorRT-LLM backends", "(TP=2)", "(DP=2)"]),
        (PAIR, {"tp": 2, "dp": 2}, ["DP=2 with TP=2 wants a part of the machine", "2 GPU(s) are visible"]),
        (H200, {"dp": 2}, ["DP=2", "1 GPU(s) are visible", "lower DP"]),
        (PAIR, {"dp": 2, "lane": "trtllm-pytorch"}, ["DP=2 is for ENGINE=torch", "use TP"]),
        (CPU, {"dp": 64}, ["DP=64", "CPU core(s) are there", "lower DP"]),
        (H200, {"tp": 2, "pp": 2, "lane": "trtllm-engine"}, ["is 4", "1 GPU(s)", "CUDA_VISIBLE_DEVICES"]),
        (CPU, {"lane": "vllm"}, ["ENGINE=vllm", "trtllm-engine, trtllm-pytorch, torch"]),
        (CPU, {"max_seq_len": 8193}, ["MAX_SEQ_LEN=8193", "8192"]),
        (
            dataclasses.replace(CPU, memory_free=GIB // 2),
            {},
            ["MAX_SEQ_LEN=2048", "MiB", "lower MAX_SEQ_LEN"],
        ),
        (dataclasses.replace(L4, memory_free=GIB // 4), {}, ["KV cache", "NVIDIA L4", "lower MAX_SEQ_LEN"]),
    ],
)
def test_refusal_names_the_remedy(hardware: Hardware, options: dict, says: list[str]) -> None:
    with pytest.raises(BuildError) as refusal:
        make_plan(SMALL, hardware, **options)
    assert "\n" not in str(refusal.value)
    for words in says:
        assert words in str(refusal.value)


def test_fp8_checkpoint_as_source() -> None:
    shape = dataclasses.replace(SMALL, fp8=True)
    assert make_plan(shape, CPU).precision == "fp8"
    with pytest.raises(BuildError, match=r"FP8 checkpoint.*PRECISION=fp8"):
        make_plan(shape, CPU, precision="bf16")
    with pytest.raises(BuildError, match=r"A100 has 8\.0: give the bf16 checkpoint"):
        make_plan(shape, A100)


def test_an_engine_on_each_gpu() -> None:
    """Each as if it were alone; the second GPU is not used without being asked for, and that is said."""
    alone, pair = make_plan(SMALL, PAIR), make_plan(SMALL, PAIR, dp=2)
    assert (alone.dp, pair.dp) == (1, 2) and pair.num_kv_blocks == alone.num_kv_blocks
    assert "1 of 2 GPUs is used: DP=2 runs an engine on each" in alone.reasons
    assert "2 engines, each with a GPU of its own and a KV cache of its own" in pair.reasons
    assert not any("DP" in reason for reason in make_plan(SMALL, H200).reasons)


def test_engines_on_a_cpu_share_its_memory() -> None:
    tight = dataclasses.replace(CPU, memory_free=4 * GIB)
    assert make_plan(SMALL, tight, dp=2).kv_bytes <= make_plan(SMALL, tight).kv_bytes // 2


def test_reasons_say_what_was_not_asked_for() -> None:
    told = " ".join(make_plan(SMALL, A100).reasons)
    assert (
        "8.9" in told
        and "A100 has 8.0" in told
        and "torch takes int8; bf16 is tried if the accuracy gate refuses it" in told
    )
    told = " ".join(make_plan(SMALL, CPU).reasons)
    assert "dequantised to float32" in told and "activations are not quantised" in told


def test_integers_on_a_cpu() -> None:
    plan = make_plan(SMALL, CPU_COMPILER)
    told = " ".join(plan.reasons)
    assert "int8 is tried if the accuracy gate refuses it" in told and "int8 KV cache" in told
    assert plan.kv_bytes == plan.num_kv_blocks * 16 * kv_bytes_per_token(30, 3, 64 + 4, 1)
    assert plan.weights_bytes < make_plan(SMALL, CPU_COMPILER, precision="bf16").weights_bytes
    assert make_plan(SMALL, CPU_COMPILER, refused=("int4",)).precision == "int8"
    assert make_plan(SMALL, CPU_COMPILER, refused=("int4", "int8")).precision == "fp8"
    with pytest.raises(BuildError, match=r"PRECISION=int4 is not available.*install a C\+\+ compiler"):
        make_plan(SMALL, CPU, precision="int4")


def test_int8_on_a_gpu() -> None:
    """Also where FP8 is better, so that it can be tried; not on data-centre Blackwell, and in backend torch only."""
    for hardware in (A100, H200):
        plan = make_plan(SMALL, hardware, precision="int8")
        assert (plan.precision, plan.kv_dtype, plan.kernels) == ("int8", "int8", "cuda")
        assert plan.weights_bytes < make_plan(SMALL, hardware, precision="bf16").weights_bytes
    assert make_plan(SMALL, A100, refused=("int8",)).precision == "bf16"
    for hardware, lane in ((B200, "torch"), (H200, "trtllm-pytorch")):
        with pytest.raises(BuildError, match="PRECISION=int8 is not available"):
            make_plan(SMALL, hardware, precision="int8", lane=lane)


@pytest.mark.parametrize(("version", "lane"), [("1.2.1", "trtllm-pytorch"), ("0.21.0", "torch")])
def test_installed_tensorrt_llm_is_used_from_1_0_on(version: str, lane: str) -> None:
    plan = make_plan(SMALL, dataclasses.replace(H200, tensorrt_llm=version))
    assert plan.lane == lane
    assert any(lane in reason for reason in plan.reasons)


@pytest.mark.parametrize(
    ("lane", "version", "says"),
    [
        ("trtllm-engine", None, "not installed here: run inside nvcr.io/nvidia/tritonserver:26.06-trtllm"),
        ("trtllm-pytorch", None, "not installed here"),
        ("trtllm-pytorch", "0.21.0", "0.21.0 is older than 1.0"),
        ("trtllm-engine", "0.20.0", "0.20.0 is older than 1.0"),
        ("trtllm-engine", "1.3.0rc21", "no compiled engines any more .*ENGINE=trtllm-pytorch"),
    ],
)
def test_tensorrt_llm_that_cannot_build_the_lane(lane: str, version: str | None, says: str) -> None:
    with pytest.raises(BuildError, match=f"ENGINE={lane}: .*{says}"):
        require_tensorrt_llm(make_plan(SMALL, H200, lane), version)


def test_tensorrt_llm_that_can() -> None:
    for version in ("1.0.0", "1.1.0", "1.2.1"):
        require_tensorrt_llm(make_plan(SMALL, H200, "trtllm-engine"), version)
    require_tensorrt_llm(make_plan(SMALL, H200, "trtllm-pytorch"), "1.3.0rc23")
    require_tensorrt_llm(make_plan(SMALL, H200, "torch"), None)


def test_kv_bytes_of_llama_8b() -> None:
    """TensorRT-LLM's own arithmetic: 128 KiB a token in 16 bit, 64 KiB in 8 bit."""
    assert kv_bytes_per_token(32, 8, 128, 2) == 128 * 1024
    assert kv_bytes_per_token(32, 8, 128, 1) == 64 * 1024
    assert kv_bytes_per_token(32, 8, 128, 1, tp=2, pp=2) == 16 * 1024
    assert kv_bytes_per_token(32, 8, 128, 1, tp=16) == kv_bytes_per_token(32, 8, 128, 1, tp=8)  # copies


def test_the_gap_of_streams_is_bounded_by_our_engine_alone() -> None:
    assert make_plan(SMALL, CPU).max_gap_ms == 0
    assert make_plan(SMALL, CPU, max_gap_ms=50).max_gap_ms == 50
    with pytest.raises(BuildError, match="MAX_GAP_MS=50 is for ENGINE=torch, not trtllm-pytorch"):
        make_plan(SMALL, H200, "trtllm-pytorch", max_gap_ms=50)


def test_cpu_pool() -> None:
    plan = make_plan(SMALL, CPU)
    assert (plan.max_seq_len, plan.max_batch_size, plan.max_num_tokens, plan.block_size) == (
        2048,
        64,
        256,
        16,
    )
    assert plan.num_kv_blocks == 64 * 2048 // 4 // 16
    assert plan.kv_bytes == plan.num_kv_blocks * 16 * kv_bytes_per_token(30, 3, 64, 4)
    assert plan.weights_bytes == SMALL.parameters * 4
    tight = make_plan(SMALL, dataclasses.replace(CPU, memory_free=4 * GIB))
    assert tight.kv_bytes <= GIB < tight.kv_bytes + 16 * kv_bytes_per_token(30, 3, 64, 4)
    single = make_plan(SMALL, CPU, max_batch_size=1)
    assert single.num_kv_blocks * 16 == 2048


def test_a_cpu_with_a_compiler_gets_compiled_kernels_and_one_without_is_told() -> None:
    plan = make_plan(SMALL, CPU_COMPILER, precision="bf16")
    assert (plan.kernels, plan.compute_dtype, plan.build_dtype) == ("native", "float32", "float32")
    assert any("/usr/bin/g++" in reason for reason in plan.reasons)
    assert plan.weights_bytes == SMALL.parameters * 2
    capable = make_plan(SMALL, dataclasses.replace(CPU_BF16, compiler="/usr/bin/g++"))
    assert (capable.kernels, capable.compute_dtype, capable.build_dtype) == ("native", "float32", "bfloat16")
    plain = make_plan(SMALL, CPU_BF16)
    assert (plain.kernels, plain.compute_dtype) == ("pytorch", "bfloat16")
    assert any("no C++ compiler" in reason for reason in plain.reasons)
    assert make_plan(SMALL, H200).kernels == "cuda"


def test_gpus_that_share_each_layer() -> None:
    """Half the linears and half of a token's keys on each; what does not divide is refused with what does."""
    llama = LLAMA_8B
    alone, pair = make_plan(llama, PAIR, precision="fp8"), make_plan(llama, PAIR, precision="fp8", tp=2)
    per_token = [plan.kv_bytes // (plan.num_kv_blocks * plan.block_size) for plan in (alone, pair)]
    assert per_token == [64 * 1024, 32 * 1024] and pair.num_kv_blocks > 2 * alone.num_kv_blocks
    assert alone.weights_bytes - pair.weights_bytes == llama.linear_parameters / 2 and pair.world_size == 2
    assert any("2 GPUs share each layer" in reason for reason in pair.reasons)
    with pytest.raises(BuildError, match=r"TP=2 does not divide this model's heads .*: use TP=3"):
        make_plan(dataclasses.replace(llama, splits=(3,)), PAIR, tp=2)
    tried = make_plan(
        llama, dataclasses.replace(CPU, compiler="/usr/bin/g++", cores=2, memory_free=64 * GIB), tp=2
    )
    assert (tried.kernels, tried.tp) == ("pytorch", 2)


def test_a_checkpoint_of_4_bits_stays_one() -> None:
    shape = dataclasses.replace(LLAMA_8B, int4=True, stored="AWQ, 4 bits in groups of 128")
    gpu, cpu = (make_plan(shape, hardware) for hardware in (H200, CPU_COMPILER))
    assert (gpu.precision, gpu.weight_precision) == ("int4", "auto")
    assert (cpu.precision, cpu.weight_precision) == ("int4", "int4")
    assert gpu.weights_bytes < 0.45 * make_plan(LLAMA_8B, H200, precision="bf16").weights_bytes
    assert make_plan(dataclasses.replace(SMALL, int4=True), CPU).precision == "bf16"
    for hardware, asked in ((H200, "fp8"), (CPU_COMPILER, "int8")):
        with pytest.raises(BuildError, match=rf"PRECISION={asked} cannot be made.*AWQ.*use PRECISION=int4"):
            make_plan(shape, hardware, precision=asked)
    with pytest.raises(BuildError, match=r"AWQ, 4 bits.*ENGINE=trtllm-pytorch.*use ENGINE=torch"):
        make_plan(shape, H200, "trtllm-pytorch")


def test_nvfp4_takes_its_scales_and_becomes_int8_on_a_cpu() -> None:
    awq, fours = (dataclasses.replace(SMALL, int4=True, stored=name) for name in ("AWQ", "ModelOpt NVFP4"))
    gpu, cpu = (
        [make_plan(shape, hardware).weights_bytes for shape in (awq, fours)]
        for hardware in (H200, CPU_COMPILER)
    )
    linear = SMALL.linear_parameters
    assert gpu[1] - gpu[0] == pytest.approx(0.2 * linear, rel=0.01)
    assert cpu[1] - cpu[0] == pytest.approx(0.44 * linear, rel=0.01)


def test_tensorrt_llm_lanes_cache_in_fp8() -> None:
    """8.5 GiB of FP8 weights and 64 KiB a token: the fact sheet's arithmetic for Llama-3.1-8B."""
    plan = make_plan(LLAMA_8B, H200, "trtllm-engine", "fp8")
    assert plan.weights_bytes / GIB == pytest.approx(8.5, abs=0.1)
    assert (plan.block_size, plan.kv_bytes) == (32, plan.num_kv_blocks * 32 * 64 * 1024)
    pair = PAIR
    shared = make_plan(LLAMA_8B, pair, "trtllm-engine", "fp8", tp=2)
    assert shared.world_size == 2 and shared.weights_bytes == pytest.approx(plan.weights_bytes / 2, rel=0.01)
    bf16 = make_plan(LLAMA_8B, H200, "trtllm-pytorch", "bf16")
    assert bf16.kv_bytes == bf16.num_kv_blocks * 32 * 128 * 1024


def test_kv_cache_of_lane_torch_on_a_gpu() -> None:
    """fp8 beside FP8 weights, and said; as the weights where those are not quantised."""
    fp8, bf16 = (make_plan(LLAMA_8B, H200, "torch", precision) for precision in ("fp8", "bf16"))
    assert (fp8.kv_dtype, bf16.kv_dtype) == ("fp8", "bfloat16")
    assert fp8.kv_bytes * bf16.num_kv_blocks * 2 == bf16.kv_bytes * fp8.num_kv_blocks
    assert any("KV cache fp8" in reason for reason in fp8.reasons)


def test_gpu_pool_leaves_room_for_both_models() -> None:
    plan = make_plan(LLAMA_8B, H200)
    assert plan.max_seq_len == 8192
    assert plan.weights_bytes == LLAMA_8B.linear_parameters + 2 * (
        LLAMA_8B.parameters - LLAMA_8B.linear_parameters
    )
    room = 0.9 * H200.memory_free - plan.weights_bytes - 2 * LLAMA_8B.parameters
    assert 0 <= room - plan.kv_bytes < 16 * 128 * 1024


def test_detection_describes_this_machine() -> None:
    found = detect()
    assert found.device in ("cpu", "cuda") and found.name
    assert 0 < found.memory_free <= found.memory_total
    assert "memory_free" not in found.identity()


GEMMA_12B = dataclasses.replace(
    LLAMA_8B,
    layers=48,
    kv_heads=8,
    head_dim=256,
    max_position_embeddings=131_072,
    windows=(*[1024] * 5, None) * 8,
)


def test_layers_with_windows_take_less_of_a_long_sequence() -> None:
    long = {"max_seq_len": 131_072, "precision": "bf16"}
    plan = make_plan(GEMMA_12B, H200, "torch", **long)
    whole = make_plan(dataclasses.replace(GEMMA_12B, windows=()), H200, "torch", **long)
    assert plan.num_kv_blocks == whole.num_kv_blocks and whole.sequence_blocks == 8192
    assert plan.sequence_blocks == -(-(8192 + 5 * (-(-(1023 + 127 + 8192) // 16) + 2)) * 8 // 48)
    assert plan.full_sequences >= 4 * whole.full_sequences > 0
    assert any(f"{plan.full_sequences} such sequences fit" in reason for reason in plan.reasons)
    short = make_plan(GEMMA_12B, H200, "torch", max_seq_len=1024)
    assert short.sequence_blocks == 64, "no window is shorter than a sequence"


def test_a_sequence_that_fits_by_its_windows_alone_is_planned() -> None:
    small = dataclasses.replace(H200, memory_free=int((16e9 + 4 * GEMMA_12B.parameters) / 0.9))
    plan = make_plan(GEMMA_12B, small, "torch", max_seq_len=131_072, precision="bf16")
    assert plan.num_kv_blocks < 8192 and plan.full_sequences == 1
    with pytest.raises(BuildError, match="MAX_SEQ_LEN=131072 needs"):
        make_plan(
            dataclasses.replace(GEMMA_12B, windows=()), small, "torch", max_seq_len=131_072, precision="bf16"
        )


def test_host_memory_is_shared_among_engines_and_their_gpus() -> None:
    one = make_plan(LLAMA_8B, H200, "torch", host_kv_gib=8)
    assert one.num_host_kv_blocks == (8 << 30) // (one.kv_bytes // one.num_kv_blocks)
    two = dataclasses.replace(H200, count=2)
    assert (
        make_plan(LLAMA_8B, two, "torch", dp=2, host_kv_gib=8).num_host_kv_blocks
        == one.num_host_kv_blocks // 2
    )
    assert make_plan(LLAMA_8B, two, "torch", tp=2, host_kv_gib=8).num_host_kv_blocks == one.num_host_kv_blocks
    assert make_plan(LLAMA_8B, H200, "torch").num_host_kv_blocks == 0
    with pytest.raises(
        BuildError, match=r"HOST_KV_GIB=8 is for ENGINE=torch, not trtllm-pytorch: leave it out"
    ):
        make_plan(LLAMA_8B, H200, "trtllm-pytorch", host_kv_gib=8)


def test_host_memory_that_is_not_there_is_refused_by_its_own_name() -> None:
    assert make_plan(LLAMA_8B, CPU_COMPILER, "torch", precision="int8", host_kv_gib=2).num_host_kv_blocks
    for device in (CPU, H200):
        with pytest.raises(BuildError, match=r"HOST_KV_GIB=1e-07 has no room for a block"):
            make_plan(LLAMA_8B, device, "torch", host_kv_gib=1e-7)
    with pytest.raises(BuildError, match=r"HOST_KV_GIB=64 does not fit AMD EPYC: .* GiB are free; lower it"):
        make_plan(LLAMA_8B, CPU_COMPILER, "torch", precision="int8", host_kv_gib=64)


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"tp": 2}])
def test_host_memory_beside_a_gpu_must_be_there_too(parallel: dict[str, int]) -> None:
    """For all engines and GPUs together."""
    pair = dataclasses.replace(PAIR, host_memory_free=32 * GIB)
    assert make_plan(LLAMA_8B, pair, "torch", host_kv_gib=32, **parallel).num_host_kv_blocks
    with pytest.raises(
        BuildError,
        match=r"HOST_KV_GIB=33 does not fit the host of NVIDIA H200: 32.0 GiB of its memory are free",
    ):
        make_plan(LLAMA_8B, pair, "torch", host_kv_gib=33, **parallel)


def test_a_gpu_is_described_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(machine, "NVIDIA_DEVICE", Path("/dev/null"))
    for name, value in (
        ("is_available", True),
        ("mem_get_info", (2 * GIB, 3 * GIB)),
        ("get_device_name", "NVIDIA H200"),
        ("get_device_capability", (9, 0)),
        ("device_count", 1),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    found = detect()
    assert (found.device, found.memory_free) == ("cuda", 2 * GIB)
    assert 0 < (found.host_memory_free or 0) <= machine.cpu().memory_total
    assert "host_memory_free" not in found.identity()
