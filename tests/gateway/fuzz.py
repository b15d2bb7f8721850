"""Requests that nobody should send, from a seed: ``python -m tests.gateway.fuzz --requests 10000 --idle 2000``.

Each must be answered, or its connection ended where it broke HTTP or went away itself; no answer may be a 500, and the
process must live and keep its memory. Beside so many idle connections, half of which have never sent anything and half
of which have had an answer. In front of a server that generates nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import resource
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from flightline.gateway.alone import alone
from flightline.gateway.settings import GatewaySettings, Upstream
from flightline.loadtest.null_server import NullServer, Timing
from tests.tiny import byte_level_tokenizer, save_tokenizer

AT_ONCE = 32
FLOOD = 1024
"""Chunks of 64 KiB without a length."""
PATIENCE_S = 60.0
LIMITS = GatewaySettings(head_timeout_s=2.0, body_timeout_s=4.0, max_body_bytes=1 << 20)
"""A flood must be able to end within the time of a body: who still writes when that is over may not see the answer."""
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "hello",
        "max_tokens": 2,
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
        "seed": 1,
    },
    "/v1/chat/completions": {
        **CHAT,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}},
        },
        "stream_options": {"include_usage": True},
        "stream": True,
    },
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]},
    "/tokenize": {"prompt": "hello", "add_special_tokens": True},
    "/detokenize": {"tokens": [5, 6, 7]},
}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63), 1e308, "", " ", "\0", "🙂" * 50, "a" * 5000),
    *(
        [],
        {},
        [[]],
        [None],
        [1, "a"],
        {"a": {"b": []}},
        {"": ""},
        [[[[[[]]]]]],
        ["x"] * 2000,
        {"type": "function"},
    ),
    *({"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, "(a+)+$", "auto", "required"),
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Some parts replaced, removed or added."""
    made = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        found = list(places(made))
        if not found or rng.random() < 0.2:
            made[
                rng.choice(["n", "stop", "tool_choice", "guided_json", "logprobs", "é", "structured_outputs"])
            ] = copy.deepcopy(rng.choice(ODD))
            continue
        *path, last = rng.choice(found)
        parent = made
        for key in path:
            parent = parent[key]
        if rng.random() < 0.2 and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = copy.deepcopy(rng.choice(ODD))
    return made


def http_request(path: str, data: bytes, method: str = "POST", headers: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def one(rng: random.Random) -> tuple[str, bytes, bool]:
    """(kind, bytes, whether it must be answered)."""
    path = rng.choice(list(GOOD))
    data = json.dumps(mutated(rng, GOOD[path])).encode()
    kind = rng.choices(
        [
            "mutated",
            "broken",
            "deep",
            "huge",
            "chunked",
            "bytes",
            "path",
            "head",
            "half",
            "vanishes",
            "pipeline",
            "flood",
        ],
        [60, 10, 3, 1, 5, 3, 5, 4, 1, 4, 4, 0.1],
    )[0]
    if kind == "mutated":
        return kind, http_request(path, data), True
    if kind == "broken":
        at = rng.randrange(len(data))
        return (
            kind,
            http_request(path, data[:at] + bytes(rng.randbytes(rng.randint(0, 4))) + data[at + 1 :]),
            True,
        )
    if kind == "deep":
        depth = rng.choice([100, 900, 1100, 100_000])
        left, right = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        return kind, http_request(path, b'{"messages": ' + left * depth + b"1" + right * depth + b"}"), True
    if kind == "huge":
        return (
            kind,
            http_request(path, b'{"prompt": "' + b"a" * rng.choice([900_000, 3_000_000]) + b'"}'),
            True,
        )
    if kind == "chunked":
        size = rng.randint(1, 50)
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        body = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
        return kind, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body, True
    if kind == "bytes":
        return kind, rng.randbytes(rng.randint(1, 2000)) + b"\r\n\r\n", False
    if kind == "path":
        odd = rng.choice(
            [
                "/v1/models/%00",
                "/v2/%2e%2e/x",
                "/v2/models/a/generate",
                "//",
                "/v1/%F0",
                "/?" + "a" * 999,
                "*",
            ]
        )
        return (
            kind,
            http_request(odd, data, rng.choice(["POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS"])),
            False,
        )
    if kind == "head":
        odd = rng.choice(
            [
                "X: " + "a" * 40_000,
                "Content-Encoding: gzip",
                "Expect: 100-continue",
                "Authorization: x",
                "A:\x01",
            ]
        )
        return kind, http_request(path, data, headers=odd + "\r\n"), False
    if kind == "pipeline":
        good = http_request("/v1/models", b"", "GET").replace(b"Connection: close\r\n", b"")
        return kind, good * rng.randint(1, 5) + http_request(path, data), True
    if kind == "flood":
        chunk = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        return (
            kind,
            head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * FLOOD + b"0\r\n\r\n",
            True,
        )
    whole = http_request(path, data)
    return kind, whole[: rng.randrange(len(whole))], False  # half: waits; vanishes: goes away


async def send(port: int, kind: str, data: bytes, answered: bool) -> list[int]:
    """The statuses that come back.

    Raises:
        AssertionError: none came.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if kind == "vanishes":
            return []
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read(-1)
    except (ConnectionResetError, BrokenPipeError):
        answer = b""
    finally:
        writer.close()
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses or not answered, (kind, data[:300])
    assert not [status for status in statuses if status == 500 or not 100 <= status < 600], (
        statuses,
        data[:600],
    )
    return statuses


async def run(port: int, requests: int, seed: int) -> Counter[str]:
    """How often each kind got each status."""
    rng, counts, turn = random.Random(seed), Counter[str](), asyncio.Semaphore(AT_ONCE)

    async def each(kind: str, data: bytes, answered: bool) -> None:
        async with turn:
            for status in await send(port, kind, data, answered) or ["none"]:
                counts[f"{kind} {status}"] += 1

    made = [one(rng) for _ in range(min(requests, 500))]
    for begin in range(0, requests, 500):
        await asyncio.gather(*(each(*request) for request in made))
        made = [one(rng) for _ in range(min(500, max(0, requests - begin - 500)))]
    return counts


@asynccontextmanager
async def idle(port: int, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """So many connections that say nothing (more), one half after an answer."""
    made = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    try:
        for reader, writer in made[::2]:
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        yield [reader for reader, _ in made]
    finally:
        for _, writer in made:
            writer.close()


async def run_beside(port: int, requests: int, seed: int, idlers: int) -> Counter[str]:
    """As ``run``; those that have had an answer stay, those that have not are dropped."""
    async with idle(port, idlers) as readers:
        counts = await run(port, requests, seed)
        async with asyncio.timeout(PATIENCE_S):
            assert [await reader.read() for reader in readers[1::2]] == [b""] * len(readers[1::2])
        counts["idle dropped"] = sum(reader.at_eof() for reader in readers)
        counts["idle open"] = idlers - counts["idle dropped"]
        return counts


def fuzz(requests: int, seed: int, idlers: int) -> tuple[Counter[str], int]:
    """(what was answered, MiB that the gateway has grown by after the first twentieth)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file
    with tempfile.TemporaryDirectory() as folder, NullServer(Timing(ttft_s=0.0, tpot_s=0.0)) as triton:
        save_tokenizer(byte_level_tokenizer(), Path(folder))
        upstream = Upstream(triton.url, tokenizer_dir=folder, model="tiny", max_seq_len=4096)
        with alone(upstream, LIMITS) as gateway:
            process = psutil.Process(gateway.process.pid)
            counts = asyncio.run(run(gateway.port, requests // 20, seed))
            before = process.memory_info().rss
            counts += asyncio.run(run_beside(gateway.port, requests - requests // 20, seed + 1, idlers))
            assert gateway.process.poll() is None
            (fine,) = asyncio.run(
                send(
                    gateway.port,
                    "good",
                    http_request("/v1/chat/completions", json.dumps(CHAT).encode()),
                    True,
                )
            )
            assert fine == 200
            return counts, (process.memory_info().rss - before) >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--idle", type=int, default=2000, help="connections that do nothing meanwhile")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    counts, grown = fuzz(args.requests, args.seed, args.idle)
    for name, count in sorted(counts.items()):
        print(f"{count:7d} {name}")
    print(f"the gateway lives, and has grown by {grown} MiB")


if __name__ == "__main__":
    main()
