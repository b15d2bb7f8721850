"""Do bad requests harm good ones? Thirty-two good streams with known answers beside a client that sends nothing good.

``python3 benchmarks/soak.py [--minutes 20] [--streams 32] [--build-dir DIR] [--out FILE.md]``

First the good streams alone (a tenth of the time), then with every bad request in a loop, through both doors, over gRPC
and HTTP. Says how many good requests were lost, changed or refused, the worst gap between two messages of a good stream
against the quiet one, the memory of every process over time, and the KV blocks still in use when all is over. Exits
with status 1 if a good request got anything but its answer, the worst gap is above 3 times the quiet one, memory grew
by more than a tenth after the first quarter, or blocks are missing. Bodies that end Triton 2.51 itself (``--deadly``)
are left out: nothing behind its HTTP port can help (docs/SECURITY.md).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))

from under_test import DOORS, PROMPTS, StartFailed, UnderTest, ask, known_answers

TOKENS = 64
SAMPLE_S = 5.0
GAP_RATIO, GROWTH = 3.0, 1.1
BAD_TIMEOUT_S = 120.0


class Good:
    """Streams that begin again and again, each checked against its known answer."""

    def __init__(self, url: str, known: dict[str, str], streams: int) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.worst_gap_s = 0.0
        self._url, self._known = url, known
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(streams)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._stopped.is_set():
            stream = ask(
                self._url, DOORS[number % 2], PROMPTS[number // 2 % len(PROMPTS)], TOKENS, BAD_TIMEOUT_S
            )
            if stream.error:
                outcome = "refused" if "queue is full" in stream.error else "lost"
            else:
                outcome = "right" if stream.text == self._known[stream.prompt] else "changed"
            with self._lock:
                self.counts[outcome] += 1
                self.worst_gap_s = max([self.worst_gap_s, *stream.gaps])
                if outcome != "right":
                    self.errors.append(f"{stream.door}: {outcome}: {stream.error or stream.text!r}"[:200])

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


def over_grpc(url: str, door: str, changes: dict[str, object]) -> str:
    """What came back, in a word."""
    import numpy as np
    from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

    request = service_pb2.ModelInferRequest(model_name=door)
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


def over_http(url: str, door: str, body: bytes, headers: dict[str, str]) -> str:
    request = urllib.request.Request(f"{url}/v2/models/{door}/generate", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=BAD_TIMEOUT_S) as response:
            return "refused" if "error" in json.load(response) else "answered"
    except urllib.error.HTTPError as error:
        return "refused" if error.code < 500 else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return type(error).__name__


def bad_requests(server: UnderTest, deadly: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, what sends it), all of them once, each through both doors and over both protocols where it fits."""
    http = f"http://127.0.0.1:{server.http}"
    for door in DOORS:
        for name, changes in bad_inputs().items():
            yield f"gRPC {name}", lambda door=door, changes=changes: over_grpc(server.url, door, changes)
            if any(isinstance(value, bytes) for value in changes.values()):
                continue  # JSON cannot say that
            values = {
                key: value if key.endswith("_words") else value[0]  # type: ignore[index]
                for key, value in {"text_input": ["The dog"], "max_tokens": [8], **changes}.items()
            }
            body = json.dumps(values).encode()
            if len(body) < 8 << 20 or deadly:
                yield f"HTTP {name}", lambda door=door, body=body: over_http(http, door, body, {})
        for name, (body, headers) in bad_bodies(deadly).items():
            yield (
                f"HTTP {name}",
                lambda door=door, body=body, headers=headers: over_http(http, door, body, headers),
            )


@functools.cache
def bad_bodies(deadly: bool) -> dict[str, tuple[bytes, dict[str, str]]]:
    """Name -> what only HTTP can say, and its headers."""
    bodies = {"max_tokens that wraps": (b'{"text_input": "The dog", "max_tokens": 4294967298}', {})}
    if deadly:
        nested = b'{"max_tokens": 1, "text_input": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
        bomb = gzip.compress(b'{"text_input": "' + b"a" * (800 << 20) + b'", "max_tokens": 1}')
        bodies["50,000 nested ["] = nested, {}
        bodies["gzip body of 800 MB"] = bomb, {"Content-Encoding": "gzip"}
    return bodies


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
        """Rows of first, after a quarter, and last; and the names of those that grew on."""
        samples = self.samples or [{}]
        first, settled, last = samples[0], samples[len(samples) // 4], samples[-1]
        rows, grown = ["| process | first MiB | after a quarter | last | most |", "|---|---|---|---|---|"], []
        for name in sorted(last):
            most = max(sample.get(name, 0.0) for sample in samples)
            rows.append(
                f"| {name} | {first.get(name, 0):.0f} | {settled.get(name, 0):.0f} | {last[name]:.0f} | {most:.0f} |"
            )
            if last[name] > GROWTH * settled.get(name, 0):
                grown.append(name)
        return rows, grown


def soak(server: UnderTest, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(report, faults)."""
    known = known_answers(server.url, TOKENS)
    seconds = options.minutes * 60
    quiet = Good(server.url, known, options.streams)
    time.sleep(max(10.0, seconds / 10))
    quiet.stop()
    memory, good = Memory(server), Good(server.url, known, options.streams)
    answers: Counter[tuple[str, str]] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, send in bad_requests(server, options.deadly):
            answers[name, send()] += 1
            if time.monotonic() >= end:
                break
    good.stop()
    memory.stop()
    time.sleep(2.0)
    blocks = server.kv_blocks_used()
    ratio = good.worst_gap_s / max(quiet.worst_gap_s, 1e-9)
    rows, grown = memory.table()
    wrong = sum(count for outcome, count in good.counts.items() if outcome != "right")
    restarts = [line for line in server.lines if "restarting it" in line]
    faults = [f"{wrong} good requests were not answered rightly"] if wrong else []
    faults += [f"the worst gap is {ratio:.1f} times the quiet one"] if ratio > GAP_RATIO else []
    faults += [f"memory of {name} grew on" for name in grown]
    faults += [f"{blocks} KV blocks are still in use"] if blocks != 0 else []
    faults += restarts
    report = [
        f"{options.streams} good streams of {TOKENS} tokens for {options.minutes:g} minutes, "
        f"{sum(answers.values())} bad requests beside",
        "",
        f"good requests: {dict(good.counts)}; quiet before: {dict(quiet.counts)}",
        f"worst gap of a good stream: {good.worst_gap_s * 1e3:.0f} ms, {ratio:.1f} times the quiet one "
        f"({quiet.worst_gap_s * 1e3:.0f} ms)",
        f"KV blocks in use at the end: {blocks}",
        "",
        *rows,
        "",
        "| bad request | answer | times |",
        "|---|---|---|",
        *(f"| {name} | {answer} | {count} |" for (name, answer), count in sorted(answers.items())),
        "",
        *good.errors[:20],
    ]
    return report, faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--deadly", action="store_true", help="also what ends Triton's HTTP port")
    parser.add_argument("--out", type=Path, help="write the report there, too")
    options = parser.parse_args()
    server = UnderTest(options.build_dir)
    try:
        server.start()
        report, faults = soak(server, options)
        server.stop()
    except StartFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if server.process.poll() is None:
            server.stop()
    report += ["", *(f"FAULT: {fault}" for fault in faults or []), "" if faults else "no fault"]
    print("\n".join(report))
    if options.out:
        options.out.write_text("\n".join(report) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
