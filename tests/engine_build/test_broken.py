"""Broken checkpoints and a full disk: one line with a remedy, exit code 1, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flightline.engine_build.__main__ import main
from flightline.engine_build.cache import FileHashes
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.weights import Checkpoint
from tests.tiny import FAMILIES, tiny_checkpoint

Break = Callable[[Path], None]


@pytest.fixture(autouse=True)
def own_signals() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def refused(model: Path | str, build_dir: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of a build that must not have left anything but its lock and its memory of hashes."""
    status = main(["--model", str(model), "--build-dir", str(build_dir), *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 1 and line.startswith("error: ")
    assert {path.name for path in build_dir.rglob("*") if path.is_file()} <= {"hashes.json", ".lock"}
    return line


def config(**changes: object) -> Break:
    def apply(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def apply(model: Path) -> None:
        held = load_file(model / "model.safetensors")
        change(held)
        save_file(held, model / "model.safetensors", {"format": "pt"})

    return apply


def as_phi3(held: dict[str, torch.Tensor]) -> None:
    """Its checkpoints hold one tensor for queries, keys and values, and one for gate and up."""
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        parts = [held.pop(f"{attention}.{part}_proj.weight") for part in "qkv"]
        held[f"{attention}.qkv_proj.weight"] = torch.cat(parts)
        parts = [held.pop(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
        held[f"{mlp}.gate_up_proj.weight"] = torch.cat(parts)


def shorter(held: dict[str, torch.Tensor]) -> None:
    held["model.layers.1.mlp.down_proj.weight"] = held["model.layers.1.mlp.down_proj.weight"][:32].clone()


def cut(share: float) -> Break:
    def apply(model: Path) -> None:
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return apply


def header(text: bytes) -> Break:
    def apply(model: Path) -> None:
        (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    return apply


FETCH = "fetch the"
BROKEN: dict[str, tuple[Break, str, str]] = {
    "missing tensor": (tensors(lambda held: held.pop("model.norm.weight")), "model.norm.weight", FETCH),
    "wrong shape": (tensors(shorter), "mlp.down_proj.weight has shape [32, 128]", "hidden_size=64"),
    "vocabulary": (config(vocab_size=320), "embed_tokens.weight has shape [300, 64]", "vocab_size=320"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads=0", "whole number"),
    "three heads": (config(num_attention_heads=3), "num_key_value_heads=2", "must divide"),
    "three key heads": (config(num_key_value_heads=3), "num_key_value_heads=3", "must divide"),
    "odd heads": (config(head_dim=15), "head_dim=15", "even"),
    "text for a number": (config(hidden_size="64"), "hidden_size='64'", "whole number"),
    "huge number": (config(num_hidden_layers=10**12), "num_hidden_layers=1000000000000", "whole number"),
    "text for a flag": (config(tie_word_embeddings="no"), "tie_word_embeddings='no'", "true or false"),
    "no end id": (config(eos_token_id="</s>"), "eos_token_id='</s>'", "token id"),
    "no epsilon": (config(rms_norm_eps=float("nan")), "rms_norm_eps=nan", "positive"),
    "no head": (tensors(lambda held: held.pop("lm_head.weight")), "lacks the tensor lm_head.weight", FETCH),
    "phi-3": (tensors(as_phi3), "self_attn.q_proj.weight (it has model.layers.0.", "no LlamaForCausalLM has"),
    "foreign tensor": (
        tensors(lambda held: held.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})),
        "q_norm.weight is none of a LlamaForCausalLM",
        FETCH,
    ),
    "cut in the data": (cut(0.7), "damaged (cut short)", FETCH),
    "cut in the header": (cut(0.001), "damaged", FETCH),
    "nonsense header": (header(b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}    '), "damaged", FETCH),
    "header of a list": (header(b"[]"), "damaged", FETCH),
    "layer types": (config(layer_types=["full_attention"]), "layer_types", "one for each of"),
    "rope of text": (config(rope_parameters="default"), "rope_parameters='default'", "object"),
    "rope without factor": (
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "lacks factor", FETCH,
    ),
    "rope type": (config(rope_parameters={"rope_type": "dynamic"}), "dynamic", "supported are"),
    "partial rope": (
        config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
        "not implemented",
    ),
    "bidirectional": (
        config(use_bidirectional_attention=True), "use_bidirectional_attention=True", "another checkpoint",
    ),
    "unheard of": (config(attention_multiplier=0.5), "attention_multiplier=0.5", "remove the key"),
    "a window of llama": (config(sliding_window=64), "sliding_window=64", "remove the key"),
    "own code": (config(auto_map={"AutoModelForCausalLM": "m.M"}), "auto_map", "plain LlamaForCausalLM"),
    "config is a list": (lambda model: (model / "config.json").write_text("[]"), "not a JSON object", FETCH),
    "deep config": (
        lambda model: (model / "config.json").write_text("[" * 100_000), "config.json is damaged", FETCH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_one_line_and_a_remedy(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    apply, names, remedy = BROKEN[fault]
    apply(model)
    line = refused(model, tmp_path / "build", capsys, "--precision", "bf16")
    assert names in line and remedy in line


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "9" * 5000])
def test_engines(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert "DP=" in refused(tiny, tmp_path / "build", capsys, f"--dp={value}")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("file", "is not a readable GGUF file"),
        ("unmarked", "is not a readable GGUF file"),
        ("folder", "is a folder of GGUF files: name one of them"),
        ("missing", "does not exist: give the Hugging Face folder"),
    ],
)
def test_gguf_is_called_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, says: str
) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    path = folder / ("weights" if kind == "unmarked" else "model-Q4_K_M.gguf")
    if kind != "missing":
        path.write_bytes(b"GGUF" + bytes(100))
    line = refused(folder if kind == "folder" else path, tmp_path / "build", capsys)
    assert says in line and str(folder) in line and "neither" not in line


@pytest.mark.parametrize("where", ["compiler", "package", "hashes"])
def test_a_full_disk(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "compiler":  # a slower kernel is no remedy
        script = tmp_path / "c++"
        script.write_text("#!/bin/sh\necho 'ld: final link failed: No space left on device' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    elif where == "package":
        monkeypatch.setattr("flightline.torch_engine.core.config.EngineConfig.save", full)
    else:
        monkeypatch.setattr(FileHashes, "save", full)
        monkeypatch.setattr("flightline.engine_build.build.obtain", full)
    line = refused(tiny, tmp_path / "build", capsys, "--precision", "bf16")
    assert "the disk is full: free some space" in line


def test_hashes_are_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:1].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        FileHashes(tmp_path).save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_known(tmp_path: Path, family: str) -> None:
    """So are the settings of ``generate`` that its older versions wrote into the same file."""
    folder = tiny_checkpoint(tmp_path / family, family)
    config(temperature=0.6, do_sample=True, max_length=20, use_cache=False, pretraining_tp=1)(folder)
    Checkpoint(folder, load_spec(folder))
