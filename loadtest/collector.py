"""The place where all workers' records come together: Locust's master, or its only process.

Workers send what they measured over Locust's own connection, so that a run over several machines needs
no shared disk. At the end the master asks each worker to finish and waits until it has said so: Locust
itself gives them half a second, in which records would be lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import gevent
from locust.env import Environment
from locust.runners import MasterRunner

from flightline.loadtest.live import Live
from flightline.loadtest.records import (
    CLIENTS,
    RECORDS_FULL_STATUS,
    WORKERS,
    ClientSample,
    JsonLines,
    RecordsFull,
)

FINISH_S = 20.0
HOPELESS_S, HOPELESS_ERRORS = 10.0, 20
"""Nothing but errors for so long, and at least so many: the server is not coming back."""


def wall_offset_ns() -> int:
    """Wall clock minus monotonic clock of this machine."""
    return time.time_ns() - time.monotonic_ns()


class Collector:
    """One per master or local process, for all tests that it runs."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.live = Live()
        self._hub = gevent.get_hub()
        self._files: tuple[JsonLines, JsonLines] | None = None
        self._workers: set[str] = set()
        self._finished: set[str] = set()
        self._idle: set[str] = set()
        self._last_answer_s = 0.0
        self._errors = 0
        self._ending = False

    def start(self, workers: list[str]) -> None:
        """A test begins on these workers (ids)."""
        options = self.environment.parsed_options
        assert options is not None
        self._workers, self._finished, self._idle = set(workers), set(), set()
        self._last_answer_s, self._errors, self._ending = time.monotonic(), 0, False
        named = (getattr(user, "endpoint", "") for user in self.environment.user_classes)
        contestants = set(filter(None, named))
        self.live.start(sorted(contestants))
        if options.records:
            try:
                self._files = JsonLines(options.records), JsonLines(Path(options.records).with_name(CLIENTS))
            except RecordsFull as error:
                self._give_up(str(error), RECORDS_FULL_STATUS)

    def add(self, told: dict, record: dict | None) -> None:
        """One request has ended; ``record`` is None if nobody keeps records. Any thread."""
        self.live.add(told)
        if told["error"]:
            self._errors += 1
            silent_s = time.monotonic() - self._last_answer_s
            if self._errors >= HOPELESS_ERRORS and silent_s > HOPELESS_S:
                self._give_up(f"stopped: nothing but errors for {silent_s:.0f} s: {told['problem']}")
        elif told["e2e_s"] is not None:
            self._last_answer_s, self._errors = time.monotonic(), 0
        if record is not None:
            self._write(0, record)

    def sample(self, sample: ClientSample) -> None:
        """Any thread."""
        self.live.sample(sample)
        self._write(1, vars(sample))

    def on_message(self, environment: Environment, msg, **_: object) -> None:
        """A worker's records and samples; its times are moved onto this machine's clock."""
        data = msg.data
        shift_ns = data["wall_offset_ns"] - wall_offset_ns()
        if abs(shift_ns) < 5_000_000:  # the same machine: what is left is noise
            shift_ns = 0
        for told, record in zip(data["briefs"], data["records"] or [None] * len(data["briefs"]), strict=True):
            self.add(told, record and shifted(record, shift_ns))
        for sample in data["samples"]:
            self.sample(ClientSample(**{**sample, "time_ns": sample["time_ns"] + shift_ns}))

    def on_done(self, environment: Environment, msg, **_: object) -> None:
        self._finished.add(msg.node_id)

    def on_idle(self, environment: Environment | None = None, msg=None, **_: object) -> None:
        """A worker has sent everything it was to send, and everything has been answered."""
        self._idle.add(msg.node_id if msg else next(iter(self._workers), ""))
        options = self.environment.parsed_options
        if self._idle >= self._workers and options is not None and options.headless:
            self._quit()

    def finish(self) -> None:
        """Asks the workers for the rest and waits for it; a worker that is gone is not waited for."""
        runner = self.environment.runner
        if not isinstance(runner, MasterRunner):
            return
        runner.send_message("llm_finish")
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline:
            alive = {client.id for client in runner.clients.all if client.state != "missing"}
            if self._workers & alive <= self._finished:
                break
            gevent.sleep(0.02)

    def stop(self) -> None:
        """The test is over; what is not here now is lost."""
        if self.live.started_s is None or self.live.ended_s is not None:
            return
        self.live.ended_s = time.monotonic()
        options, runner = self.environment.parsed_options, self.environment.runner
        finished = self._finished & self._workers if isinstance(runner, MasterRunner) else self._workers
        self.live.lost_workers = len(self._workers - finished)
        files, self._files = self._files, None
        if files is None or options is None:
            return
        try:
            ended = JsonLines(Path(options.records).with_name(WORKERS))
            ended.write(
                {
                    "block": options.block,
                    "expected": len(self._workers),
                    "finished": len(finished),
                    "start_ns": options.llm_plan["start_unix_ns"] - wall_offset_ns(),
                }
            )
            ended.close()
        except RecordsFull as error:
            self._give_up(str(error), RECORDS_FULL_STATUS)
        for file in files:
            file.close()

    def _write(self, which: int, line: dict) -> None:
        files = self._files
        if files is None:
            return
        try:
            block = {} if which == 0 else {"block": self.environment.parsed_options.block}  # type: ignore[union-attr]
            files[which].write({**line, **block})
        except RecordsFull as error:
            self._files = None
            self._give_up(str(error), RECORDS_FULL_STATUS)

    def _give_up(self, why: str, status: int | None = None) -> None:
        if self._ending:
            return
        self._ending = True
        logging.getLogger(__name__).error(why)
        if status is not None:
            self.environment.process_exit_code = status
        self._quit()

    def _quit(self) -> None:
        """Ends the test from any thread; Locust's page stays."""
        options, runner = self.environment.parsed_options, self.environment.runner
        assert runner is not None
        end: Callable[[], None] = runner.quit if options is not None and options.headless else runner.stop
        self._hub.loop.run_callback_threadsafe(gevent.spawn, end)


def shifted(record: dict, shift_ns: int) -> dict:
    """The record on another monotonic clock."""
    if not shift_ns:
        return record
    moved = {name: record[name] + shift_ns for name in ("sent_ns", "intended_ns") if record[name] is not None}
    return {**record, **moved, "chunk_ns": [at + shift_ns for at in record["chunk_ns"]]}
