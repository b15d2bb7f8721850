"""Records of imagined servers, whose throughput and latency are known by construction."""

from __future__ import annotations

from flightline.loadtest.records import RequestRecord

TOKENS = 8


def record(
    sent_s: float, token_times_s: list[float], *, endpoint="text_generation", cut_off=False, **changes
):
    """A request whose tokens arrived one by one at the given times."""
    chunk_ns = [round(at * 1e9) for at in token_times_s]
    values = {
        "id": f"{endpoint}-{sent_s}",
        "endpoint": endpoint,
        "block": "1",
        "prompt_index": 0,
        "requested_tokens": TOKENS,
        "sent_ns": round(sent_s * 1e9),
        "sent_unix_ns": 0,
        "chunk_ns": chunk_ns,
        "chunk_tokens": list(range(1, len(chunk_ns) + 1)),
        "first_text_chunk": 0 if chunk_ns else None,
        "num_output_tokens": len(chunk_ns),
        "cancelled": cut_off,
    }
    return RequestRecord(**{**values, **changes})


def serial_server(concurrency: int, service_s: float, block_s: float, **changes) -> list[RequestRecord]:
    """A closed loop on a server that works on one request at a time, cut off at ``block_s``."""
    queue, records, clock = [0.0] * concurrency, [], 0.0
    while queue:
        sent = queue.pop(0)
        times = [clock + service_s * (i + 1) / TOKENS for i in range(TOKENS)]
        clock += service_s
        arrived = [at for at in times if at <= block_s]
        records.append(record(sent, arrived, cut_off=clock > block_s, **changes))
        if clock <= block_s:
            queue.append(clock)
    return records


def batch_server(concurrency: int, answer_s: float, block_s: float, **changes) -> list[RequestRecord]:
    """A closed loop on a server that works on all requests at once."""
    records, start = [], 0.0
    while start < block_s:
        times = [start + answer_s * (i + 1) / TOKENS for i in range(TOKENS)]
        arrived = [at for at in times if at <= block_s]
        cut_off = len(arrived) < TOKENS
        records += [record(start, arrived, cut_off=cut_off, **changes) for _ in range(concurrency)]
        start += answer_s
    return records
