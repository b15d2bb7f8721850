"""The commands of backend trtllm-engine, flag by flag, with the section of the facts beside each.

The sections are those of the notes (trtllm.md) that the facts were collected in; the sources behind them are listed in
docs/VERIFICATION.md, and the machine-readable part is in ``data/``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flightline.engine_build.errors import BuildError
from flightline.engine_build.hardware import Hardware
from flightline.engine_build.plan import Plan, make_plan
from flightline.engine_build.trtllm import commands, versions
from flightline.engine_build.trtllm.containers import CONTAINERS, driver_version, newest_for
from tests.engine_build.test_plan import A100, B200, H200, LLAMA_8B
from tests.engine_build.trtllm_tools import DATA, build_parser, quantize_parser

MODEL, CALIBRATION, CHECKPOINT, ENGINE = Path("/m"), Path("/c"), Path("/k"), Path("/e")


def plan(hardware: Hardware, precision: str, **options: int) -> Plan:
    return make_plan(LLAMA_8B, hardware, "trtllm-engine", precision, **options)


def flags(command: list[str]) -> dict[str, str]:
    """Flag to value; every flag has one."""
    return dict(zip(command[::2], command[1::2], strict=True))


def quantize_flags(chosen: Plan) -> dict[str, str]:
    command = commands.quantize(MODEL, CALIBRATION, 70, chosen, CHECKPOINT)
    assert command[:2] == ["python3", "/app/examples/quantization/quantize.py"]  # §1.1, in-container paths
    quantize_parser().parse_args(command[2:])
    return flags(command[2:])


def build_flags(chosen: Plan) -> dict[str, str]:
    command = commands.build(CHECKPOINT, chosen, ENGINE, Path("/w/model.cache"))
    assert command[0] == "trtllm-build"
    build_parser().parse_args(command[1:])
    return flags(command[1:])


def test_fp8_calibration() -> None:
    assert quantize_flags(plan(H200, "fp8")) == {
        "--model_dir": "/m",  # §2.1, quantize.py
        "--dtype": "bfloat16",  # §2.1, reference command
        "--qformat": "fp8",  # §2.1, fp8 -> FP8_DEFAULT_CFG -> FP8
        "--kv_cache_dtype": "fp8",  # §0 fact 3: without it kv_cache_quant_algo is null
        "--calib_dataset": "/c",  # §2.1: a local data set folder (train split, column text), so no network
        "--calib_size": "70",  # §2.1
        "--calib_max_seq_length": "512",  # §2.1, the default
        "--batch_size": "1",  # §2.1, calibration batch
        "--tp_size": "1",  # §2.4: one rankN.safetensors for each GPU is written here
        "--pp_size": "1",
        "--output_dir": "/k",
    }


def test_fp8_build() -> None:
    assert build_flags(plan(H200, "fp8", max_seq_len=8192)) == {
        "--checkpoint_dir": "/k",  # §2.1
        "--output_dir": "/e",
        "--max_batch_size": "256",  # §6: at or above the concurrency, else the KV pool is never used up
        "--max_seq_len": "8192",  # §2.1: always set it, it is 131072 for Llama-3.1 otherwise
        "--max_num_tokens": "8192",  # §2.1: fixes activation memory
        "--max_beam_width": "1",
        "--kv_cache_type": "paged",  # §2.1
        "--tokens_per_block": "32",  # §2.1, a power of 2
        "--remove_input_padding": "enable",  # §2.1, reference command
        "--context_fmha": "enable",  # §2.1: off, it switches both options below off
        "--use_paged_context_fmha": "enable",  # §0 fact 9: KV reuse and chunked context need it
        "--use_fp8_context_fmha": "enable",  # §2.1, with FP8 weights and FP8 KV cache
        "--gemm_plugin": "disable",  # §2.1, tuning advice: disable for FP8
        "--multiple_profiles": "enable",  # §2.1, tuning advice: always
        "--logits_dtype": "float32",  # §2.4: ModelOpt says float16; must be Triton's logits_datatype
        "--workers": "1",  # §2.1, ranks built at once
        "--output_timing_cache": "/w/model.cache",  # §2.5: else it lands in the working folder
        "--log_level": "info",  # §2.1: the silent overrides are in the log
    }


@pytest.mark.parametrize(
    ("hardware", "precision", "qformat", "kv", "fp8_fmha", "gemm"),
    [
        (
            A100,
            "int8_sq",
            "int8_sq",
            None,
            "disable",
            "auto",
        ),  # §0 fact 10; INT8 KV would cost paged FMHA (fact 9)
        (A100, "int4_awq", "int4_awq", None, "disable", "auto"),  # §3
        (A100, "bf16", "full_prec", None, "disable", "auto"),  # §2.1: gemm_plugin auto for 16 bit
        (B200, "nvfp4", "nvfp4", "fp8", "enable", "nvfp4"),  # §2.1: NVFP4 sets gemm_plugin nvfp4; §3
        (B200, "fp8", "fp8", "fp8", "enable", "disable"),
    ],
)
def test_other_precisions(
    hardware: Hardware, precision: str, qformat: str, kv: str | None, fp8_fmha: str, gemm: str
) -> None:
    chosen = plan(hardware, precision)
    quantize, build = quantize_flags(chosen), build_flags(chosen)
    assert (quantize["--qformat"], quantize.get("--kv_cache_dtype")) == (qformat, kv)
    assert (build["--use_fp8_context_fmha"], build["--gemm_plugin"]) == (fp8_fmha, gemm)
    assert build["--use_paged_context_fmha"] == "enable"
    assert ("--awq_block_size" in quantize) == (precision == "int4_awq")  # §2.1, 128


def test_several_gpus() -> None:
    four = dataclasses.replace(H200, count=4)
    chosen = plan(four, "fp8", tp=2, pp=2)
    assert (quantize_flags(chosen)["--tp_size"], quantize_flags(chosen)["--pp_size"]) == ("2", "2")
    assert build_flags(chosen)["--workers"] == "4"  # §2.4: world size is tp * pp
    assert build_flags(chosen)["--reduce_fusion"] == "enable"  # §2.1, tuning advice for TP > 1 and FP8
    assert "--reduce_fusion" not in build_flags(plan(H200, "fp8"))  # forced off there


def test_containers_are_those_of_the_table() -> None:
    import json

    rows = {row["triton"]: row for row in json.loads((DATA / "versions.json").read_text())["rows"]}
    for each in CONTAINERS:
        row = rows[each.tag]
        assert each.image == row["image"]
        assert (each.tensorrt_llm, each.tensorrt) == (row["tensorrt_llm"], row["tensorrt"])
        assert row["cuda"].startswith(each.cuda) and driver_version(row["driver"]) == each.driver
        assert row["engine_flow"] and row["llmapi_pytorch_flow"]


@pytest.mark.parametrize(
    ("driver", "tag"),
    [
        ("590.44.01", "26.06"),
        ("600.1", "26.06"),
        ("580.65", "26.02"),
        ("575.57.08", None),
        ("550.54", None),
    ],
)
def test_container_for_a_driver(driver: str, tag: str | None) -> None:
    """§1.3, fallbacks; not 25.10 for driver 575, which cannot have the protobuf that tritonclient needs."""
    found = newest_for(driver_version(driver))
    assert (found.tag if found else None) == tag


def test_releases() -> None:
    """§1.2 and §1.3: 1.0 to 1.2 are one generation."""
    assert versions.release("1.2.0rc8") == (1, 2)
    assert versions.habits("1.0.3.2510").sampler == {"enable_trtllm_sampler": True}
    assert versions.habits("1.1.0").sampler == {"sampler_type": "TRTLLMSampler"}
    with pytest.raises(ValueError, match="is not a version"):
        versions.release("latest")


@pytest.mark.parametrize(
    ("version", "sampler", "chosen"),
    [
        ("1.2.1", {"sampler_type": "TRTLLMSampler"}, 1),
        ("1.3.0rc24", {"sampler_type": "TRTLLMSampler"}, 1),
        ("1.3.0rc26", {}, 0),
        ("1.3.0", {}, 0),
        ("1.4.0rc4", {}, 0),
        ("1.5.0", {}, 0),
    ],
)
def test_habits_of_later_releases(version: str, sampler: dict[str, str], chosen: int) -> None:
    """The sheet's number 4: the sampler is gone from 1.3.0rc26 on, and with it its convention for log-probs."""
    found = versions.habits(version)
    assert (found.sampler, found.chosen_log_prob) == (sampler, chosen)
    assert bool(versions.remark(version)) == (version == "1.5.0")


def test_numpy_of_a_release() -> None:
    assert "needs numpy<2 and 2.1.0 is installed" in versions.numpy_refusal("1.2.1", "2.1.0")
    assert not versions.numpy_refusal("1.2.1", "1.26.4") and not versions.numpy_refusal("1.4.0rc4", "2.1.0")


def test_transformers_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"transformers": "5.14.1"}
    monkeypatch.setattr(versions, "installed", lambda package="tensorrt_llm": found.get(package))
    assert "pins transformers 4.57.3 and 5.14.1 is installed" in versions.transformers_remark("1.2.1")
    assert not versions.transformers_remark("1.4.0rc4")  # not known
    assert "; TensorRT-LLM 1.2.1 pins" in versions.import_failure("1.2.1", ImportError("no such name"))
    found["transformers"] = "4.57.6"
    assert not versions.transformers_remark("1.2.1")
    del found["transformers"]
    assert not versions.transformers_remark("1.2.1")


def test_flags_of_the_user() -> None:
    """Beams, LoRA and context logits are decided when the engine is built."""
    here, plan = Path("/c"), make_plan(LLAMA_8B, H200, "trtllm-engine", "fp8")
    command = commands.build(here, plan, here, here, 4, ("--lora_plugin", "auto"))
    assert command[command.index("--max_beam_width") + 1] == "4" and command[-2:] == ["--lora_plugin", "auto"]
    with pytest.raises(BuildError, match="TRTLLM_BUILD_FLAGS has --max_seq_len, which follows from the plan"):
        commands.build(here, plan, here, here, 1, ("--max_seq_len", "5"))
