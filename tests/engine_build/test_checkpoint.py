"""Where a checkpoint may come from, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flightline.engine_build.errors import BuildError
from flightline.engine_build.settings import parse
from tests.short_gate import short_gate
from tests.tiny import tiny_checkpoint

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(autouse=True)
def quick_gate() -> Iterator[None]:
    with short_gate():
        yield


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(make_build: Make, model: Path | str, tmp_path: Path, *options: str) -> str:
    """The one line of a refused build, which must not have left anything servable."""
    with pytest.raises(BuildError) as error:
        make_build(model, tmp_path / "build", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "build" / "deployment.json").exists()
    return str(error.value)


def test_local_folder_is_used_in_place_and_not_modified(
    model: Path, tmp_path: Path, make_build: Make
) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    built = make_build(model, tmp_path / "build", "--precision", "bf16")
    assert built["model_dir"] == built["source_dir"] == str(model)
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_sharded(tmp_path: Path, make_build: Make) -> None:
    model = tiny_checkpoint(tmp_path / "sharded", max_shard_size="50KB")
    make_build(model, tmp_path / "build", "--precision", "bf16")
    next(model.glob("model-00002*")).unlink()
    shutil.rmtree(tmp_path / "build")
    assert "model-00002" in refusal(make_build, model, tmp_path, "--precision", "bf16")


def test_unsupported_architecture_lists_the_supported(model: Path, tmp_path: Path, make_build: Make) -> None:
    edit(model / "config.json", architectures=["BloomForCausalLM"])
    message = refusal(make_build, model, tmp_path)
    assert "BloomForCausalLM" in message and "LlamaForCausalLM" in message and "Gemma3ForCausalLM" in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, "'aqlm' is not supported; supported are bf16"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "bits=3 is not valid: only 4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "no tensor has such codes"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "no tensor has such codes",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}},
            "'NVFP4_SVD' is not",
        ),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_act": "relu6"}, "relu6"),
    ],
)
def test_refused_by_name(model: Path, tmp_path: Path, make_build: Make, config: dict, says: str) -> None:
    edit(model / "config.json", **config)
    assert says in refusal(make_build, model, tmp_path)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", "no model*.safetensors"),
    ],
)
def test_missing_file(model: Path, tmp_path: Path, make_build: Make, missing: str, says: str) -> None:
    (model / missing).unlink()
    assert says in refusal(make_build, model, tmp_path)


def test_damaged_files(model: Path, tmp_path: Path, make_build: Make) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged (cut short)" in refusal(make_build, model, tmp_path)
    weights.write_bytes(b"version https://git-lfs")
    assert "damaged" in refusal(make_build, model, tmp_path)
    (model / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(make_build, model, tmp_path)


def test_missing_config_field(model: Path, tmp_path: Path, make_build: Make) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    assert "hidden_size" in refusal(make_build, model, tmp_path)


@pytest.mark.parametrize("name", ["no-such-folder", "./missing/folder", "a/b/c"])
def test_neither_folder_nor_hub_id(tmp_path: Path, make_build: Make, name: str) -> None:
    message = refusal(make_build, name, tmp_path)
    assert name in message and "neither" in message


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_numbers(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=f"MAX_SEQ_LEN='{value}' is not valid: use a whole number from 1 to"):
        parse([f"--max-seq-len={value}"])
    monkeypatch.setenv("MAX_BATCH_SIZE", value)
    with pytest.raises(BuildError, match=f"MAX_BATCH_SIZE='{value}' is not valid"):
        parse([])


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": "m", "ENGINE": "torch", "PRECISION": "bf16", "CALIB": "c.jsonl"}.items():
        monkeypatch.setenv(name, value)
    found = parse([])
    assert (found.model, found.engine, found.precision, str(found.calibration)) == (
        "m",
        "torch",
        "bf16",
        "c.jsonl",
    )
    assert parse(["--precision", "fp8"]).precision == "fp8"
    for name in ("MODEL", "ENGINE", "PRECISION", "CALIB"):
        monkeypatch.setenv(name, "")
    empty = parse([])
    assert (empty.model, empty.engine, empty.precision, empty.calibration) == ("", "auto", "auto", None)
