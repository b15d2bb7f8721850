"""One record per request: what was sent, what came when, and what the server says about it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class RequestRecord:
    """Raw measurements of one request; everything reported is computed from these.

    Times are ``time.monotonic_ns()`` of the client's machine, so that processes on it share one clock.
    """

    id: str
    endpoint: str
    block: str
    """Which part of a run the request belongs to."""
    prompt_index: int
    requested_tokens: int
    sent_ns: int
    sent_unix_ns: int
    chunk_ns: list[int] = field(default_factory=list)
    """Arrival of each response that carries outputs."""
    chunk_tokens: list[int] = field(default_factory=list)
    """Output tokens so far at each of them, counted by the server."""
    first_text_chunk: int | None = None
    """Index of the first response with text that is not empty."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    server_times_ns: dict[str, int] | None = None
    """The server's perf metrics (its own clock, ns since the epoch)."""
    cancelled: bool = False
    """Cut off by the load generator because the block ended."""
    error: str | None = None

    @property
    def complete(self) -> bool:
        return not self.cancelled and self.error is None

    @property
    def problem(self) -> str | None:
        """Why the request must not count as answered: its error, or an output of the wrong length."""
        if self.error is not None:
            return self.error
        if not self.cancelled and self.num_output_tokens != self.requested_tokens:
            return f"{self.num_output_tokens} output tokens instead of {self.requested_tokens}"
        return None

    @property
    def done_ns(self) -> int:
        return self.chunk_ns[-1]

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first text that is not empty."""
        if self.first_text_chunk is None:
            return None
        return (self.chunk_ns[self.first_text_chunk] - self.sent_ns) / 1e9

    @property
    def e2e_s(self) -> float:
        """From sending to the last response that carries outputs."""
        return (self.done_ns - self.sent_ns) / 1e9

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first response: (E2E - TTFT) / (N - tokens in that response)."""
        if self.first_text_chunk is None or self.ttft_s is None:
            return None
        rest = self.chunk_tokens[-1] - self.chunk_tokens[self.first_text_chunk]
        return (self.e2e_s - self.ttft_s) / rest if rest > 0 else None

    @property
    def outside_s(self) -> float | None:
        """Client TTFT minus the model's own (arrival to first token): what client, transport and Triton add."""
        if self.server_times_ns is None or self.ttft_s is None:
            return None
        times = self.server_times_ns
        return self.ttft_s - (times["first_token_time_ns"] - times["arrival_time_ns"]) / 1e9


class RecordWriter:
    """Appends records to a JSON-lines file; several processes may append to the same file."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: RequestRecord) -> None:
        os.write(self._file, (json.dumps(dataclasses.asdict(record)) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def read_records(path: str | Path) -> list[RequestRecord]:
    """The records of a file, in the order in which the requests ended; an absent file has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [RequestRecord(**json.loads(line)) for line in lines]
