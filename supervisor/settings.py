"""What the server can be told, and what the build has left for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flightline.deployment import Deployment, DeploymentError
from flightline.gateway.settings import GatewaySettings
from flightline.settings import SettingsError, add_flags, existing_file, read, setting
from flightline.supervisor.errors import ServeError

MOST_PORT = 65535


def _host_of_each_rank(text: str) -> tuple[str, ...]:
    ranks: list[str] = []
    for word in text.split(","):
        host, _, count = word.strip().rpartition(":")
        if not host or not count.isdigit() or not int(count):
            raise ValueError(f"{word!r} is not host:GPUs: write for example node-0:8,node-1:8")
        ranks += [host] * int(count)
    return tuple(ranks)


@dataclass(frozen=True)
class ServeSettings:
    """Serve what was built, on Triton, until Ctrl-C."""

    build_dir: Path = setting(Path("build"), "folder of the build")
    host: str = setting(
        "127.0.0.1",
        "address of all three ports; those of Triton, gRPC and metrics, ask for no key",
        short=False,  # conda's compilers set a HOST that is no address
    )
    http_port: int = setting(
        8000, "the gateway's; 0: off, everything then goes over gRPC", least=0, most=MOST_PORT
    )
    grpc_port: int = setting(8001, "of Triton's gRPC service", least=1, most=MOST_PORT)
    metrics_port: int = setting(8002, "of Triton's metrics page", least=1, most=MOST_PORT)
    baseline: bool = setting(True, "load hf_baseline, a second copy of the model", variable="SERVE_BASELINE")
    start_timeout_s: float = setting(300.0, "seconds until a start is given up", least=1)
    drain_s: float = setting(10.0, "seconds that running requests get at a stop", least=1)
    probe_period_s: float = setting(
        10.0, "how often each endpoint is asked for a token, to see whether it still answers", least=1
    )
    probe_timeout_s: float = setting(
        20.0, "who has not answered by then is looked into; an engine that works is left alone, however slow",
        least=1,
    )  # fmt: skip
    tls_cert: Path | None = setting(
        None, "certificate of the HTTP and the gRPC port",
        parse=existing_file,
    )  # fmt: skip
    tls_key: Path | None = setting(None, "its key", parse=existing_file)
    triton_http_port: int = setting(
        0, "of Triton's own HTTP endpoints, on 127.0.0.1 whatever the host is; 0: any that is free, or none without a "
        "gateway", least=0, most=MOST_PORT,
    )  # fmt: skip
    rank_hosts: tuple[str, ...] = setting(
        (), "nodes of one compiled engine as host:GPUs with commas, this one first; none: all its GPUs are here",
        parse=_host_of_each_rank, variable="MPI_HOSTS", flag="--mpi-hosts",
    )  # fmt: skip
    gateway: GatewaySettings = field(default_factory=GatewaySettings)

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServeError("TLS_CERT and TLS_KEY belong together: set both or neither")
        if self.tls_cert is not None and not self.http_port:
            raise ServeError(
                "HTTP_PORT=0 with TLS_CERT leaves the supervisor no port to ask whether the server works: "
                f"give HTTP a port (it listens on {self.host} only), or leave TLS to a proxy"
            )
        if self.http_port:
            try:
                self.gateway.check_address(self.host)
            except SettingsError as error:
                raise ServeError(str(error)) from None

    @classmethod
    def from_environment(cls) -> ServeSettings:
        """Defaults, changed by the environment. Raises as :meth:`read`."""
        return cls.read({})

    @classmethod
    def read(cls, given: Mapping[str, str | None]) -> ServeSettings:
        """``given`` are the command line's texts by field; then the environment counts.

        Raises:
            ServeError: a value that cannot work, or a file that is not there.
        """
        if os.environ.get("TRITON_ADMIN_KEY_FILE"):
            raise ServeError(
                "TRITON_ADMIN_KEY_FILE is not supported: Triton takes a key on its command line only, where every "
                "local user can read it, so the endpoints that need one are closed; leave the variable out"
            )
        return read(cls, given, ServeError, gateway=read(GatewaySettings, given, ServeError))

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
        return f"http{'' if self.tls_cert is None else 's'}://{self.host}:{self.http_port}"

    @property
    def triton_http_url(self) -> str:
        return f"http://127.0.0.1:{self.triton_http_port}"

    @property
    def local_grpc_url(self) -> str:
        """The gRPC port as this machine reaches it."""
        return f"{self._local_host}:{self.grpc_port}"

    @property
    def local_metrics_url(self) -> str:
        """Triton's metrics page as this machine reaches it."""
        return f"http://{self._local_host}:{self.metrics_port}/metrics"

    @property
    def _local_host(self) -> str:
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.metrics_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"


def add_arguments(parser: argparse.ArgumentParser, *others: type) -> None:
    """Ours, and those of further settings."""
    add_flags(parser, ServeSettings, GatewaySettings, *others)
    parser.add_argument("--detach", action="store_true", help="run in the background; return when ready")
    parser.add_argument(
        "--stop", action="store_true", help="stop the server that runs from this build folder"
    )


def parse(arguments: list[str]) -> tuple[argparse.Namespace, ServeSettings]:
    """Raises ServeError: a setting cannot work."""
    parser = argparse.ArgumentParser(
        prog="flightline serve",
        description=ServeSettings.__doc__,
        epilog="It builds first what is not built yet, and takes the options of 'flightline build', too.",
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return options, ServeSettings.read(vars(options))


def deployed(build_dir: Path) -> Deployment:
    """What was built there. Raises ServeError: nothing, or it is damaged."""
    try:
        return Deployment.load(build_dir)
    except DeploymentError as error:
        raise ServeError(str(error)) from None
