"""The hub path, with the real client against a small hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.answering import answering
from tests.tiny import tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The three routes a download takes; ``refuse`` answers them all with one status."""

    folder: Path
    refuse: tuple[int, dict[str, str]] | None = None
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.refuse:
            return self._answer(self.refuse[0], b"{}", self.refuse[1])
        if self.path.startswith("/api/models/org/tiny/tree/"):
            files = [self._entry(path) for path in sorted(self.folder.iterdir())]
            return self._answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
        if self.path.startswith("/api/models/org/tiny"):
            files = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            body = {"id": "org/tiny", "sha": COMMIT, "siblings": files, "tags": []}
            return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        path = self.folder / self.path.rsplit("/", 1)[1]
        if "/resolve/" not in self.path or not path.exists():
            return self._answer(404, b"{}", {})
        self._answer(
            200, path.read_bytes(), {"ETag": f'"{self._entry(path)["oid"]}"', "X-Repo-Commit": COMMIT}
        )

    @staticmethod
    def _entry(path: Path) -> dict[str, object]:
        content = path.read_bytes()
        return {
            "type": "file",
            "path": path.name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], str]]:
    handler = type("OneHub", (Hub,), {"folder": tmp_path / "remote", "asked": []})
    with answering(handler) as url:
        yield handler, url


def run(tmp_path: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A bf16 build of ``org/tiny`` from ``endpoint``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    arguments = ["--model", "org/tiny", "--precision", "bf16", "--build-dir", str(tmp_path / "build")]
    return subprocess.run(
        [sys.executable, "-m", "flightline.engine_build", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its licence"),
        (401, {"X-Error-Code": "RepoNotFound"}, "was not found on the hub"),
        (404, {"X-Error-Code": "RepoNotFound"}, "was not found on the hub"),
        (403, {}, "refused access (HTTP 403)"),
        (401, {}, "refused access (HTTP 401)"),
        (500, {}, "the hub failed (HTTP 500)"),
    ],
)
def test_refusals(
    hub: tuple[type[Hub], str], tmp_path: Path, status: int, headers: dict[str, str], says: str
) -> None:
    handler, endpoint = hub
    handler.refuse = (status, headers)
    done = run(tmp_path, endpoint)
    assert done.returncode == 1
    assert done.stderr.startswith("error: MODEL=org/tiny") and says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_offline(tmp_path: Path, offline: dict[str, str]) -> None:
    done = run(tmp_path, "http://127.0.0.1:9", **offline)
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr and done.stderr.count("\n") == 1


def test_download_then_offline(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    handler, endpoint = hub
    tiny_checkpoint(handler.folder)
    (handler.folder / "pytorch_model.bin").write_bytes(b"not wanted")
    done = run(tmp_path, endpoint)
    assert done.returncode == 0, done.stderr
    assert not any("pytorch_model.bin" in path for path in handler.asked)
    deployment = json.loads((tmp_path / "build" / "deployment.json").read_text())
    assert deployment["model"] == "org-tiny" and Path(deployment["model_dir"], "model.safetensors").exists()
    again = run(tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "unchanged" in again.stdout


def test_unsupported_is_refused_before_its_weights_are_fetched(
    hub: tuple[type[Hub], str], tmp_path: Path
) -> None:
    handler, endpoint = hub
    tiny_checkpoint(handler.folder)
    config = handler.folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    done = run(tmp_path, endpoint)
    assert done.returncode == 1 and "MambaForCausalLM" in done.stderr
    assert not any("model.safetensors" in path and "resolve" in path for path in handler.asked)
