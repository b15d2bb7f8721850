"""The gateway in a whole server: what breaks is started again, Triton's endpoints have limits, a stop tells why.

All of it over TLS, on both ports, with a certificate for a name that is not where the server listens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from flightline.gateway.settings import GatewaySettings
from flightline.supervisor.gateway import _certified_name
from flightline.supervisor.serve import ServeError, Server
from tests.model_repository.endpoints import PATIENCE_S, wait_until
from tests.serving import CONTEXT, WATCHFUL, settings_for
from tests.supervisor.test_faults import private_copy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key), signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=llm.example",
    ]
    command += [
        "-addext",
        "subjectAltName=DNS:llm.example,IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def trust(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate[0])


@pytest.fixture(scope="module")
def server(
    tiny_build: Path, tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]
) -> Iterator[Server]:
    """One to break."""
    build = private_copy(tiny_build, tmp_path_factory.mktemp("gateway"))
    cert, key = certificate
    patience: dict[str, Any] = {**WATCHFUL, "drain_s": 3.0}
    two = GatewaySettings(processes=2)
    settings = settings_for(build, baseline=False, tls_cert=cert, tls_key=key, gateway=two, **patience)
    with Server(settings, say=print) as running:
        yield running


@pytest.fixture
def llm(server: Server, trust: ssl.SSLContext) -> Iterator[openai.OpenAI]:
    assert server.settings.http_url.startswith("https://127.0.0.1")
    with (
        httpx2.Client(verify=trust, timeout=PATIENCE_S) as trusting,  # connecting waits for a gateway, too
        openai.OpenAI(
            base_url=server.settings.http_url + "/v1", api_key="none", max_retries=0, http_client=trusting
        ) as client,
    ):
        yield client


def long_stream(llm: openai.OpenAI) -> openai.Stream:
    name = llm.models.list().data[0].id
    ends = {"ignore_eos": True}
    return llm.completions.create(
        model=name, prompt="the dog", max_tokens=CONTEXT - 100, stream=True, extra_body=ends
    )


def status(server: Server, path: str, body: bytes | None = None) -> int:
    try:
        with opened(server, path, body) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:  # whoever would have answered has ended
        return 0


def get(server: Server, path: str) -> str:
    with opened(server, path) as answer:
        return answer.read().decode()


def opened(server: Server, path: str, body: bytes | None = None) -> Any:
    assert server.settings.tls_cert is not None
    trust = ssl.create_default_context(cafile=server.settings.tls_cert)
    request = urllib.request.Request(
        server.settings.http_url + path, body, {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=PATIENCE_S, context=trust)


def test_a_certificates_name(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    assert _certified_name(cert) == "llm.example"
    with pytest.raises(ServeError, match="is not a certificate"):
        _certified_name(key)


def test_triton_hears_only_the_gateway(server: Server) -> None:
    ours = {connection.laddr for connection in psutil.Process(server.triton_pid).net_connections("tcp")}
    http = [address for address in ours if address.port == server.settings.triton_http_port]
    assert [address.ip for address in http] == ["127.0.0.1"]
    assert server.settings.triton_http_port != server.settings.http_port


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2", 200),
        ("/v2/health/live", 200),
        ("/v2/health/ready", 200),
        ("/v2/models/text_generation", 200),
        ("/v2/models/text_generation/versions/1/ready", 200),
        ("/v2/models/text_generation/config", 200),
        ("/v2/models/nobody", 404),
        ("/v2/repository/index", 403),
        ("/v2/models/../repository/index", 403),
        ("/v2/models/%2e%2e%2frepository/index", 403),
        ("/v2/logging", 403),
        ("/v2/models/text_generation/generate", 405),
    ],
)
def test_which_of_tritons_endpoints_pass(server: Server, path: str, expected: int) -> None:
    assert status(server, path) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"text_input": "a", "max_tokens": 1}', 200),
        (b'{"text_input": "a"', 400),
        (b'{"text_input": "a", "max_tokens": 4294967298}', 400),
        (b'{"text_input": "a", "max_tokens": 1, "seed": 18446744073709551615}', 200),
        (b'{"max_tokens": 1, "text_input": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}", 400),
        (b'{"text_input": "' + b"a" * (9 << 20) + b'"}', 413),
    ],
)
def test_bodies_that_end_triton_do_not_reach_it(server: Server, body: bytes, expected: int) -> None:
    old = server.triton_pid
    assert status(server, "/v2/models/text_generation/generate", body) == expected
    assert server.triton_pid == old


def test_killed_gateways_are_started_again(server: Server, llm: openai.OpenAI) -> None:
    """Their streams are cut, the engine forgets them, and the port never closes."""
    stream, old = long_stream(llm), server.gateway_pids
    next(stream)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx2.HTTPError)):
        list(stream)
    assert llm.models.list().data  # it waits for the next ones
    wait_until(lambda: not set(server.gateway_pids) & set(old))
    wait_until(lambda: server.engine.stats.active_requests == 0)
    wait_until(lambda: server.wait_ready(0.1))
    counted = re.findall(r"^flightline_gateway_requests_in_flight\S* (\S+)", get(server, "/metrics"), re.M)
    assert list(map(float, counted)) == [0.0]  # nor do the metrics count them for ever


def test_frozen_gateways_are_started_again(server: Server, llm: openai.OpenAI) -> None:
    old = server.gateway_pids
    for pid in old:
        psutil.Process(pid).suspend()
    wait_until(lambda: not set(server.gateway_pids) & set(old))
    assert llm.models.list().data
    wait_until(lambda: server.wait_ready(0.1))


@pytest.mark.parametrize("what", ["engine", "Triton"])
def test_streams_are_told_when_something_behind_ends(server: Server, llm: openai.OpenAI, what: str) -> None:
    stream = long_stream(llm)
    next(stream)
    old = server.engine_pids[0], server.triton_pid
    os.kill(old[what == "Triton"], signal.SIGKILL)
    with pytest.raises(openai.APIError) as told:
        list(stream)
    assert told.value.code == "service_unavailable"
    wait_until(lambda: (server.engine_pids[0], server.triton_pid) != old)
    # Each gateway process finds what is back for itself, within a second; who asks lands on any of the two.
    wait_until(lambda: all(status(server, "/ready") == 200 for _ in range(12)))
    wait_until(lambda: server.wait_ready(0.1))


def test_a_stop_refuses_and_then_tells(server: Server, llm: openai.OpenAI) -> None:
    """The last test: it ends the server. Streams get ``drain_s``, new requests 503."""
    stream, name = long_stream(llm), llm.models.list().data[0].id
    next(stream)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    wait_until(lambda: server._gate is None or server._gate.closed)
    with pytest.raises(openai.InternalServerError) as refused:
        llm.completions.create(model=name, prompt="a")
    assert refused.value.status_code == 503 and "is stopping" in refused.value.message
    with pytest.raises(openai.APIError) as told:
        list(stream)
    assert told.value.code == "service_unavailable", json.dumps(told.value.body)
    stopping.join()
