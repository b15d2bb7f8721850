"""``python -m flightline.gateway JSON``: one gateway process, as the supervisor starts it (``ProcessSettings``)."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys
from types import FrameType

import uvicorn
import uvloop

from flightline.gateway.app import Gateway
from flightline.gateway.keys import ApiKeys
from flightline.gateway.protocol import LimitedProtocol
from flightline.gateway.served import ServedModel
from flightline.gateway.settings import ProcessSettings, SettingsError
from flightline.gateway.tracing import recorder
from flightline.torch_engine.core.request import RequestError
from flightline.torch_engine.process.log import logger

BACKLOG = 2048
SWITCH_S = 0.0005
"""So soon another thread gets the interpreter: one that tokenises must not wait for streams, nor they for it."""


class _Server(uvicorn.Server):
    """Tells the application of a signal before it waits for the connections to end."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self.should_exit: bool = False
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first drains, a second ends streams at once; neither is raised again, so that exit handlers run."""
        if self.should_exit:
            self._gateway.end_streams()
        self._gateway.drain()
        self.should_exit = True


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m flightline.gateway SETTINGS_AS_JSON", file=sys.stderr)
        return 2
    logger("gateway", sys.stdout)
    logger("uvicorn.error", sys.stdout).setLevel(logging.WARNING)
    _allow_many_connections()
    sys.setswitchinterval(SWITCH_S)
    try:
        settings = ProcessSettings.from_json(arguments[0])
        keys = ApiKeys(settings.gateway.api_keys_file)
        model = ServedModel(settings.gateway, settings.upstream)
        record = recorder(settings.upstream.version)
    except (SettingsError, RequestError) as error:
        print(f"gateway: error: {error}", file=sys.stderr, flush=True)
        return 1
    gateway = Gateway(settings, model, keys, record)
    limits = settings.gateway
    config = uvicorn.Config(
        gateway,
        http=LimitedProtocol.limited(limits.head_timeout_s, limits.max_header_bytes),
        ws="none",
        loop="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(limits.idle_timeout_s),
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    server = _Server(config, gateway)
    sockets = [socket.socket(fileno=number) for number in settings.listen_fds]
    uvloop.run(_serve(server, gateway, keys, sockets))
    return 0


async def _serve(
    server: uvicorn.Server, gateway: Gateway, keys: ApiKeys, sockets: list[socket.socket]
) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, keys.reload)
    loop.add_signal_handler(signal.SIGUSR1, gateway.refuse)  # the supervisor's, when a stop begins
    await server.serve(sockets)


def _allow_many_connections() -> None:
    """A connection is a file; the soft limit is for programs that use select()."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 1 << 20, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
