"""``make loadtest``: Locust's web UI with the endpoints to choose from."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

from flightline.client import wire
from flightline.client.errors import ClientError
from flightline.client.sync import Client
from flightline.loadtest.options import UiOptions
from flightline.loadtest.trial import LOCUSTFILE, OPENAI_USER, USER_CLASSES
from flightline.settings import add_flags, read


def main(arguments: list[str]) -> int:
    """Runs Locust until it ends. Returns 1 with one line if there is no server to load."""
    parser = argparse.ArgumentParser(prog="flightline loadtest ui", description=UiOptions.__doc__)
    add_flags(parser, UiOptions)
    given, further = parser.parse_known_args(arguments)
    settings = read(UiOptions, vars(given))
    url, port, users = settings.url or wire.default_url(), settings.locust_port, settings.concurrency
    try:
        endpoints = ready(url)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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
    command += [*(USER_CLASSES[endpoint] for endpoint in endpoints), OPENAI_USER]
    # A child and not exec: gRPC's threads of the check above do not survive an exec quietly.
    locust = subprocess.Popen([*command, *further])
    signal.signal(signal.SIGTERM, lambda *_: locust.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to Locust too, which ends by it
    return locust.wait()


def ready(url: str) -> list[str]:
    """The endpoints that a server has: one may run without ``hf_baseline``, or with NVIDIA's models of another kind.

    Raises:
        ClientError: it has none, or nobody answers.
    """
    found = []
    for endpoint in wire.ENDPOINTS:
        try:
            with Client(url, endpoint) as client:
                client.check_ready()
            found.append(endpoint)
        except ClientError as error:
            missing = error
    if not found:
        raise missing
    return found
