"""The gateway alone, in front of a server that generates nothing: CPU of a streamed token, time added to the first.

``python3 benchmarks/gateway.py TOKENIZER_DIR [--streams 64] [--seconds 20] [--tpot-ms 20] [--kind chat]``

TOKENIZER_DIR is a checkpoint's folder (tokenizer, chat template). One gateway process, ``loadtest/null_server.py`` as
Triton, and a raw HTTP client in this process. CPU is what the system charged to the gateway process between the
first token of the last stream and the end; the time added is the difference of the medians of first tokens over HTTP
and over gRPC, one request at a time, in turns. Wants an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path

import grpc
import psutil
import uvloop
from tritonclient.grpc import service_pb2

from flightline.client import wire
from flightline.client.params import GenerateParams
from flightline.gateway.alone import Alone, alone
from flightline.gateway.settings import Upstream
from flightline.loadtest.null_server import NullServer, Timing

CONTEXT = 1 << 20
PROMPT = "word " * 100
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    "completions": ("/v1/completions", {"prompt": PROMPT}),
}


class Stream:
    """One streaming request over a socket, counted by its events."""

    def __init__(self, port: int, kind: str, max_tokens: int) -> None:
        path, body = BODIES[kind]
        data = json.dumps({**body, "max_tokens": max_tokens, "stream": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._request = head.encode() + data
        self._port = port
        self.events = 0
        self.first_s = 0.0

    async def run(self) -> None:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        try:
            while data := await reader.read(1 << 16):
                self.events += data.count(b'"content":" word') + data.count(b'"text":" word')
                if self.events and not self.first_s:
                    self.first_s = time.perf_counter() - began
                if b"[DONE]" in data:
                    return
        finally:
            writer.close()
        raise RuntimeError("the stream ended early")


async def cpu_of_a_token(gateway: Alone, kind: str, streams: int, tokens: int) -> tuple[float, float]:
    """(CPU-µs, tokens/s)."""
    process = psutil.Process(gateway.process.pid)
    running = [Stream(gateway.port, kind, tokens) for _ in range(streams)]
    tasks = [asyncio.create_task(stream.run()) for stream in running]
    while not all(stream.first_s for stream in running):
        await asyncio.sleep(0.05)

    def state() -> tuple[float, float, int]:
        times = process.cpu_times()
        return time.perf_counter(), times.user + times.system, sum(stream.events for stream in running)

    before = state()
    await asyncio.gather(*tasks)
    after = state()
    seconds, cpu, events = (b - a for a, b in zip(before, after, strict=True))
    return cpu / events * 1e6, events / seconds


async def first_token_over_grpc(url: str) -> float:
    """Seconds."""
    request = wire.infer_request("text_generation", "", PROMPT, GenerateParams(max_tokens=2), stream=True)
    async with grpc.aio.insecure_channel(url) as channel:
        await channel.channel_ready()
        call = channel.unary_stream(
            wire.STREAM_INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        began = time.perf_counter()
        answers = call(request)
        await answers.read()
        took = time.perf_counter() - began
        while await answers.read() is not grpc.aio.EOF:
            pass
    return took


async def added_to_the_first(gateway: Alone, url: str, kind: str, rounds: int) -> float:
    """Milliseconds, between medians of requests in turns."""
    direct, through = [], []
    for _ in range(rounds):
        direct.append(await first_token_over_grpc(url))
        stream = Stream(gateway.port, kind, 2)
        await stream.run()
        through.append(stream.first_s)
    return (statistics.median(through) - statistics.median(direct)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer_dir", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tpot-ms", type=float, default=20.0)
    parser.add_argument("--kind", choices=BODIES, default="chat")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    tokens = int(args.seconds * 1e3 / args.tpot_ms)
    timing = Timing(ttft_s=0.010, tpot_s=args.tpot_ms / 1e3)
    with NullServer(timing) as server:
        upstream = Upstream(
            server.url, tokenizer_dir=str(args.tokenizer_dir), model="null", max_seq_len=CONTEXT
        )
        with alone(upstream) as gateway:
            added = uvloop.run(added_to_the_first(gateway, server.url, args.kind, args.rounds))
            cpu, rate = uvloop.run(cpu_of_a_token(gateway, args.kind, args.streams, tokens))
            memory = psutil.Process(gateway.process.pid).memory_info().rss >> 20
    print(f"{args.kind}, {args.streams} streams, {rate:.0f} tokens/s: {cpu:.0f} CPU-us a token; {memory} MiB")
    print(f"added to the first token, one request at a time: {added:.2f} ms")


if __name__ == "__main__":
    main()
