"""``make loadtest``: Locust's web UI with the endpoints to choose from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from flightline.client import wire
from flightline.client.errors import ClientError
from flightline.client.sync import Client
from flightline.loadtest.trial import LOCUSTFILE


def main(arguments: list[str]) -> int:
    """Runs Locust until it ends; ``arguments`` are further options of its.

    Environment: URL or GRPC_PORT, LOCUST_PORT, CONCURRENCY, and what the locustfile's options name.

    Returns 1 with one line if there is no server to load.
    """
    url = os.environ.get("URL") or wire.default_url()
    port = os.environ.get("LOCUST_PORT") or "8089"
    try:
        for endpoint in wire.ENDPOINTS:
            with Client(url, endpoint) as client:
                client.check_ready()
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    users = os.environ.get("CONCURRENCY") or "16"
    print(f"open http://127.0.0.1:{port} to load {url}; Ctrl-C stops", flush=True)
    options = {
        "-f": LOCUSTFILE,
        "-H": url,
        "-u": users,
        "-r": users,
        "--web-host": "127.0.0.1",
        "--web-port": port,
    }
    command = [sys.executable, "-m", "flightline.loadtest.locust_main", "--class-picker"]
    command += [str(part) for option in options.items() for part in option]
    # A child and not exec: gRPC's threads of the check above do not survive an exec quietly.
    locust = subprocess.Popen([*command, *arguments])
    signal.signal(signal.SIGTERM, lambda *_: locust.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to Locust too, which ends by it
    return locust.wait()
