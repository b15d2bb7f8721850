"""What the gateway can be told. Standard library only: ``make preflight`` reads it before anything is installed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from flightline.settings import SettingsError, existing_file, setting

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def default_processes() -> int:
    """One for every two cores, up to eight: many requests that begin together wait for one another in each."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def _file(text: str) -> str:
    return str(existing_file(text))


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class GatewaySettings:
    """Limits and habits of each gateway process."""

    processes: int = setting(
        0, "gateway processes; 0: one for two cores, 8 at most", least=0, most=64, variable="GATEWAY_PROCESSES",
        flag="--gateway-processes",
    )  # fmt: skip
    api_keys_file: str = setting("", "file with one API key a line; without it nobody needs one", parse=_file)
    allow_no_key: bool = setting(False, "listen on other addresses than this machine's own without keys")
    metrics_without_key: bool = setting(
        False, "answer /metrics without a key: routers and Prometheus send none"
    )
    served_names: tuple[str, ...] = setting(
        (), "names of the model at /v1/models, with commas; none: that of the build", parse=_list,
        variable="SERVED_MODEL_NAME", flag="--served-model-name",
    )  # fmt: skip
    chat_template: str = setting("", "file that replaces the checkpoint's chat template", parse=_file)
    tool_format: str = setting("", "how the model writes tool calls, where its template does not tell")
    cors_origins: tuple[str, ...] = setting(
        (), "web pages of other origins that browsers may let call it, with commas; * = all", parse=_list
    )
    max_in_flight: int = setting(512, "requests that one process works on; one more is 429", least=1)
    max_body_bytes: int = setting(8 << 20, "largest body of a request", least=1)
    max_header_bytes: int = 32 << 10
    head_timeout_s: float = 10.0
    """For the head of a request, from the connection or the last answer on."""
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    """Between two requests of a connection; longer than a proxy's."""
    write_timeout_s: float = 60.0
    """Who takes nothing of an answer for so long is left."""
    answer_timeout_s: float = 3600.0

    def check_address(self, host: str) -> None:
        """Raises SettingsError: strangers could reach ``host``, and nothing asks them for a key."""
        if host not in LOOPBACK and not self.api_keys_file and not self.allow_no_key:
            raise SettingsError(
                f"HOST={host} lets other machines use this server, and it asks for no key: set API_KEYS_FILE to a "
                "file with one key a line, or ALLOW_NO_KEY=1 if something in front of it asks"
            )


@dataclass(frozen=True)
class Upstream:
    """Where the gateway's answers come from."""

    grpc_url: str
    http_url: str = ""
    """Triton's own HTTP port, for /v2; "" = it is off."""
    metrics_url: str = ""
    """Triton's metrics page; "" = it is not asked."""
    tokenizer_dir: str = ""
    model: str = ""
    """Name of the checkpoint."""
    max_seq_len: int = 0
    lane: str = "torch"
    version: str = ""
    tells_cached_tokens: bool = False
    """Whether its ``text_generation`` knows how much of a prompt it found in the prefix cache."""
    counts_at_end: bool = False
    """Whether it can leave the count of tokens to the last piece of a stream."""
    tls_cert: str = ""
    """Triton's certificate, if its gRPC port speaks TLS."""
    tls_name: str = ""
    """A name that the certificate is for."""


@dataclass(frozen=True)
class ProcessSettings:
    """All that one process is started with."""

    gateway: GatewaySettings
    upstream: Upstream
    listen_fds: tuple[int, ...]
    """Inherited sockets that listen."""
    heartbeat: str = ""
    """A file that is touched every second as long as the event loop turns."""
    last_words_fd: int = -1
    """The inherited channel to who speaks for this process when it is killed; -1 = nobody."""
    drain_s: float = 10.0
    tls_cert: str = ""
    tls_key: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessSettings:
        values = json.loads(text)
        values["gateway"] = _typed(GatewaySettings, values["gateway"])
        values["upstream"] = _typed(Upstream, values["upstream"])
        return cls(**_lists_as_tuples(values))


def _typed(kind: type, values: dict[str, Any]) -> Any:
    return kind(**_lists_as_tuples({field.name: values[field.name] for field in fields(kind)}))


def _lists_as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
