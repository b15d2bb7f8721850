"""The real model's tokenizer and template, without its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from flightline.engine_build.checkpoint import EMBEDDED_FILE, EMBEDDED_PACKAGE
from flightline.engine_build.gguf_file import GgufFile
from flightline.engine_build.gguf_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec(EMBEDDED_PACKAGE)
    assert package is not None and package.origin is not None
    folder = tmp_path_factory.mktemp("smollm2")
    file = GgufFile(Path(package.origin).with_name(EMBEDDED_FILE))
    write_tokenizer(file.path, file.facts, file.facts["llama.context_length"], folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
