"""The same closed loop without any of ours: Triton's own client, a thread and a stream for each user.

``python tests/loadtest/independent.py HOST:PORT ENDPOINT CONCURRENCY OUTPUT_TOKENS SECONDS`` prints tokens/s, median
TTFT and median end-to-end latency in seconds. Good for few streams; many would wait for the interpreter's lock.
"""

from __future__ import annotations

import queue
import statistics
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as grpcclient


def tensor(name: str, value, dtype: str):
    array = (
        np.array([[value.encode()]], dtype=np.object_)
        if dtype == "BYTES"
        else np.array([[value]], dtype=dtype)
    )
    made = grpcclient.InferInput(name, [1, 1], {"BYTES": "BYTES", "int32": "INT32", "bool": "BOOL"}[dtype])
    made.set_data_from_numpy(array)
    return made


def user(url: str, endpoint: str, tokens: int, number: int, end: float, seen: list) -> None:
    client, answers = grpcclient.InferenceServerClient(url), queue.Queue()
    client.start_stream(lambda result, error: answers.put((time.monotonic(), result, error)))
    while time.monotonic() < end:
        prompt = (
            f"{number} {len(seen)} {time.time_ns()}: tell me about the sea, the harbour and the old bridge."
        )
        inputs = [tensor("text_input", prompt, "BYTES"), tensor("max_tokens", tokens, "int32")]
        inputs += [tensor("min_tokens", tokens, "int32"), tensor("stream", True, "bool")]
        sent, times, final = time.monotonic(), [], False
        client.async_stream_infer(endpoint, inputs, enable_empty_final_response=True)
        while not final:
            at, result, error = answers.get()
            assert error is None, error
            final = result.get_response().parameters["triton_final_response"].bool_param
            if result.as_numpy("text_output") is not None:
                times.append(at)
        seen.append((sent, times[0], times[-1]))
    client.stop_stream()


def measure(
    url: str, endpoint: str, concurrency: int, tokens: int, seconds: float
) -> tuple[float, float, float]:
    seen: list[tuple[float, float, float]] = []
    end = time.monotonic() + seconds
    users = [
        threading.Thread(target=user, args=(url, endpoint, tokens, i, end, seen)) for i in range(concurrency)
    ]
    [thread.start() for thread in users]
    [thread.join() for thread in users]
    first, last = min(done for _, _, done in seen), max(sent for sent, _, _ in seen)
    inside = [(s, t, d) for s, t, d in seen if s >= first and s <= last]
    rate = tokens * sum(first < done <= last for _, _, done in seen) / (last - first)
    return (
        rate,
        statistics.median(t - s for s, t, _ in inside),
        statistics.median(d - s for s, _, d in inside),
    )


if __name__ == "__main__":
    address, model, count, length, duration = sys.argv[1:]
    print(*measure(address, model, int(count), int(length), float(duration)))
