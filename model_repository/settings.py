"""What ``make serve`` can be told, and what the build has left for it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_repository.errors import ServeError

DEPLOYMENT_FILE = "deployment.json"
SOCKETS_VARIABLE = "FLIGHTLINE_ENGINE_SOCKETS"
"""Tells Triton's stubs where the engine processes are: paths with colons between."""
LANES = ("torch", "trtllm-pytorch", "trtllm-engine")


def _port(variable: str, default: int, least: int = 1) -> int:
    text = os.environ.get(variable, "") or str(default)
    if not text.isascii() or not text.isdigit() or not least <= int(text) < 65536:
        off = "" if least else ", or 0 to switch it off"
        raise ServeError(f"{variable}={text!r} is not a port: use a number from 1 to 65535{off}")
    return int(text)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "") or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ServeError(f"{variable}={text!r} is not valid: use a whole number of at least 1")
    return int(text)


def _file(variable: str) -> Path | None:
    text = os.environ.get(variable, "")
    if not text:
        return None
    if not Path(text).is_file():
        raise ServeError(f"{variable}={text!r} is not a file: give the path of one, or leave it out")
    return Path(text).absolute()


@dataclass(frozen=True)
class ServeSettings:
    """Addresses, folders and patience of one server."""

    build_dir: Path = Path("build")
    host: str = "127.0.0.1"
    """Address of all three ports; this Triton is not safe to expose, put a gateway before it."""
    http_port: int = 8000
    """0 = off: everything then goes over gRPC."""
    grpc_port: int = 8001
    metrics_port: int = 8002
    baseline: bool = True
    """Load ``hf_baseline`` too; without it the server needs one copy of the model less."""
    start_timeout_s: float = 300.0
    drain_s: float = 10.0
    """Time that running requests get at a stop."""
    probe_period_s: float = 10.0
    """How often the supervisor asks each door for a token, to see whether it still answers."""
    probe_timeout_s: float = 20.0
    """Who has not answered after this time is looked into; an engine that works is left alone, however slow."""
    tls_cert: Path | None = None
    """Certificate of the gRPC port; Triton's HTTP port knows no TLS, put a proxy before it."""
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServeError("TLS_CERT and TLS_KEY belong together: set both or neither")
        if self.tls_cert is not None and not self.http_port:
            raise ServeError(
                "HTTP_PORT=0 with TLS_CERT leaves the supervisor no port to ask whether the server works: "
                f"give HTTP a port (it listens on {self.host} only), or leave TLS to a proxy"
            )

    @classmethod
    def from_environment(cls) -> ServeSettings:
        """Defaults, changed by the environment.

        ``HTTP_PORT``, ``GRPC_PORT``, ``METRICS_PORT``, ``HOST``, ``START_TIMEOUT_S``, ``DRAIN_S``, ``PROBE_PERIOD_S``,
        ``PROBE_TIMEOUT_S``, ``TLS_CERT`` and ``TLS_KEY``.

        Raises:
            ServeError: a value that cannot work, or a file that is not there.
        """
        if os.environ.get("TRITON_ADMIN_KEY_FILE"):
            raise ServeError(
                "TRITON_ADMIN_KEY_FILE is not supported: Triton takes a key on its command line only, where every "
                "local user can read it, so the endpoints that need one are closed; leave the variable out"
            )
        return cls(
            host=os.environ.get("HOST") or cls.host,
            http_port=_port("HTTP_PORT", cls.http_port, least=0),
            grpc_port=_port("GRPC_PORT", cls.grpc_port),
            metrics_port=_port("METRICS_PORT", cls.metrics_port),
            start_timeout_s=float(_number("START_TIMEOUT_S", int(cls.start_timeout_s))),
            drain_s=float(_number("DRAIN_S", int(cls.drain_s))),
            probe_period_s=float(_number("PROBE_PERIOD_S", int(cls.probe_period_s))),
            probe_timeout_s=float(_number("PROBE_TIMEOUT_S", int(cls.probe_timeout_s))),
            tls_cert=_file("TLS_CERT"),
            tls_key=_file("TLS_KEY"),
        )

    @property
    def ports(self) -> dict[str, int]:
        """Environment variable -> port, of those that are on."""
        http = {"HTTP_PORT": self.http_port} if self.http_port else {}
        return {**http, "GRPC_PORT": self.grpc_port, "METRICS_PORT": self.metrics_port}

    @property
    def run_dir(self) -> Path:
        """Logs, lock and the private Triton backend folder."""
        return self.build_dir.absolute() / "run"

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.metrics_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"


@dataclass(frozen=True)
class Deployment:
    """What ``make build-engines`` has built; ``deployment.json`` of the build folder."""

    model: str
    lane: str
    precision: str
    engine_dir: Path
    model_repository: Path
    engines: int = 1
    """Engine processes, one a GPU."""
    device: str = "cuda"

    @classmethod
    def load(cls, build_dir: Path) -> Deployment:
        """Raises ServeError: not built, damaged, or for a lane that this version cannot serve."""
        path = build_dir / DEPLOYMENT_FILE
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            deployment = cls(
                model=values["model"],
                lane=values["lane"],
                precision=values["precision"],
                engine_dir=Path(values["engine_dir"]),
                model_repository=Path(values["model_repository"]),
                engines=values["dp"],
                device=values["hardware"]["device"],
            )
        except FileNotFoundError:
            raise ServeError(f"{path} does not exist: run 'make build-engines' first") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ServeError(f"{path} is damaged ({error!r}): run 'make build-engines' again") from None
        if type(deployment.engines) is not int or deployment.engines < 1:
            raise ServeError(
                f"dp={deployment.engines!r} of {path} is not valid: it must be a whole number of at least 1, "
                "run 'make build-engines' again"
            )
        for folder in (deployment.engine_dir, deployment.model_repository):
            if not folder.is_dir():
                raise ServeError(f"{folder}, named by {path}, does not exist: run 'make build-engines' again")
        if deployment.lane not in LANES:
            raise ServeError(f"lane {deployment.lane} of {path} is unknown: run 'make build-engines' again")
        return deployment
