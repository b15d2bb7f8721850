"""Start-up of a model inside Triton's Python stub."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from torch_engine.client import EngineClient

SOCKET_VARIABLE = "FLIGHTLINE_ENGINE_SOCKET"
ENGINE_WAIT_S = 5.0


def parameters(args: dict[str, str]) -> dict[str, str]:
    """``parameters`` of the model's config.pbtxt."""
    return {
        key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
    }


def connect_engine() -> EngineClient:
    """Client of the engine process that the supervisor runs.

    An engine that is late is no reason to fail: requests get UNAVAILABLE until it is there.

    Raises:
        RuntimeError: nobody has said where the engine is.
    """
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        raise RuntimeError(f"{SOCKET_VARIABLE} is not set: start the server with 'make serve'")
    engine = EngineClient(path)
    deadline = time.monotonic() + ENGINE_WAIT_S
    while not engine.connected and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine


def flag(values: dict[str, str], name: str) -> bool:
    """A boolean parameter, spelled as NVIDIA's templates allow."""
    return values.get(name, "true").lower() in ("true", "1")


def period_s(values: dict[str, str], name: str) -> float:
    return int(values[name]) / 1000


def close(*things: Any) -> None:
    for thing in things:
        thing.close()
