"""The real model's tokenizer and template, without its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from flightline.engine_build import gguf_import
from flightline.engine_build.checkpoint import EMBEDDED_FILE, EMBEDDED_PACKAGE


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec(EMBEDDED_PACKAGE)
    assert package is not None and package.origin is not None
    folder = tmp_path_factory.mktemp("smollm2")
    file = gguf_import.GgufFile(Path(package.origin).with_name(EMBEDDED_FILE))
    gguf_import._write_tokenizer(file.facts, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
