"""The processes behind the HTTP port, which can be started again while the port stays open."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from flightline.deployment import Deployment
from flightline.gateway.settings import ProcessSettings, Upstream, default_processes
from flightline.supervisor.errors import ServeError
from flightline.supervisor.last_words import LastWords, allow_connections
from flightline.supervisor.processes import Child
from flightline.supervisor.settings import ServeSettings

EXIT_S = 5.0
"""For the last words of streams, when what they wait for has ended."""
LAST_WORDS_S = 1.0
"""For those of a process that was killed."""
REFUSE = signal.SIGUSR1
"""Tells a gateway process that a stop has begun: it is not ready any more and takes no new requests."""
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_PRIVATE_PORTS = (20_000, 32_000)
"""Below those that the kernel gives to outgoing connections, so that none takes it while Triton is restarted."""
_PARAMETER = r'key: "{}" value: {{ string_value: "([^"]*)" }}'


def private_port() -> int:
    """One for Triton's own HTTP endpoints that nobody listens on now."""
    for port in random.sample(range(*_PRIVATE_PORTS), 200):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServeError(
        f"no port from {_PRIVATE_PORTS[0]} to {_PRIVATE_PORTS[1]} is free for Triton's HTTP endpoints"
    )


def upstream(settings: ServeSettings, deployment: Deployment) -> Upstream:
    """Raises ServeError: the build has no ``text_generation``."""
    path = deployment.model_repository / "text_generation/config.pbtxt"
    try:
        config = path.read_text(encoding="utf-8")
    except OSError:
        raise ServeError(f"{path} does not exist: run 'make build-engines' again") from None

    def parameter(name: str) -> str:
        found = re.search(_PARAMETER.format(name), config)
        if found is None:
            raise ServeError(f"{path} has no parameter {name}: run 'make build-engines' again")
        return found[1]

    return Upstream(
        grpc_url=settings.local_grpc_url,
        http_url=settings.triton_http_url if settings.triton_http_port else "",
        metrics_url=settings.local_metrics_url,
        tokenizer_dir=parameter("tokenizer_dir"),
        model=deployment.model,
        max_seq_len=int(parameter("max_seq_len")),
        lane=deployment.lane,
        version=_version(),
        tells_cached_tokens='"return_num_cached_tokens"' in config,  # engines that were built before do not
        counts_at_end='"counts_at_end"' in config,
        tls_cert=str(settings.tls_cert or ""),
        tls_name=_certified_name(settings.tls_cert) if settings.tls_cert else "",
    )


def _version() -> str:
    """ "" where the folders were copied and not installed, as in a container."""
    try:
        return metadata.version("flightline")
    except metadata.PackageNotFoundError:
        return ""


def _certified_name(path: Path) -> str:
    """A name that a certificate is for: the gateway calls Triton by it, wherever it listens.

    Raises:
        ServeError: it is none.
    """
    try:
        found = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]  # there is no public way
    except (ssl.SSLError, OSError) as error:
        raise ServeError(f"TLS_CERT={path} is not a certificate in PEM ({error}): give one") from None
    names = [name for kind, name in found.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    names += [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    if not names:
        raise ServeError(f"TLS_CERT={path} is for no name: make one with a subjectAltName")
    return str(names[0]).replace("*", "any", 1)


class GatewayProcess:
    """One of them: its socket outlives it, so connections wait for the next one."""

    def __init__(
        self, name: str, settings: ProcessSettings, listener: socket.socket, log: Path, env: dict[str, str]
    ) -> None:
        """``name`` is what a user reads about it."""
        self.name = name
        self.child: Child | None = None
        self.listener = listener
        self._settings = settings
        self._log = log
        self._env = env

    def start(self) -> Child:
        """Returns at once."""
        if self.child is not None:
            # Nobody works on the requests that it was counting; its other counters stay.
            mark_process_dead(self.child.pid, self._env[METRICS_FOLDER])  # type: ignore[no-untyped-call]
        self._last_words = LastWords()
        channel = self._last_words.channel.fileno()
        settings = replace(self._settings, last_words_fd=channel)
        command = [sys.executable, "-m", "flightline.gateway", settings.to_json()]
        Path(settings.heartbeat).touch()
        try:
            self.child = Child(self.name, command, self._env, self._log, [self.listener.fileno(), channel])
        finally:
            self._last_words.given()
        return self.child

    def stop(self, patience_s: float, hurry: threading.Event | None = None) -> None:
        """As a child's; those whom it leaves without an answer have been told afterwards."""
        if self.child is not None:
            self.child.stop(patience_s, hurry)
            self._last_words.join(LAST_WORDS_S)

    def problem(self, patience_s: float) -> str:
        """Why it must be started again; empty if it need not."""
        if self.child is None:
            return ""
        if self.child.exit_code is not None:
            return f"{self.name} {self.child.how_it_ended()}"
        silent = time.time() - Path(self._settings.heartbeat).stat().st_mtime
        return f"{self.name} has stopped answering" if silent > patience_s else ""


def prepare(settings: ServeSettings, deployment: Deployment, folder: Path) -> list[GatewayProcess]:
    """All of them, not started, with the port bound; ``folder`` is private and goes with the server.

    Raises:
        ServeError: the port is taken.
    """
    counters = folder / "metrics"
    counters.mkdir()
    env = dict(os.environ) | {
        METRICS_FOLDER: str(counters),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    source = upstream(settings, deployment)
    count = settings.gateway.processes or default_processes()
    allow_connections(count * settings.gateway.max_in_flight)
    made = []
    for number in range(count):
        listener = _bind(settings)
        process = ProcessSettings(
            gateway=settings.gateway,
            upstream=source,
            listen_fds=(listener.fileno(),),
            heartbeat=str(folder / f"gateway-{number}.beat"),
            drain_s=EXIT_S - 1,
            tls_cert=str(settings.tls_cert or ""),
            tls_key=str(settings.tls_key or ""),
        )
        name = "the gateway" if count == 1 else f"gateway process {number + 1} of {count}"
        log = settings.run_dir / ("gateway.log" if count == 1 else f"gateway-{number}.log")
        log.write_bytes(b"")
        made.append(GatewayProcess(name, process, listener, log, env))
    return made


def _bind(settings: ServeSettings) -> socket.socket:
    """A socket for one process; the kernel spreads connections over those that listen (SO_REUSEPORT, socket(7))."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((settings.host, settings.http_port))
    except OSError as error:
        raise ServeError(
            f"port {settings.http_port} cannot be had ({error.strerror}): set HTTP_PORT"
        ) from None
    return listener


def lives(settings: ServeSettings) -> bool:
    """Whether a gateway process answers."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    scheme = "http" if settings.tls_cert is None else "https"
    anybody = ssl._create_unverified_context() if settings.tls_cert is not None else None
    try:
        url = f"{scheme}://{host}:{settings.http_port}/health"
        with urllib.request.urlopen(url, timeout=2, context=anybody) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
