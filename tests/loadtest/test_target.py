from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import psutil
import pytest

from flightline.loadtest.target import TargetError, target


def test_a_server_that_runs_already_is_named_with_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_PORT", "9001")
    (tmp_path / "deployment.json").write_text(
        json.dumps({"model": "m", "lane": "torch", "precision": "bf16"})
    )
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "serve.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{os.getpid()} {psutil.Process().create_time()}")
        lock.flush()
        refusal = pytest.raises(TargetError, match=r"a server already runs from .*--url 127\.0\.0\.1:9001")
        with refusal, target("", str(tmp_path), print):
            pass
