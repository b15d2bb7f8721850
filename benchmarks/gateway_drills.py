"""What clients of the gateway get when a process behind or under them is killed, and how soon it is over.

``python3 benchmarks/gateway_drills.py [--build-dir DIR] [--streams 64] [--out FILE.md]``

Kills one of two gateway processes, Triton, and the engine, each under so many streams of known answers at
``/v1/completions``. A table row says how the streams ended: whole (the known text and ``[DONE]``), told (an event with
an error, then ``[DONE]``) or cut (the connection broke), after how many seconds right answers came again, and what was
left: KV blocks in use, requests that a gateway still counts, and, after a stop, processes and files. Ends with status 1
if a stream hung, changed, or was cut, if right answers took more than 10 s, or if something was left. Needs a build,
and a machine without other servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from under_test import PROMPTS, StartFailed, UnderTest

SHORT = 8
LIMIT_S = 10.0
"""Until right answers come again."""
PATIENCE_S = 120.0
PROCESSES = "2"
RIGHT_IN_A_ROW = 6
"""So many right answers over connections of their own: each gateway process has given some."""
FAULTS = ("kill -9 one of two gateway processes", "kill -9 Triton", "kill -9 engine")


@dataclass
class Stream:
    """One request and how it ended."""

    prompt: str
    began: asyncio.Event = field(default_factory=asyncio.Event)
    text: str = ""
    end: str = "HUNG"


@dataclass
class Row:
    fault: str
    ends: Counter[str]
    right_after_s: float | None
    left: list[str]

    @property
    def failed(self) -> bool:
        late = self.right_after_s is None or self.right_after_s > LIMIT_S
        return bool({"HUNG", "CHANGED", "cut"} & set(self.ends)) or late or bool(self.left)

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        after = "never" if self.right_after_s is None else f"{self.right_after_s:.1f}"
        verdict = "FAIL" if self.failed else "pass"
        return f"| {self.fault} | {ends} | {after} | {', '.join(self.left) or 'nothing'} | {verdict} |"


class Clients:
    """Users of one server's ``/v1/completions``."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._session = session

    async def read(self, stream: Stream, tokens: int) -> None:
        """Asks, and notes how the stream ended."""
        body = {
            "prompt": stream.prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        told = False
        try:
            async with asyncio.timeout(PATIENCE_S), self._session.post(self._url, json=body) as answer:
                if answer.status != 200:
                    stream.end = "told"
                    return
                async for line in answer.content:
                    if line.startswith(b"data: [DONE]"):
                        stream.end = "told" if told else "whole"
                        return
                    if line.startswith(b"data: "):
                        event: dict[str, Any] = json.loads(line[6:])
                        told = told or "error" in event
                        stream.text += event["choices"][0]["text"] if event.get("choices") else ""
                        stream.began.set()
                stream.end = "cut"
        except aiohttp.ClientError:
            stream.end = "cut"
        except TimeoutError:
            stream.end = "HUNG"
        finally:
            stream.began.set()

    async def ask(self, prompt: str, tokens: int) -> str:
        """The text of one whole answer; "" for none."""
        stream = Stream(prompt)
        await self.read(stream, tokens)
        return stream.text if stream.end == "whole" else ""

    async def until_right(self, short: str) -> float | None:
        """Seconds until several answers in a row are right; None if they never are."""
        begun, right = time.monotonic(), 0
        first = 0.0
        while time.monotonic() - begun < PATIENCE_S:
            if await self.ask(PROMPTS[0], SHORT) == short:
                first = first if right else time.monotonic() - begun
                right += 1
                if right == RIGHT_IN_A_ROW:
                    return first
            else:
                right = 0
                await asyncio.sleep(0.1)
        return None


def hit(server: UnderTest, fault: str) -> None:
    """Kills what the fault names."""
    name = "gateway 0" if "gateway" in fault else "triton" if "Triton" in fault else "engine"
    process = server.processes()[name]
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process], timeout=5)


async def left_in(server: UnderTest) -> list[str]:
    """What still runs for nobody, once it has had LIMIT_S to end."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        blocks, counted = server.kv_blocks_used(), requests_in_flight(server)
        left = [f"{blocks} KV blocks"] if blocks else []
        left += [f"{counted} requests in flight"] if counted else []
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)


def requests_in_flight(server: UnderTest) -> int:
    """Of all gateway processes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http}/metrics", timeout=5) as page:
        found = re.findall(r"^flightline_gateway_requests_in_flight\S* (\S+)", page.read().decode(), re.M)
    return int(sum(map(float, found)))


async def drill(server: UnderTest, fault: str, streams: int, tokens: int) -> Row:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        clients = Clients(server.http, session)
        known = {prompt: await clients.ask(prompt, tokens) for prompt in PROMPTS}
        short = await clients.ask(PROMPTS[0], SHORT)
        running = [Stream(PROMPTS[number % len(PROMPTS)]) for number in range(streams)]
        tasks = [asyncio.create_task(clients.read(stream, tokens)) for stream in running]
        await asyncio.gather(*(stream.began.wait() for stream in running))
        await asyncio.to_thread(hit, server, fault)
        right = await clients.until_right(short)
        await asyncio.gather(*tasks)
        left = await left_in(server)
    for stream in running:
        if stream.end == "whole" and stream.text != known[stream.prompt]:
            stream.end = "CHANGED"
    server.processes()  # whose names it learns
    server.stop()
    return Row(fault, Counter(stream.end for stream in running), right, left + server.left_behind())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100, help="of each stream (%(default)s)")
    parser.add_argument("--only", default="", help="a word of the names of the faults to do")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    lines = [
        f"| fault | {options.streams} streams in flight | right answers after, s (at most {LIMIT_S:g}) | left | |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    rows: list[Row] = []
    for fault in FAULTS:
        if options.only not in fault:
            continue
        server = UnderTest(options.build_dir, GATEWAY_PROCESSES=PROCESSES)
        try:
            server.start()
            rows.append(asyncio.run(drill(server, fault, options.streams, options.tokens)))
        except StartFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            server.end()
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join([*lines, *map(str, rows)]) + "\n", encoding="utf-8")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
