"""One record per request: what was sent, what came when, and what the server says about it."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

CLIENTS, WORKERS = "clients.jsonl", "workers.jsonl"
"""Beside the records: how the worker processes were doing, and how many of them came to the end."""
RECORDS_FULL_STATUS = 4
"""Locust's exit status if the records could not be written."""


@dataclass
class RequestRecord:
    """Raw measurements of one request; everything reported is computed from these.

    Times are ``time.monotonic_ns()`` of the client's machine, so that processes on it share one clock; the
    master of a distributed run moves those of other machines onto its own.
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
    intended_ns: int | None = None
    """When the load model wanted the request to be sent; None = when it was."""
    exact: bool = True
    """The answer must have ``requested_tokens`` tokens, not at most so many."""
    turn: int = 0
    """Of a conversation, from 0."""
    worker: int = 0
    cached_tokens: int | None = None
    """Of the prompt, from the server's prefix cache, if an OpenAI server tells."""
    text_pieces: int | None = None
    """Parts in which an OpenAI server sent the text: at most as many as tokens."""
    counted_tokens: int | None = None
    """The client's own count of the output tokens, by their ids."""

    @property
    def complete(self) -> bool:
        return not self.cancelled and self.error is None

    @property
    def problem(self) -> str | None:
        """Why the request must not count as answered: its error, or an output of the wrong length."""
        if self.error is not None:
            return self.error
        if self.cancelled:
            return None
        if self.num_output_tokens is None or self.num_output_tokens > self.requested_tokens:
            return f"{self.num_output_tokens} output tokens instead of {self.requested_tokens}"
        if self.exact and self.num_output_tokens != self.requested_tokens:
            return f"{self.num_output_tokens} output tokens instead of {self.requested_tokens}"
        return self._miscount

    @property
    def _miscount(self) -> str | None:
        """Where the server's count cannot be true. A stop token at the end is counted and need not be sent."""
        told, counted = self.num_output_tokens or 0, self.counted_tokens
        if counted is not None and not told - (not self.exact) <= counted <= told:
            return f"usage says {told} output tokens, and {counted} came"
        if counted is None and (self.text_pieces or 0) > told:
            return f"usage says {told} output tokens, and the text came in {self.text_pieces} pieces"
        return None

    @property
    def start_ns(self) -> int:
        """Where latencies start: the intended time, so that a late client does not hide its lateness."""
        return self.sent_ns if self.intended_ns is None else self.intended_ns

    @property
    def schedule_delay_s(self) -> float:
        """How much later than intended the request was sent."""
        return (self.sent_ns - self.start_ns) / 1e9

    @property
    def done_ns(self) -> int:
        return self.chunk_ns[-1]

    @property
    def ttft_s(self) -> float | None:
        """From the intended time to the first text that is not empty."""
        if self.first_text_chunk is None:
            return None
        return (self.chunk_ns[self.first_text_chunk] - self.start_ns) / 1e9

    @property
    def e2e_s(self) -> float:
        """From the intended time to the last response that carries outputs."""
        return (self.done_ns - self.start_ns) / 1e9

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first response: (E2E - TTFT) / (N - tokens in that response)."""
        if self.first_text_chunk is None or self.ttft_s is None:
            return None
        rest = self.chunk_tokens[-1] - self.chunk_tokens[self.first_text_chunk]
        return (self.e2e_s - self.ttft_s) / rest if rest > 0 else None

    @property
    def ntpot_s(self) -> float | None:
        """Normalised time per output token: E2E / N."""
        return self.e2e_s / self.num_output_tokens if self.num_output_tokens else None

    @property
    def gaps_s(self) -> list[float]:
        """Between successive responses with outputs, from the first text on."""
        times = self.chunk_ns[self.first_text_chunk or 0 :]
        return [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(times)]

    @property
    def stall_s(self) -> float | None:
        """The longest gap: how long the reader of the answer sat in front of a text that stood still."""
        return max(self.gaps_s, default=None)

    @property
    def server_ttft_s(self) -> float | None:
        """The model's own TTFT, arrival to first token, on its own clock."""
        if self.server_times_ns is None:
            return None
        times = self.server_times_ns
        return (times["first_token_time_ns"] - times["arrival_time_ns"]) / 1e9

    @property
    def outside_s(self) -> float | None:
        """Client TTFT, from sending, minus the model's own: what client, transport and Triton add."""
        if self.server_ttft_s is None or self.ttft_s is None:
            return None
        return self.ttft_s - self.schedule_delay_s - self.server_ttft_s

    def as_dict(self) -> dict:
        return dict(vars(self))  # dataclasses.asdict copies every list: three times slower


@dataclass
class ClientSample:
    """How one worker process was doing during about a second."""

    worker: int
    time_ns: int
    """``time.monotonic_ns()`` at its end, like the records' times."""
    wall_ns: int
    """``time.time_ns()`` at the same moment: a step against ``time_ns`` is a clock that was set."""
    cpu_s: float
    """CPU time of the process so far."""
    in_flight: int
    lags_ms: list[float]
    """By how much the event loop that takes the timestamps was late, at regular moments."""
    block: str = ""


class RecordsFull(OSError):
    """The records cannot be written; the message says where and why."""


class JsonLines:
    """Appends to a JSON-lines file, a line at a time; several processes may append to the same file.

    Raises:
        RecordsFull: also if only a part of the line was written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RecordsFull(f"RECORDS={path} cannot be written: {error.strerror}") from None

    def write(self, line: dict) -> None:
        data = (json.dumps(line) + "\n").encode()
        try:
            written = os.write(self._file, data)
        except OSError as error:
            raise RecordsFull(f"RECORDS={self._path} cannot be written: {error.strerror}") from None
        if written < len(data):
            raise RecordsFull(f"RECORDS={self._path} cannot be written: no space left")

    def close(self) -> None:
        os.close(self._file)


def read_records(path: str | Path) -> list[RequestRecord]:
    """The records of a file, in the order in which the requests ended; an absent file has none."""
    return [RequestRecord(**line) for line in _lines(path)]


def read_clients(path: str | Path) -> list[ClientSample]:
    """The client samples of a file; an absent file has none."""
    return [ClientSample(**line) for line in _lines(path)]


def _lines(path: str | Path) -> list[dict]:
    """The file's lines; a last one that was cut off (a full disk, a process that was killed) is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
