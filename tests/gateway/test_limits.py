"""What strangers may do to the port: keys, sizes, times, broken HTTP. In front of a server that generates nothing."""

from __future__ import annotations

import gzip
import http.client
import http.server
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from flightline.gateway.alone import Alone, alone
from flightline.gateway.keys import ApiKeys
from flightline.gateway.settings import GatewaySettings, ProcessSettings, SettingsError, Upstream
from flightline.loadtest.null_server import NullServer, Timing
from tests.answering import answering
from tests.client.waiting import eventually
from tests.model_repository.endpoints import PATIENCE_S
from tests.tiny import byte_level_tokenizer, save_tokenizer

KEYS = ("first-key-0123456789abcdef", "second-key-0123456789abcdef")
LIMITS: dict[str, Any] = {
    "max_body_bytes": 100_000,
    "max_header_bytes": 8192,
    "head_timeout_s": 1.0,
    "body_timeout_s": 1.0,
}


@pytest.fixture(scope="module")
def triton() -> Iterator[NullServer]:
    with NullServer(Timing(ttft_s=0.005, tpot_s=0.020)) as running:
        yield running


@pytest.fixture(scope="module")
def upstream(triton: NullServer, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_level_tokenizer(), folder)
    return Upstream(triton.url, tokenizer_dir=str(folder), model="tiny/model", max_seq_len=4096, version="1")


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# ours\n" + "\n".join(KEYS) + "\n")
    return path


@pytest.fixture(scope="module")
def gateway(upstream: Upstream, keys_file: Path) -> Iterator[Alone]:
    settings = GatewaySettings(api_keys_file=str(keys_file), cors_origins=("https://app.example",), **LIMITS)
    with alone(upstream, settings) as running:
        yield running


def ask(
    gateway: Alone, path: str, body: Any = None, method: str = "", key: str = KEYS[0], **headers: str
) -> tuple[int, dict[str, str], Any]:
    """(status, headers, JSON or bytes)."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        gateway.url + path,
        data,
        {name: value for name, value in head.items() if value},
        method=method or None,
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            status, found, content = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        status, found, content = error.code, error.headers, error.read()
    try:
        content = json.loads(content)
    except ValueError:
        pass
    return status, {name.lower(): value for name, value in found.items()}, content


def client(gateway: Alone, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0)


GOOD = {"prompt": "hello", "max_tokens": 2}


def raw(gateway: Alone, data: bytes) -> bytes:
    """What comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return answer


def test_keys(gateway: Alone) -> None:
    for key in KEYS:
        assert ask(gateway, "/v1/completions", GOOD, key=key)[0] == 200
    for path, body in (
        ("/v1/completions", GOOD),
        ("/v1/models", None),
        ("/metrics", None),
        ("/x", None),
    ):
        status, headers, content = ask(gateway, path, body, key="wrong-key")
        assert (status, headers["www-authenticate"], content["error"]["code"]) == (
            401,
            "Bearer",
            "invalid_api_key",
        )
    assert ask(gateway, "/v1/models", key="")[0] == 401
    assert [ask(gateway, path, key="wrong")[0] for path in ("/health", "/ready", "/")] == [200, 200, 200]
    assert ask(gateway, "/", key="")[1]["x-frame-options"] == "DENY"
    with (
        openai.OpenAI(base_url=gateway.url + "/v1", api_key="wrong") as llm,
        pytest.raises(openai.AuthenticationError),
    ):
        llm.models.list()


def test_keys_change_while_it_runs(gateway: Alone, keys_file: Path) -> None:
    old = keys_file.read_text()
    try:
        keys_file.write_text("another-key-0123456789abcdef")
        assert eventually(lambda: ask(gateway, "/v1/models", key="another-key-0123456789abcdef")[0] == 200)
        assert ask(gateway, "/v1/models")[0] == 401
        keys_file.write_text("")  # a mistake locks nobody out
        time.sleep(1.1)
        assert ask(gateway, "/v1/models", key="another-key-0123456789abcdef")[0] == 200
    finally:
        keys_file.write_text(old)
    assert eventually(lambda: ask(gateway, "/v1/models")[0] == 200)


@pytest.mark.parametrize(
    ("text", "problem"), [("", "holds no key"), ("short", "at least 16"), ("a b " * 9, "spaces")]
)
def test_unusable_keys(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError, match=problem):
        ApiKeys(str(path))
    with pytest.raises(SettingsError, match="cannot be read"):
        ApiKeys(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code"),
    [
        ("/v1/completions", b"{", {}, 400, None),
        ("/v1/completions", b"[]", {}, 400, None),
        ("/v1/completions", b"\xff\xfe", {}, 400, None),
        ("/v1/completions", b'{"prompt": "\\ud800"}', {}, 400, None),
        ("/v1/completions", b'{"seed": 1e400, "prompt": "a"}', {}, 400, None),
        ("/v1/completions", b"[" * 50_000, {}, 400, None),
        ("/v1/chat/completions", b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", {}, 400, None),
        ("/v1/completions", GOOD, {"Content_Type": "text/plain"}, 400, None),
        ("/v1/completions", GOOD, {"Content_Encoding": "gzip"}, 415, "unsupported_media_type"),
        ("/v1/completions", b" " * 100_001, {}, 413, "request_too_large"),
        ("/v1/completions", {"prompt": "a " * 40_000}, {}, 400, "context_length_exceeded"),
        ("/v1/completions", GOOD | {"model": "who"}, {}, 404, "model_not_found"),
        ("/v1/embeddings", GOOD, {}, 404, "not_found"),
        ("/v1/completions", None, {}, 405, "method_not_allowed"),
        ("/v1/models", GOOD, {}, 405, "method_not_allowed"),
        ("/v1/models", None, {"Authorization": "Basic abc"}, 401, "invalid_api_key"),
    ],
)
def test_refusals_have_the_envelope(
    gateway: Alone, path: str, body: Any, headers: dict, status: int, code: str | None
) -> None:
    found, answered, content = ask(gateway, path, body, **headers)
    assert (found, content["error"]["code"]) == (status, code)
    assert content["error"]["message"] and content["error"]["type"] and "param" in content["error"]
    assert answered["x-request-id"].startswith("req_")


def test_a_chunked_body_without_a_length(gateway: Alone) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=300)
    head = {
        "Authorization": f"Bearer {KEYS[0]}",
        "Content-Type": "application/json",
        "Transfer-Encoding": "chunked",
    }
    parts = iter([b'{"prompt": "a",', b'"max_tokens": 1}'])
    connection.request("POST", "/v1/completions", parts, head, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    chunks = (b"10\r\n" + b" " * 16 + b"\r\n") * 10_000
    headers = (
        f"Authorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    )
    answer = raw(gateway, f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{headers}\r\n".encode() + chunks)
    assert answer.startswith(b"HTTP/1.1 413")


def test_request_ids(gateway: Alone, triton: NullServer) -> None:
    """A client's own goes all the way; one that could break a log line does not."""
    assert ask(gateway, "/v1/completions", GOOD, x_request_id="my-id.1")[1]["x-request-id"] == "my-id.1"
    assert triton.log[-1].id == "my-id.1"
    assert ask(gateway, "/v1/completions", GOOD, x_request_id="a b")[1]["x-request-id"].startswith("req_")
    assert (
        ask(gateway, "/v1/completions", GOOD | {"request_id": "in-the-body"})[1]["x-request-id"]
        == "in-the-body"
    )
    prompts = GOOD | {"prompt": ["a", "b"], "request_id": "two"}
    assert ask(gateway, "/v1/completions", prompts)[0] == 200
    assert {served.id for served in triton.log[-2:]} == {"two-0", "two-1"}


def test_cors_is_for_those_that_are_named(gateway: Alone) -> None:
    allowed = "access-control-allow-origin"
    assert ask(gateway, "/v1/models", Origin="https://app.example")[1][allowed] == "https://app.example"
    assert allowed not in ask(gateway, "/v1/models", Origin="https://evil.example")[1]
    status, headers, _ = ask(
        gateway, "/v1/completions", method="OPTIONS", key="", Origin="https://app.example"
    )
    assert (status, headers[allowed]) == (204, "https://app.example")


def test_large_heads_and_broken_http(gateway: Alone) -> None:
    line = b"X-Long: " + b"a" * 9000 + b"\r\n"
    assert raw(gateway, b"GET /health HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n").startswith(b"HTTP/1.1 431")
    assert raw(gateway, b"GET /health HTTP/1.1\r\nHost: a\r\n" + line * 4).startswith(b"HTTP/1.1 431")
    assert raw(gateway, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n").startswith(b"HTTP/1.1 431")
    assert b'"this is not HTTP/1.1"' in raw(gateway, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
    assert raw(gateway, "GET /ü HTTP/1.1\r\nHost: a\r\n\r\n".encode()).startswith(b"HTTP/1.1 400")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    assert raw(gateway, head + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n").startswith(b"HTTP/1.1 4")
    double = b"Content-Length: 5\r\nContent-Length: 6\r\n"
    assert raw(gateway, head + double + b"\r\n{}").startswith(b"HTTP/1.1 400")


def test_slow_clients_are_left(gateway: Alone) -> None:
    """Without a head, with half of one, and with half a body; all at once, since each takes as long as its limit."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Length: 50\r\n"
    half_a_body = head.encode() + b"Content-Type: application/json\r\n\r\n{"
    with ThreadPoolExecutor() as pool:
        *silence, answer = pool.map(partial(raw, gateway), [b"", b"GET /health HT", half_a_body])
    assert silence == [b"", b""]
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


def test_hundreds_of_idle_connections_hinder_nobody(gateway: Alone) -> None:
    idle = [socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) for _ in range(300)]
    assert ask(gateway, "/v1/completions", GOOD)[0] == 200
    for connection in idle:
        assert connection.recv(1) == b""  # dropped
        connection.close()


def test_one_more_than_are_admitted(upstream: Upstream) -> None:
    with alone(upstream, GatewaySettings(max_in_flight=2)) as gateway, client(gateway) as llm:
        streams = [
            llm.completions.create(model="tiny/model", prompt="a", max_tokens=1000, stream=True)
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError) as full:
            llm.completions.create(model="tiny/model", prompt="a")
        assert full.value.response.headers["retry-after"] == "1"
        assert full.value.code == "rate_limit_exceeded"
        for stream in streams:
            stream.close()
        assert eventually(lambda: ask(gateway, "/v1/completions", GOOD)[0] == 200)


def test_a_client_that_leaves_cancels_its_calls(gateway: Alone, triton: NullServer) -> None:
    before = len(triton.log)
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key=KEYS[0], max_retries=0) as llm:
        stream = llm.completions.create(model="tiny/model", prompt=["a", "b"], max_tokens=3000, stream=True)
        next(stream)
        stream.close()
    body = json.dumps({"prompt": "a", "max_tokens": 3000})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall((head + body).encode())
        assert eventually(lambda: len(triton.log) == before + 3)
    assert eventually(lambda: [served.outcome for served in triton.log[before:]] == ["cancelled"] * 3)


def test_a_stop_ends_streams_with_words(upstream: Upstream) -> None:
    """What has not ended in time, or at a second signal, is told why; what has is whole."""
    for drain_s in (1.0, 600.0):
        with alone(upstream, drain_s=drain_s) as gateway:
            with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as llm:
                long = llm.completions.create(model="tiny/model", prompt="a", max_tokens=4000, stream=True)
                short = llm.completions.create(model="tiny/model", prompt="a", max_tokens=20, stream=True)
                next(long)
                gateway.process.terminate()
                if drain_s > 1:
                    assert [chunk.choices[0].finish_reason for chunk in short][-1] == "length"
                    gateway.process.terminate()
                with pytest.raises(openai.APIError, match="the server is stopping"):
                    list(long)
                short.close()
            gateway.process.wait(PATIENCE_S)
        assert not psutil.pid_exists(gateway.process.pid)


def test_counters_never_fall(upstream: Upstream, tmp_path: Path) -> None:
    """Over several processes, one of which ends."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def counted(gateway: Alone) -> float:
        _, _, page = ask(gateway, "/metrics")
        lines = [
            line
            for line in page.decode().splitlines()
            if line.startswith("flightline_gateway_requests_total")
        ]
        return sum(float(line.split()[-1]) for line in lines if '"/v1/completions"' in line)

    with alone(upstream, env=env) as first:
        with alone(upstream, env=env) as second:
            assert [ask(each, "/v1/completions", GOOD)[0] for each in (first, second)] == [200, 200]
            # A request is counted after its answer.
            assert eventually(lambda: counted(first) == counted(second) == 2)
        assert counted(first) == 2
        text = ask(first, "/metrics")[2].decode()
        assert "flightline_gateway_requests_in_flight 0.0" in text
        assert "flightline_gateway_generated_tokens_total 4.0" in text


def test_metrics_without_a_key(upstream: Upstream, keys_file: Path) -> None:
    """Routers send none; nothing else opens with it."""
    settings = GatewaySettings(api_keys_file=str(keys_file), metrics_without_key=True)
    with alone(upstream, settings) as running:
        assert ask(running, "/metrics", key="wrong-key")[0] == 200
        assert ask(running, "/v1/models", key="wrong-key")[0] == 401


def test_a_triton_that_is_gone(upstream: Upstream) -> None:
    with NullServer(Timing(ttft_s=0.01, tpot_s=0.02)) as triton:
        settings = Upstream(
            triton.url, tokenizer_dir=upstream.tokenizer_dir, model="tiny/model", max_seq_len=4096
        )
        with alone(settings) as gateway, client(gateway) as llm:
            stream = llm.completions.create(model="tiny/model", prompt="a", max_tokens=3000, stream=True)
            next(stream)
            triton.stop()
            with pytest.raises(openai.APIError) as cut:
                list(stream)
            assert cut.value.code == "service_unavailable"
            with pytest.raises(openai.InternalServerError) as gone:
                llm.completions.create(model="tiny/model", prompt="a", max_tokens=3)
            assert gone.value.status_code == 503
            assert (ask(gateway, "/ready")[0], ask(gateway, "/health")[0]) == (503, 200)


def test_addresses_that_strangers_reach_need_a_key() -> None:
    GatewaySettings().check_address("127.0.0.1")
    GatewaySettings(allow_no_key=True).check_address("0.0.0.0")
    GatewaySettings(api_keys_file="/k").check_address("0.0.0.0")
    with pytest.raises(SettingsError, match=r"HOST=0\.0\.0\.0 lets other machines use this server"):
        GatewaySettings().check_address("0.0.0.0")


def test_settings_survive_the_command_line() -> None:
    settings = ProcessSettings(GatewaySettings(served_names=("a", "b")), Upstream("u"), (3, 4))
    assert ProcessSettings.from_json(settings.to_json()) == settings


def test_traces_arrive(upstream: Upstream) -> None:
    """At a collector that speaks OTLP over HTTP, as children of the client's span."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

    got: list[Any] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            data = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            message = service.ExportTraceServiceRequest.FromString(data)
            got.extend(
                span for part in message.resource_spans for each in part.scope_spans for span in each.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with (
        answering(Collector) as collector,
        alone(upstream, env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector}) as gateway,
    ):
        parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
        assert ask(gateway, "/v1/completions", GOOD, traceparent=parent, x_request_id="mine")[0] == 200
    (span,) = [span for span in got if span.name == "POST /v1/completions"]
    facts = {each.key: each.value for each in span.attributes}
    assert (span.trace_id, span.parent_span_id) == (b"\xab" * 16, b"\xcd" * 8)
    assert facts["flightline.request_id"].string_value == "mine"
    assert facts["gen_ai.usage.output_tokens"].int_value == 2


def test_a_start_that_cannot_be_says_why(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% if %}")
    settings = ProcessSettings(GatewaySettings(chat_template=str(tmp_path / "broken.jinja")), upstream, ())
    done = subprocess.run(
        [sys.executable, "-m", "flightline.gateway", settings.to_json()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 1 and done.stderr.startswith("gateway: error: ") and done.stderr.count("\n") == 1
    )
