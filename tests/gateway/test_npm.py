from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from flightline.supervisor.server import Server

MODULES = Path(sys.prefix) / "npm/node_modules"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("node") is None or not (MODULES / "openai").is_dir(),
    reason="node, or the npm package openai, is not here: tests/npm.sh fetches it",
)
def test_the_npm_sdk_says_what_the_python_one_does(served: Server, llm: openai.OpenAI) -> None:
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("sdk.mjs")), served.settings.http_url],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NODE_MODULES": str(MODULES)},
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    messages = [{"role": "user", "content": "the dog says: ✓ 你好 🙂"}]
    own = llm.chat.completions.create(model=got["model"], messages=messages, temperature=0, max_tokens=16)
    choice = own.choices[0]
    assert got["whole"] == got["streamed"] == [choice.message.content, choice.finish_reason, 16]
    assert got["helped"] == got["response"][0] == choice.message.content
    assert got["response"][1] == "incomplete" and got["completion"]
    assert got["error"] == ["BadRequestError", 400, "temperature", "invalid_request_error"]
