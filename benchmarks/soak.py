"""Do bad requests harm good ones? Thirty-two good streams with known answers beside a client that sends nothing good.

``python3 benchmarks/soak.py [--minutes 20] [--streams 32] [--build-dir DIR] [--only NAME] [--out FILE.md]``

First the good streams alone (a tenth of the time), then with every bad request in a loop, through both endpoints, over
gRPC and HTTP. Ends with a line for each criterion, ``PASS`` or ``FAIL``, and with status 1 if one fails: no good
request lost, changed or refused; the worst gap between two messages of a good stream at most 3 times the quiet one; the
memory of every process flat after the first quarter (5 of 20 minutes); all KV blocks back; nothing restarted. Bodies
that end Triton 2.51 itself (``--deadly``) are left out: nothing behind its HTTP port can help (SECURITY.md).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))

from under_test import ENDPOINTS, PROMPTS, StartFailed, UnderTest, ask, known_answers

TOKENS = 64
SAMPLE_S = 5.0
GAP_RATIO, GROWTH = 3.0, 1.1
LITTLE_MIB = 16.0
"""Growth that is none: of an allocator, in a small process."""
BAD_TIMEOUT_S = 120.0
MOST_BODY = 8 << 20
"""Of HTTP: Triton keeps a JSON body on a stack, about twice."""
LOWEST_PRIORITY = 19
BACK_S = 10.0
"""So long after the last request KV blocks must be back."""


class Good:
    """Streams that begin again and again, each checked against its known answer."""

    def __init__(self, url: str, known: dict[str, str], streams: int) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.worst = (0.0, 0.0)
        """The longest gap's begin and end."""
        self._url, self._known = url, known
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(streams)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._stopped.is_set():
            stream = ask(
                self._url, ENDPOINTS[number % 2], PROMPTS[number // 2 % len(PROMPTS)], TOKENS, BAD_TIMEOUT_S
            )
            if stream.error:
                outcome = "refused" if "queue is full" in stream.error else "lost"
            else:
                outcome = "right" if stream.text == self._known[stream.prompt] else "changed"
            with self._lock:
                self.counts[outcome] += 1
                self.worst = max(
                    [self.worst, *itertools.pairwise(stream.times)], key=lambda gap: gap[1] - gap[0]
                )
                if outcome != "right":
                    self.errors.append(f"{stream.endpoint}: {outcome}: {stream.error or stream.text!r}"[:200])

    @property
    def worst_gap_s(self) -> float:
        return self.worst[1] - self.worst[0]

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def bad_inputs() -> dict[str, dict[str, object]]:
    """Name -> changes to a good request; bytes are sent as the raw content of the tensor."""
    return {
        "bad word of a control character": {"bad_words": ["\x04"]},
        "empty words": {"bad_words": ["", " "], "stop_words": ["", " "]},
        "1,000 nested [ as stop word": {"stop_words": ["[" * 1000]},
        "1,000 nested [ as bad word": {"bad_words": ["[" * 1000]},
        "raw content ff ff ff ff": {"text_input": b"\xff\xff\xff\xff"},
        "1,000 stop words": {"stop_words": [f"word {number}" for number in range(1_000)]},
        "200,000 stop words": {"stop_words": [f"word {number}" for number in range(200_000)]},
        "a stop word of 0.2 MB": {"stop_words": ["x" * 200_000]},
        "20,000 bad words": {"bad_words": [f"bad{number}" for number in range(20_000)]},
        "repetition penalty of a long prompt": {"text_input": ["dog " * 1_500], "repetition_penalty": [1.3]},
        "prompt of 4 MB": {"text_input": ["a dog " * 700_000]},
        "prompt of 32 MB": {"text_input": ["a dog " * 5_600_000]},
        "temperature of 1e-6": {"temperature": [1e-6], "top_k": [50]},
        "stop word inside a token": {"stop_words": ["e"], "return_log_probs": [True]},
        "max_tokens of 2 billion": {"max_tokens": [2_000_000_000]},
        "prompt that is not UTF-8": {"text_input": b"\x02\x00\x00\x00\xff\xfe"},
    }


WIRE = {"max_tokens": "INT32", "top_k": "INT32", "temperature": "FP32", "repetition_penalty": "FP32"}
WIRE |= {"text_input": "BYTES", "stop_words": "BYTES", "bad_words": "BYTES", "return_log_probs": "BOOL"}


def over_grpc(url: str, endpoint: str, changes: dict[str, object]) -> str:
    """What came back, in a word."""
    import numpy as np
    from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

    request = service_pb2.ModelInferRequest(model_name=endpoint)
    for name, value in {"text_input": ["The dog"], "max_tokens": [8], **changes}.items():
        kind = WIRE[name]
        count = 1 if isinstance(value, bytes) else len(value)  # type: ignore[arg-type]
        request.inputs.add(name=name, datatype=kind, shape=[1, count])
        if isinstance(value, bytes):
            raw = value
        elif kind == "BYTES":
            words = [word.encode() for word in value]  # type: ignore[attr-defined]
            raw = serialize_byte_tensor(np.array(words, dtype=np.object_)).item()
        else:
            raw = np.array(value, dtype=triton_to_np_dtype(kind)).tobytes()
        request.raw_input_contents.append(raw)
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(url, options=unlimited) as channel:
        service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            answers = list(service.ModelStreamInfer(iter([request]), timeout=BAD_TIMEOUT_S))
        except grpc.RpcError as error:
            return error.code().name
    return "refused" if any(answer.error_message for answer in answers) else "answered"


def over_http(url: str, endpoint: str, body: bytes, headers: dict[str, str]) -> str:
    request = urllib.request.Request(f"{url}/v2/models/{endpoint}/generate", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=BAD_TIMEOUT_S) as response:
            return "refused" if "error" in json.load(response) else "answered"
    except urllib.error.HTTPError as error:
        return "refused" if error.code < 500 else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return type(error).__name__


def bad_requests(url: str, http_port: int, deadly: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, what sends it), all of them once, each through both endpoints and over both protocols where it fits."""
    http = f"http://127.0.0.1:{http_port}"
    for endpoint in ENDPOINTS:
        for name, changes in bad_inputs().items():
            yield (
                f"gRPC {name}",
                lambda endpoint=endpoint, changes=changes: over_grpc(url, endpoint, changes),
            )
            if any(isinstance(value, bytes) for value in changes.values()):
                continue  # JSON cannot say that
            values = {
                key: value if key.endswith("_words") else value[0]  # type: ignore[index]
                for key, value in {"text_input": ["The dog"], "max_tokens": [8], **changes}.items()
            }
            body = json.dumps(values).encode()
            if len(body) < MOST_BODY or deadly:
                yield f"HTTP {name}", lambda endpoint=endpoint, body=body: over_http(http, endpoint, body, {})
        for name, (body, headers) in bad_bodies(deadly).items():
            yield (
                f"HTTP {name}",
                lambda endpoint=endpoint, body=body, headers=headers: over_http(
                    http, endpoint, body, headers
                ),
            )


@functools.cache
def bad_bodies(deadly: bool) -> dict[str, tuple[bytes, dict[str, str]]]:
    """Name -> what only HTTP can say, and its headers."""
    bodies = {"max_tokens that wraps": (b'{"text_input": "The dog", "max_tokens": 4294967298}', {})}
    bodies["50,000 nested ["] = b'{"max_tokens": 1, "text_input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", {}
    if deadly:
        nested = b'{"max_tokens": 1, "text_input": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}"
        bomb = gzip.compress(b'{"text_input": "' + b"a" * (800 << 20) + b'", "max_tokens": 1}')
        bodies["2,000,000 nested ["] = nested, {}
        bodies["gzip body of 800 MB"] = bomb, {"Content-Encoding": "gzip"}
    return bodies


@dataclass(frozen=True)
class Sent:
    """A bad request; begin and end on the monotonic clock, which all processes share."""

    name: str
    answer: str
    begin: float
    end: float


def send_bad(url: str, http_port: int, deadly: bool, only: str, seconds: float) -> list[Sent]:
    """Every bad request in a loop, from a process of its own with the lowest priority: a real one runs on a machine of
    its own, and what it costs to make these requests (0.4 s of a core for 32 MB) is not the server's doing.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as bad_client:
        return bad_client.submit(_send_bad, url, http_port, deadly, only, seconds).result()


def _send_bad(url: str, http_port: int, deadly: bool, only: str, seconds: float) -> list[Sent]:
    os.nice(LOWEST_PRIORITY)
    sent: list[Sent] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, send in bad_requests(url, http_port, deadly):
            if only not in name:
                continue
            begin = time.monotonic()
            sent.append(Sent(name, send(), begin, time.monotonic()))
            if time.monotonic() >= end:
                break
    return sent


class Memory:
    """Resident MiB of each process, now and then."""

    def __init__(self, server: UnderTest) -> None:
        self.samples: list[dict[str, float]] = []
        self._server = server
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            processes = self._server.processes().items()
            self.samples.append({name: process.memory_info().rss / 2**20 for name, process in processes})

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def table(self) -> tuple[list[str], list[str]]:
        """Rows with medians of the second and the last quarter; and what grew from the one to the other."""
        samples = self.samples or [{}]
        quarter = max(1, len(samples) // 4)
        rows, grown = (
            [
                "| process | first MiB | second quarter | last quarter | most | each tenth |",
                "|---|---|---|---|---|---|",
            ],
            [],
        )
        for name in sorted(set().union(*samples)):
            first, settled, last = (
                statistics.median([sample[name] for sample in part if name in sample] or [0.0])
                for part in (samples[:1], samples[quarter : 2 * quarter] or samples, samples[-quarter:])
            )
            most = max(sample.get(name, 0.0) for sample in samples)
            tenth = max(1, len(samples) // 10)
            curve = [
                f"{statistics.median([sample.get(name, 0.0) for sample in samples[start : start + tenth]]):.0f}"
                for start in range(0, len(samples), tenth)
            ]
            rows.append(
                f"| {name} | {first:.0f} | {settled:.0f} | {last:.0f} | {most:.0f} | {' '.join(curve)} |"
            )
            if last > max(GROWTH * settled, settled + LITTLE_MIB):
                grown.append(f"{name} from {settled:.0f} to {last:.0f} MiB")
        return rows, grown


@dataclass(frozen=True)
class Verdict:
    """One criterion."""

    holds: bool
    what: str

    def __str__(self) -> str:
        return f"{'PASS' if self.holds else 'FAIL'}  {self.what}"


def verdicts(
    good: Counter[str], ratio: float, grown: list[str], blocks: int | None, restarts: list[str]
) -> list[Verdict]:
    """
    Args:
        good: how many good requests ended how.
        ratio: worst gap against the quiet one.
        grown: what of whose memory grew.
        blocks: KV blocks in use; None = not told.
        restarts: what the supervisor said of them.
    """
    ends = ", ".join(f"{good[end]} {end}" for end in ("right", "lost", "changed", "refused"))
    return [
        Verdict(good.total() == good["right"] > 0, f"good requests: {ends}"),
        Verdict(
            ratio <= GAP_RATIO,
            f"worst gap of a good stream: {ratio:.1f} times the quiet one (at most {GAP_RATIO:g})",
        ),
        Verdict(not grown, f"memory: {'; '.join(grown) or 'flat'} (second quarter to the last)"),
        Verdict(blocks == 0, f"KV blocks in use at the end: {'not told' if blocks is None else blocks}"),
        Verdict(not restarts, f"restarts: {'; '.join(restarts) or 'none'}"),
    ]


def soak(server: UnderTest, options: argparse.Namespace) -> tuple[list[str], list[Verdict]]:
    """The report, and what it comes to."""
    known = known_answers(server.url, TOKENS)
    seconds = options.minutes * 60
    quiet = Good(server.url, known, options.streams)
    time.sleep(max(10.0, seconds / 10))
    quiet.stop()
    memory, good = Memory(server), Good(server.url, known, options.streams)
    sent = send_bad(server.url, server.http, options.deadly, options.only, seconds)
    good.stop()
    memory.stop()
    deadline = time.monotonic() + BACK_S
    while (blocks := server.kv_blocks_used()) != 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    ratio = good.worst_gap_s / max(quiet.worst_gap_s, 1e-9)
    rows, grown = memory.table()
    beside = [bad.name for bad in sent if bad.begin < good.worst[1] and good.worst[0] < bad.end]
    answers = Counter((bad.name, bad.answer) for bad in sent)
    restarts = [line for line in server.lines if "restarting it" in line]
    found = verdicts(good.counts, ratio, grown, blocks, restarts)
    report = [
        f"{options.streams} good streams of {TOKENS} tokens for {options.minutes:g} minutes, "
        f"{len(sent)} bad requests beside",
        "",
        f"worst gap of a good stream: {good.worst_gap_s * 1e3:.0f} ms, beside {', '.join(beside) or 'nothing'}",
        f"quiet before, with {quiet.counts['right']} right of {quiet.counts.total()}: {quiet.worst_gap_s * 1e3:.0f} ms",
        "",
        *rows,
        "",
        "| bad request | answer | times |",
        "|---|---|---|",
        *(f"| {name} | {answer} | {count} |" for (name, answer), count in sorted(answers.items())),
        "",
        *good.errors[:20],
    ]
    return report, found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--deadly", action="store_true", help="also what ends Triton's HTTP port")
    parser.add_argument("--only", default="", help="bad requests whose names hold this")
    parser.add_argument("--out", type=Path, help="write the report there, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    server = UnderTest(options.build_dir)
    try:
        server.start()
        report, found = soak(server, options)
        server.stop()
    except StartFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        server.end()
    report += ["", *map(str, found)]
    print("\n".join(report))
    if options.out:
        options.out.write_text("\n".join(report) + "\n", encoding="utf-8")
    return 0 if all(verdict.holds for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main())
