"""The same closed loop without any of ours: Triton's own client, a thread and a stream for each user.

``python tests/loadtest/independent.py HOST:PORT ENDPOINT CONCURRENCY OUTPUT_TOKENS SECONDS [PROMPTS.txt]`` prints
tokens/s, median TTFT and median end-to-end latency in seconds, and how many answers and tokens there were. Good for
few streams; many would wait for the interpreter's lock.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient


@dataclass(frozen=True)
class Seen:
    """One answer: when it was asked for, when there was text, and (time, output tokens so far) of each response."""

    sent: float
    first_text: float
    chunks: list[tuple[float, int]]


@dataclass(frozen=True)
class Measured:
    tokens_per_s: float
    ttft_s: float
    e2e_s: float
    answers: int
    tokens: int


def tensor(name: str, value, dtype: str):
    array = np.array([[value.encode() if dtype == "BYTES" else value]], dtype=object)
    made = grpcclient.InferInput(name, [1, 1], dtype)
    made.set_data_from_numpy(array if dtype == "BYTES" else array.astype(dtype.lower()))
    return made


def user(url: str, endpoint: str, tokens: int, prompts: Iterator[str], end: float, seen: list[Seen]) -> None:
    client, answers = grpcclient.InferenceServerClient(url), queue.Queue()
    client.start_stream(lambda result, error: answers.put((time.monotonic(), result, error)))
    while time.monotonic() < end:
        inputs = [tensor("text_input", next(prompts), "BYTES"), tensor("max_tokens", tokens, "INT32")]
        inputs += [tensor("min_tokens", tokens, "INT32"), tensor("stream", True, "BOOL")]
        inputs += [tensor("return_num_output_tokens", True, "BOOL")]
        sent, first_text, chunks, final = time.monotonic(), 0.0, [], False
        client.async_stream_infer(endpoint, inputs, enable_empty_final_response=True)
        while not final:
            at, result, error = answers.get()
            assert error is None, error
            final = result.get_response().parameters["triton_final_response"].bool_param
            if (text := result.as_numpy("text_output")) is not None:
                first_text = first_text or (at if text.item() else 0.0)
                chunks.append((at, result.as_numpy("num_output_tokens").item()))
        if endpoint == "ensemble":  # NVIDIA's models count the tokens of one response
            chunks = [(at, sum(count for _, count in chunks[: n + 1])) for n, (at, _) in enumerate(chunks)]
        seen.append(Seen(sent, first_text, chunks))
    client.stop_stream()


def measure(
    url: str, endpoint: str, concurrency: int, tokens: int, seconds: float, prompts: list[str] | None = None
) -> Measured:
    seen: list[Seen] = []
    start = time.monotonic()
    numbered = map(
        f"{{}} {start}: tell me about the sea, the harbour and the bridge.".format, itertools.count()
    )
    source = iter(prompts) if prompts else numbered  # threads may share either, not a generator
    work = (url, endpoint, tokens, source, start + seconds, seen)
    users = [threading.Thread(target=user, args=work) for _ in range(concurrency)]
    [thread.start() for thread in users]
    [thread.join() for thread in users]
    # From the first answer's end to the last request's start all users are at work.
    first, last = min(one.chunks[-1][0] for one in seen), max(one.sent for one in seen)
    inside = [one for one in seen if first <= one.sent <= last]
    arrived = 0
    for one in seen:
        for (_, before), (at, count) in itertools.pairwise([(0.0, 0), *one.chunks]):
            arrived += count - before if first < at <= last else 0
    return Measured(
        arrived / (last - first),
        statistics.median(one.first_text - one.sent for one in inside),
        statistics.median(one.chunks[-1][0] - one.sent for one in inside),
        len(seen),
        sum(one.chunks[-1][1] for one in seen),
    )


if __name__ == "__main__":
    address, model, count, length, duration, *files = sys.argv[1:]
    lines = Path(files[0]).read_text().splitlines() if files else None
    found = measure(address, model, int(count), int(length), float(duration), lines)
    print(found.tokens_per_s, found.ttft_s, found.e2e_s, found.answers, found.tokens)
