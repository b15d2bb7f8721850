"""The whole build of the TensorRT-LLM backends, with NVIDIA's two tools replaced at their process boundary."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flightline.engine_build import build as build_module
from flightline.engine_build.__main__ import main
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import read_tensors
from flightline.engine_build.prompts import Sample
from flightline.engine_build.quantize import quantize
from flightline.engine_build.trtllm import build as trtllm_build
from tests.engine_build import trtllm_tools
from tests.engine_build.test_plan import A100, H200
from tests.packing import FP8_FORMATS, rewrite
from tests.tiny import tiny_checkpoint

Make = Callable[..., dict[str, Any]]
GPU = dataclasses.replace(H200, tensorrt_llm="1.2.1")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's container on an H200."""
    folder = trtllm_tools.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(build_module, "detect", lambda: GPU)


def test_engine(tools: None, tiny: Path, tmp_path: Path, make_build: Make) -> None:
    arguments = (tiny, tmp_path / "build", "--engine", "trtllm-engine")
    deployed = make_build(*arguments)
    engine = Path(deployed["engine_dir"])
    assert (deployed["lane"], deployed["precision"], deployed["world_size"]) == ("trtllm-engine", "fp8", 1)
    assert {path.name for path in engine.iterdir()} == {
        "config.json",
        "rank0.engine",
        "build.log",
        "manifest.json",
    }
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["hardware"]["tensorrt_llm"] == "1.2.1"
    assert manifest["hardware"]["capability"] == [9, 0]
    assert not (tmp_path / "build/work").exists()
    said: list[str] = []
    make_build(*arguments, said=said)
    assert any(line.startswith("engine") and "unchanged" in line for line in said)


def test_dry_run_prints_commands_and_builds_nothing(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make
) -> None:
    said: list[str] = []
    options = ("--engine", "trtllm-engine", "--dry-run", "--max-seq-len", "512")
    assert make_build(tiny, tmp_path / "build", *options, said=said) == {}
    runs = [line for line in said if line.startswith("run ")]
    assert len(runs) == 2 and "--kv_cache_dtype fp8" in runs[0] and "--max_seq_len 512" in runs[1]
    assert f"write  {tmp_path}/build/model_repository/tensorrt_llm/config.pbtxt" in said
    assert said[-1] == "dry run: no engine was built"
    assert {path.name for path in (tmp_path / "build").rglob("*")} <= {"hashes.json", ".lock"}


def test_dry_run_without_a_gpu_says_for_which_it_is(tiny: Path, tmp_path: Path, make_build: Make) -> None:
    said: list[str] = []
    options = ("--engine", "trtllm-engine", "--dry-run", "--tp", "2")
    make_build(tiny, tmp_path / "build", *options, said=said)
    assert any("no GPU here: shown for 2 x NVIDIA H200" in line for line in said)
    assert any(line.endswith("rank1.engine") for line in said)


def test_dry_run_from_the_command_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest has its own
    arguments = ["--model", str(tiny), "--build-dir", str(tmp_path), "--engine", "trtllm-engine", "--dry-run"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("dry run: no engine was built\n")


@pytest.mark.parametrize("lane", ["trtllm-pytorch", "torch"])
def test_dry_run_of_the_other_lanes(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, lane: str
) -> None:
    said: list[str] = []
    make_build(tiny, tmp_path / "build", "--engine", lane, "--dry-run", said=said)
    assert any(line.startswith("write") and "tiny-llama-fp8" in line for line in said)
    assert not (tmp_path / "build/engines").exists()


def test_silent_override_fails_the_build(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        trtllm_tools.SAYS, "FP8 context FMHA is disabled because it is only supported on Ada and Hopper Arch."
    )
    with pytest.raises(BuildError, match=r"is disabled because.*PRECISION=int8_sq"):
        make_build(tiny, tmp_path / "build", "--engine", "trtllm-engine")
    assert not list((tmp_path / "build/engines").iterdir())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "Error Code 9: API Usage Error (Networks with FP8 Q/DQ layers require hardware with FP8 support.)",
            "8.9",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk is full: free some space"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "larger GPU"),
        ("something nobody has seen", "quantize.py ended with status 1: something nobody has seen"),
    ],
)
def test_failing_tool(
    tools: None,
    tiny: Path,
    tmp_path: Path,
    make_build: Make,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    monkeypatch.setenv(trtllm_tools.FAILS, line)
    with pytest.raises(BuildError) as failure:
        make_build(tiny, tmp_path / "build", "--engine", "trtllm-engine")
    assert says in str(failure.value) and "\n" not in str(failure.value)
    assert not list((tmp_path / "build/engines").iterdir())


def test_half_built_engine(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trtllm_tools.FORGETS, "rank0.engine")
    with pytest.raises(
        BuildError, match=r"half-built \(rank0.engine is missing or empty\): make build-engines"
    ):
        make_build(tiny, tmp_path / "build", "--engine", "trtllm-engine")


def test_disk_that_would_be_full(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trtllm_build.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 29))
    with pytest.raises(
        BuildError, match=r"needs 1 GiB in .* and 0 GiB is free: free some space, or set BUILD_DIR"
    ):
        make_build(tiny, tmp_path / "build", "--engine", "trtllm-engine")


def test_fp8_on_an_a100(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "detect", lambda: dataclasses.replace(A100, tensorrt_llm="1.2.1"))
    with pytest.raises(BuildError, match=r"8\.9.*A100 has 8\.0.*PRECISION=int8_sq or PRECISION=int4_awq"):
        make_build(tiny, tmp_path / "build", "--engine", "trtllm-engine", "--precision", "fp8")


def test_engine_on_1_3(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "detect", lambda: dataclasses.replace(H200, tensorrt_llm="1.3.0"))
    with pytest.raises(BuildError, match=r"1\.3\.0 has no compiled engines any more.*ENGINE=trtllm-pytorch"):
        make_build(tiny, tmp_path / "build", "--engine", "trtllm-engine")


def test_fp8_checkpoint_as_source(tools: None, tiny: Path, tmp_path: Path, make_build: Make) -> None:
    source, _ = rewrite(tiny, tmp_path / "fp8", *FP8_FORMATS["modelopt"])
    shutil.copyfile(trtllm_tools.DATA / "modelopt_hf_quant_config.json", source / "hf_quant_config.json")
    with pytest.raises(BuildError, match=r"FP8 checkpoint.*trtllm-engine calibrates.*ENGINE=trtllm-pytorch"):
        make_build(source, tmp_path / "build", "--engine", "trtllm-engine")


def test_fp8_checkpoint_is_laid_out_like_modelopts(tmp_path: Path) -> None:
    """Names, dtypes and shapes of a real ModelOpt export of a model of this shape; scales are amax / 448."""
    listing = json.loads((trtllm_tools.DATA / "modelopt_hf_fp8.json").read_text())["model.safetensors"]
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = tiny_checkpoint(tmp_path / "source", vocab_size=512, head_dim=64, **shape)
    target = tmp_path / "fp8"
    target.mkdir()
    quantize(source, [Sample(text="the quick brown fox " * n) for n in range(1, 9)], target, "cpu", "float32")
    ours = dict(read_tensors(target))
    # That export is of a model whose KV cache stays as it is; ours has the cache's scales, which others may leave.
    scales = {name for name in ours if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 4 and all(ours.pop(name).shape == () for name in scales)
    assert {
        name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in ours.items()
    } == {name: (each["dtype"], each["shape"]) for name, each in listing.items()}
    plain = dict(read_tensors(source))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        amax = plain[f"{name}.weight"].float().abs().max()
        assert ours[f"{name}.weight_scale"].item() == pytest.approx(amax.item() / 448)
    quantization = json.loads((target / "hf_quant_config.json").read_text())["quantization"]
    facts = json.loads((trtllm_tools.DATA / "modelopt_hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == facts["quant_algo"]
    assert quantization["kv_cache_quant_algo"] == facts["kv_cache_quant_algo"]
    assert set(quantization["exclude_modules"]) >= set(facts["exclude_modules"])


@pytest.mark.parametrize("name", ["cnn_dailymail", "scienceqa"])
@pytest.mark.parametrize("dry", [True, False])
def test_a_path_that_quantize_takes_for_a_data_set(
    tools: None, tiny: Path, tmp_path: Path, make_build: Make, name: str, dry: bool
) -> None:
    """It would calibrate with that data set, from the network, instead of our prompts."""
    root = tmp_path / f"my_{name}_engines"
    with pytest.raises(BuildError, match=f"for the data set {name}.*set BUILD_DIR to a folder without it"):
        make_build(tiny, root, "--engine", "trtllm-engine", *(["--dry-run"] if dry else []))
    assert not [path for path in root.rglob("*") if path.suffix == ".engine" or path.name == "config.json"]
