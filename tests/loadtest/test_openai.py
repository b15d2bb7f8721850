"""OpenAI servers as contestants: what is counted, and what is called INVALID."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import time

import pytest

from flightline.client.errors import ClientError
from flightline.loadtest import commands, openai_probe, plan, warmup
from flightline.loadtest.http_client import HttpAnswer
from flightline.loadtest.null_openai import Behaviour, NullOpenAi
from flightline.loadtest.null_server import NullServer, Timing
from flightline.loadtest.openai_api import (
    CHAT,
    COMPLETIONS,
    OPENAI,
    OpenAiSettings,
    OpenAiTransport,
    events,
    fill,
)
from flightline.loadtest.options import Arm, parse_arms
from flightline.loadtest.records import RequestRecord, read_records
from flightline.loadtest.transport import Load
from flightline.settings import SettingsError
from tests.client.waiting import eventually
from tests.loadtest.truth import LUCKY_S

FAST = {"ttft_s": 0.010, "tpot_s": 0.001}
TOKENS = 8


def ask(
    server: NullOpenAi,
    api: str = COMPLETIONS,
    *,
    token_ids: bool = True,
    cancel_after_s: float = 0.0,
    times: int = 1,
) -> list[RequestRecord]:
    """So many requests one after the other, as a user of the load generator sends them."""

    async def one(transport: OpenAiTransport, number: int) -> RequestRecord:
        request = transport.prepare(Load(OPENAI, f"prompt number {number}", number, TOKENS))
        record = RequestRecord(request.id, OPENAI, "", number, TOKENS, time.monotonic_ns(), time.time_ns())
        asked = asyncio.create_task(transport.exchange(request, record, 20.0))
        if cancel_after_s:
            await asyncio.sleep(cancel_after_s)
            asked.cancel()
        text = await asked
        assert text == " word" * TOKENS or record.problem or record.cancelled
        return record

    async def all_of_them() -> list[RequestRecord]:
        transport = OpenAiTransport(server.url, OpenAiSettings("null", api, token_ids))
        records = [await one(transport, number) for number in range(times)]
        await transport.close()
        return records

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("api", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("token_ids", [True, False])
def test_tokens_and_their_times_are_the_servers(api, token_ids):
    with NullOpenAi(Behaviour(0.050, 0.010, cached_tokens=5)) as server:
        (record,) = ask(server, api, token_ids=token_ids)
        (seen,) = server.log
    assert record.problem is None and record.complete
    assert record.chunk_tokens == list(range(1, TOKENS + 1)) and record.first_text_chunk == 0
    assert (record.num_output_tokens, record.num_input_tokens, record.cached_tokens) == (TOKENS, 3, 5)
    assert record.counted_tokens == (TOKENS if token_ids else None) and record.text_pieces == TOKENS
    late_s = [(mine - sent) / 1e9 for mine, sent in zip(record.chunk_ns, seen.token_times_ns, strict=True)]
    assert min(late_s) >= 0  # one clock
    assert seen.path == ("/v1/chat/completions" if api == CHAT else "/v1/completions")
    body = seen.body
    assert (body["min_tokens"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == (
        TOKENS,
        TOKENS,
        True,
        0,
    )
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert ("return_token_ids" in body) == token_ids


def test_events_of_several_tokens_are_spread_over_the_text_unless_ids_tell():
    with NullOpenAi(Behaviour(**FAST, tokens_an_event=3)) as server:
        (told,), (guessed,) = ask(server), ask(server, token_ids=False)
    assert told.chunk_tokens == guessed.chunk_tokens == [3, 6, 8]
    assert told.problem is None and guessed.problem is None


@pytest.mark.parametrize(
    ("behaviour", "token_ids", "why"),
    [
        ({"missing_tokens": 2}, True, "usage says 8 output tokens, and 6 came"),
        ({"missing_tokens": -2}, True, "usage says 8 output tokens, and 10 came"),
        ({"missing_tokens": -2}, False, "usage says 8 output tokens, and the text came in 10 pieces"),
        ({"too_much_usage": 3}, True, "11 output tokens instead of 8"),
        (
            {"usage": False},
            True,
            "the stream has no usage: the server must honour stream_options.include_usage",
        ),
        ({"done": False, "finish": False}, True, "the stream ended without [DONE] or a finish_reason"),
        ({"cut_after": 3}, True, "the connection was closed before the answer was complete"),
        ({"error_after": 3}, True, "the engine died"),
        ({"refuses": ("min_tokens",)}, True, "HTTP 400: min_tokens is not supported"),
    ],
)
def test_an_answer_that_must_not_count(behaviour, token_ids, why):
    with NullOpenAi(Behaviour(**FAST, **behaviour)) as server:
        (record,) = ask(server, token_ids=token_ids)
    assert record.problem is not None and why in record.problem


def test_the_mark_at_the_end_of_a_stream_may_be_missing_if_the_reason_is_there():
    with NullOpenAi(Behaviour(**FAST, done=False)) as server:
        (record,) = ask(server)
    assert record.problem is None and record.complete


def test_an_answer_without_a_word_is_an_answer():
    """Of a model that ended at once; where a length was asked for, it is the wrong one."""
    answer = HttpAnswer(200, {"content-type": "text/event-stream"}, [
        (5, b'data: {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}\n\n'),
    ])  # fmt: skip
    record = RequestRecord("id", OPENAI, "", 0, TOKENS, 1, 1, exact=False)
    assert fill(record, answer) == "" and record.problem is None
    assert (record.chunk_ns, record.chunk_tokens, record.ttft_s, record.done_ns) == ([5], [1], None, 5)
    exact = RequestRecord("id", OPENAI, "", 0, TOKENS, 1, 1)
    fill(exact, answer)
    assert exact.problem == "1 output tokens instead of 8"


@pytest.mark.parametrize(
    "event",
    [
        b"{", b"[]", b"5", b"null", b"\xff", b'{"choices": 3}', b'{"choices": ["x"]}', b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"text": "x", "token_ids": 3}]}', b'{"choices": [{"delta": "x"}]}', b'{"error": []}',
        b'{"usage": "much"}', b'{"usage": {"completion_tokens": "8"}}', b'{"usage": {"completion_tokens": true}}',
        b'{"usage": {"completion_tokens": 8, "prompt_tokens_details": 3}}', b'{"error": "it broke"}',
    ],
)  # fmt: skip
def test_any_event_ends_in_a_record(event):
    pieces = [
        (1, b'data: {"choices": [{"text": " word"}]}\n\n'),
        (2, b"data: " + event + b"\n\ndata: [DONE]\n\n"),
    ]
    record = RequestRecord("id", OPENAI, "", 0, 1, 1, 1)
    fill(record, HttpAnswer(200, {"content-type": "text/event-stream"}, pieces))
    assert record.problem is not None
    assert record.as_dict() and record.ttft_s == 0.0 and record.gaps_s is not None


def test_connections_are_kept_and_one_that_the_server_closed_meanwhile_is_replaced():
    with NullOpenAi(Behaviour(**FAST)) as server:
        assert [record.problem for record in ask(server, times=3)] == [None] * 3
        assert server.connections == 1
    with NullOpenAi(Behaviour(**FAST, hangs_up=True)) as server:
        assert [record.problem for record in ask(server, times=3)] == [None] * 3
        assert server.connections == 3


def test_a_request_that_is_cut_off_is_cancelled_at_the_server():
    with NullOpenAi(Behaviour(0.010, 600.0)) as server:
        (record,) = ask(server, cancel_after_s=1.0)  # after the first token, on a busy machine too
        assert record.cancelled and record.error is None and record.chunk_tokens[:1] == [1]
        assert eventually(lambda: server.log[0].outcome == "cancelled")


def test_https_is_encrypted_and_the_certificate_checked(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        *subject,
    ]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with NullOpenAi(Behaviour(**FAST), tls=tls) as server:
        (refused,) = ask(server)
        assert refused.error is not None and "certificate verify failed" in refused.error
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert [record.problem for record in ask(server, times=2)] == [None] * 2


def test_no_server_is_told():
    with NullOpenAi() as server:
        pass
    (record,) = ask(server)
    assert record.error is not None and record.error.startswith("no server at 127.0.0.1:")


def test_events_may_come_in_any_pieces():
    stream = b': hello\n\ndata: {"a": 1}\r\n\r\ndata:2\n\nevent: x\ndata: [DONE]\n\ndata: cut o'
    wanted = [b'{"a": 1}', b"2", b"[DONE]"]
    for size in (1, 7, len(stream)):
        pieces = [(at, stream[at : at + size]) for at in range(0, len(stream), size)]
        assert [data for _, data in events(pieces)] == wanted


def contestant(server: NullOpenAi, model: str = "null") -> Arm:
    return Arm("it", server.url, model)


def checked(server: NullOpenAi, said: list[str], model: str = "null") -> Arm:
    return openai_probe.check_ready(contestant(server, model), exact=True, token_ids=True, say=said.append)


def test_a_server_is_asked_beforehand_what_it_can_do():
    said: list[str] = []
    with NullOpenAi(Behaviour(**FAST)) as server:
        assert checked(server, said).token_ids and "by the ids" in said[-1]
        with pytest.raises(ClientError, match=r"no model gpt.*; its models are null"):
            checked(server, said, "gpt")
    for behaviour in ({"knows_token_ids": False}, {"refuses": ("return_token_ids",)}):
        with NullOpenAi(Behaviour(**FAST, **behaviour)) as server:
            assert not checked(server, said).token_ids and "no token ids" in said[-1]
    refusal = "min_tokens is not supported.*NATURAL_LENGTH=1"
    with (
        NullOpenAi(Behaviour(**FAST, refuses=("min_tokens",))) as server,
        pytest.raises(ClientError, match=refusal),
    ):
        checked(server, said)
    with pytest.raises(ClientError, match=r"no server at 127\.0\.0\.1:"):
        checked(server, said)


def test_warm_up_shows_the_pace_and_tells_failures():
    with NullOpenAi(Behaviour(0.050, 0.010)) as server:
        pace = warmup.warm_up(contestant(server), "prompt {}".format, 4, TOKENS)
        assert pace.first_s >= 0.050 + (TOKENS - 1) * 0.010 and len(server.log) == 4
        warmup.wait_until_idle(contestant(server))
    with (
        NullOpenAi(Behaviour(**FAST, error_after=2)) as server,
        pytest.raises(ClientError, match="the engine died"),
    ):
        warmup.warm_up(contestant(server), "prompt {}".format, 4, TOKENS)
    with (
        NullOpenAi(Behaviour(**FAST, cached_tokens=16)) as server,
        pytest.raises(SettingsError, match="SEED=2"),
    ):
        warmup.require_new_prompts(contestant(server), "prompt {}".format, 1)


def test_contestants_are_read_with_their_addresses():
    text = "base=h:1/hf_baseline, vllm=http://h:2/v1#meta/Llama-3, https://api.x.org/v1/#gpt=4"
    base, vllm, other = parse_arms(text, "")
    assert (base.url, base.endpoint, base.openai) == ("h:1", "hf_baseline", False)
    assert (vllm.label, vllm.url, vllm.endpoint, vllm.openai) == (
        "vllm",
        "http://h:2/v1",
        "meta/Llama-3",
        True,
    )
    assert other.openai and other.url == "https://api.x.org/v1"
    for bad in ("x=http://h:2/v1", "x=http://#m", "=http://h:2/v1#m", "a=http://h/v1#m, a=http://g/v1#m"):
        with pytest.raises(SettingsError, match="ARMS="):
            parse_arms(bad, "")


@pytest.mark.slow
def test_an_openai_server_and_triton_are_compared_in_one_run(tmp_path, monkeypatch):
    """The second is twice as fast; both get prompts of their own, and the key stays out of the reports."""
    monkeypatch.setattr(plan, "MIN_BLOCK_S", 1.0)
    monkeypatch.setattr(warmup, "WARMUP_S", 0.3)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with NullServer(Timing(0.100, 0.020)) as triton, NullOpenAi(Behaviour(0.050, 0.010)) as server:
        arms = f"triton={triton.url}/text_generation, null={server.url}#null"
        load = [
            "--arms",
            arms,
            "--levels",
            "4",
            "--output-tokens",
            "8",
            "--rounds",
            "1",
            "--calibrate-s",
            "0",
        ]
        commands.main("compare", [*load, "--budget-s", "9", "--reports", str(tmp_path)])
        asked = [answered.body["prompt"] for answered in server.log]
        to_triton = [request.inputs["text_input"] for request in triton.log]
        assert {answered.headers["authorization"] for answered in server.log} == {"Bearer sk-secret"}
        log = {answered.headers["x-request-id"]: answered for answered in server.log}
        cut_off = [answered for answered in server.log if answered.outcome == "cancelled"]
    latest = tmp_path / "latest"
    data = json.loads((latest / "report.json").read_text())
    assert all("load generator" in reason for reason in data["reasons"])  # the machine may be busy
    first, second = data["cells"]
    assert (first["arm"], second["arm"], second["endpoint"]) == ("triton", "null", "null")
    assert second["summary"]["failed"] == second["summary"]["wrong_length"] == 0
    ratio = next(c["ratio"] for c in data["comparisons"] if c["metric"] == "ttft_p50")
    assert 1 < ratio["value"] < 4 and ratio["n"] == 1
    records = [record for record in read_records(latest / "records.jsonl") if record.endpoint == OPENAI]
    assert {record.counted_tokens for record in records if record.complete} == {8}
    assert len(cut_off) >= 4  # the block's end
    # On one clock, what came after it was sent, and the luckiest hardly later, is what the server did.
    late_s = [
        (came - sent) / 1e9
        for record in records
        if record.complete
        for came, sent in zip(record.chunk_ns, log[record.id].token_times_ns, strict=True)
    ]
    assert 0 <= min(late_s) < LUCKY_S
    measured = [prompt for prompt in asked if len(prompt.split()) > 10]
    warm_up = 4 + 1
    assert len(set(measured)) >= len(measured) - warm_up and len(set(measured) & set(to_triton)) <= warm_up
    assert not any("sk-secret" in path.read_text() for path in latest.glob("*.*") if path.suffix != ".png")


@pytest.mark.slow
def test_a_run_on_a_server_with_a_wrong_usage_is_invalid(tmp_path):
    with NullOpenAi(Behaviour(0.050, 0.005, missing_tokens=1)) as server:
        load = [
            "--endpoint",
            f"{server.url}#null",
            "--concurrency",
            "2",
            "--seconds",
            "2",
            "--output-tokens",
            "8",
        ]
        status = commands.main("run", [*load, "--calibrate-s", "0", "--reports", str(tmp_path)])
    first = (tmp_path / "latest" / "report.md").read_text().splitlines()[0]
    assert status == 1 and first.startswith("INVALID: ") and "usage says 8 output tokens, and 7 came" in first
