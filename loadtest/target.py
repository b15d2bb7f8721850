"""The server under test: one that runs, or the one that was built, started for the run and stopped after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flightline.client import wire
from flightline.loadtest import conditions


class TargetError(Exception):
    """There is no server to load; one line that says why."""


@dataclass(frozen=True)
class Target:
    """Where it is and what it serves."""

    url: str
    pids: Callable[[], list[int]]
    """Roots of its process trees now; none if it was started elsewhere."""
    deployment: dict
    """What it serves; empty if it was started elsewhere."""
    metrics_url: str = ""


@contextmanager
def target(
    url: str, build_dir: str, say: Callable[[str], None], *, baseline: bool = True
) -> Iterator[Target]:
    """The server at ``url``, or if that is empty the one of the build folder.

    Args:
        baseline: A server that is started here also loads ``hf_baseline``.
    """
    if url:
        yield Target(url, lambda: [], {})
        return
    # Only here: to measure a server that runs elsewhere, this machine needs no Triton.
    from flightline.supervisor.serve import ServeError, Server, ServeSettings, running

    folder = Path(build_dir)
    deployed = conditions.deployment(folder)
    if not deployed:
        raise TargetError(f"nothing is built in {folder}: run 'make build-engines' first")
    say("starting {model}, backend {lane}, precision {precision}".format(**deployed))
    settings = dataclasses.replace(ServeSettings.from_environment(), build_dir=folder, baseline=baseline)
    if running(settings) is not None:
        raise TargetError(
            f"a server already runs from {folder}: give its address to load it (--url {wire.default_url()}; "
            "URL=... with make), or stop it to have one started for the run"
        )
    server = Server(settings, say)
    try:
        server.start()
    except ServeError as error:
        raise TargetError(str(error)) from None
    metrics_url = f"http://{settings.host}:{settings.metrics_port}/metrics"
    try:
        yield Target(
            settings.grpc_url, lambda: [*server.engine_pids, server.triton_pid], deployed, metrics_url
        )
    finally:
        server.stop()
