"""What one worker process does during a test: its share of the load, and the way of its records."""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import ClassVar

import gevent
from locust.env import Environment
from locust.runners import WorkerRunner

from flightline.client import wire
from flightline.loadtest.bridge import Answer, Bridge
from flightline.loadtest.collector import Collector, wall_offset_ns
from flightline.loadtest.live import brief
from flightline.loadtest.openai_api import OPENAI, OpenAiSettings, OpenAiTransport, is_openai
from flightline.loadtest.prompts import PER_WORKER
from flightline.loadtest.records import ClientSample, RequestRecord
from flightline.loadtest.schedule import Profile, unit_times
from flightline.loadtest.transport import Load, Transport, TritonTransport
from flightline.loadtest.workload import Ask, Workload, WorkloadSpec, conversation, read_trace

SEND_S = 0.5
START_IN_S = 0.5
"""Between the decision to start an open loop and its first request, so that all workers are there."""


def plan_of(environment: Environment, endpoints: list[str]) -> dict:
    """What the master tells all workers at the start: who they are and when the clock starts."""
    runner = environment.runner
    clients = getattr(runner, "clients", None)
    ids = sorted(c.id for c in clients.all if c.state != "missing") if clients is not None else ["local"]
    return {"workers": ids, "endpoints": endpoints, "start_unix_ns": time.time_ns() + int(START_IN_S * 1e9)}


class Session:
    """Shared by the users of a process; made when the test starts, after any fork."""

    current: ClassVar[Session | None] = None

    def __init__(self, environment: Environment, url: str, collector: Collector | None) -> None:
        options = environment.parsed_options
        assert options is not None  # Locust's command line has been read
        self.environment = environment
        self.options = options
        self.closing = False
        self.workload = Workload.of(
            WorkloadSpec(
                name=options.workload,
                input_tokens=options.input_tokens,
                output_tokens=str(options.output_tokens),
                prompts=options.prompts,
                seed=int(options.seed),
                turns=int(options.turns),
            )
        )
        plan = options.llm_plan
        runner = environment.runner
        name = runner.client_id if isinstance(runner, WorkerRunner) else "local"
        self.workers = len(plan["workers"])
        self.worker = plan["workers"].index(name) if name in plan["workers"] else self.workers
        # Wall clocks of several machines agree to milliseconds; on one machine this is exact.
        self.start_ns = plan["start_unix_ns"] - wall_offset_ns()
        first = int(options.first_prompt) + self.worker * PER_WORKER
        self._counters = {endpoint: itertools.count(first) for endpoint in (*wire.ENDPOINTS, OPENAI)}
        self._outbox: deque[tuple[dict, dict | None]] = deque()
        self._samples: deque[dict] = deque()
        self._collector = collector
        # What exists now stays. Looking at all of it in a full collection would make tokens wait.
        gc.freeze()
        transport: Transport = TritonTransport(url)
        if is_openai(url):
            settings = OpenAiSettings(options.model, options.openai_api, options.token_ids)
            transport = OpenAiTransport(url, settings)
        self.bridge = Bridge(transport, self._keep, self._keep_sample, self.worker)
        self._sender = gevent.spawn(self._send_regularly) if collector is None else None
        if self.open_loop:
            self._send_at_times(plan["endpoints"])

    @property
    def open_loop(self) -> bool:
        return bool(self.options.trace or self.options.rate)

    def ask(self, endpoint: str) -> Generator[tuple[int, int, Ask], str, None]:
        """The (prompt index, turn, request) of one conversation; ``send`` the answers' texts."""
        index = next(self._counters[endpoint])
        if self.workload.turns == 1:
            yield index, 0, self.workload[index]
            return
        talk = conversation(self.workload, index)
        ask, turn = next(talk), 0
        while True:
            answer = yield index * self.workload.turns + turn, turn, ask
            turn += 1
            try:
                ask = talk.send(answer)
            except StopIteration:
                return

    def send(self, endpoint: str, index: int, turn: int, ask: Ask) -> Answer:
        """Blocks the calling greenlet until the answer is complete."""
        return self.bridge.run(self._load(endpoint, index, ask, time.monotonic_ns(), turn))

    def close(self) -> None:
        """Cuts off what is in flight and hands over every record."""
        if self.closing:
            return
        self.closing = True
        self.bridge.close()
        if self._sender is not None:
            self._sender.kill()
            self._send()

    def _load(self, endpoint: str, index: int, ask: Ask, intended_ns: int, turn: int = 0) -> Load:
        return Load(
            endpoint=endpoint,
            prompt=ask.prompt,
            prompt_index=index,
            output_tokens=ask.output_tokens,
            block=self.options.block,
            timeout_s=float(self.options.request_timeout),
            exact=not self.options.natural_length,
            turn=turn,
            intended_ns=intended_ns,
        )

    def _send_at_times(self, endpoints: list[str]) -> None:
        """Starts this worker's share of the open loop, for each endpoint by itself."""
        waiting = set(endpoints)

        def done(endpoint: str) -> None:
            waiting.discard(endpoint)
            if not waiting and not self.closing:
                if self._collector is not None:
                    self._collector.on_idle()
                else:
                    self.environment.runner.send_message("llm_idle")  # type: ignore[union-attr]

        for endpoint in endpoints:
            report = Reporter(self.environment, endpoint)
            self.bridge.send_at_times(self._loads(endpoint), report, lambda e=endpoint: done(e))  # type: ignore[misc]

    def _loads(self, endpoint: str) -> Iterator[Load]:
        """Every ``workers``-th request of the common schedule."""
        first = int(self.options.first_prompt)
        for number, (at_s, ask) in enumerate(self._schedule()):
            if number % self.workers == self.worker:
                intended_ns = self.start_ns + int(at_s * 1e9)
                request = ask or self.workload[first + number]
                yield self._load(endpoint, first + number, request, intended_ns)

    def _schedule(self) -> Iterator[tuple[float, Ask | None]]:
        options = self.options
        seconds = float(options.arrive_for) or float("inf")
        if options.trace:
            for row in read_trace(options.trace, int(options.seed)):
                at_s = row.at_s / float(options.trace_speed)
                if at_s < seconds:
                    yield at_s, row.ask
            return
        profile = Profile.parse(options.rate, seconds, float(options.ramp_s))
        events = unit_times(options.arrivals, int(options.seed), float(options.burstiness))
        for at_s in profile.times(events):
            yield at_s, None

    def _keep(self, record: RequestRecord) -> None:
        kept = record.as_dict() if self.options.records else None
        if self._collector is not None:
            self._collector.add(brief(record), kept)
        else:
            self._outbox.append((brief(record), kept))

    def _keep_sample(self, sample: ClientSample) -> None:
        if self._collector is not None:
            self._collector.sample(sample)
        else:
            self._samples.append(vars(sample))

    def _send_regularly(self) -> None:
        while True:
            gevent.sleep(SEND_S)
            self._send()

    def _send(self) -> None:
        told = [self._outbox.popleft() for _ in range(len(self._outbox))]
        message = {
            "briefs": [short for short, _ in told],
            "records": [kept for _, kept in told] if self.options.records else [],
            "samples": [self._samples.popleft() for _ in range(len(self._samples))],
            "wall_offset_ns": wall_offset_ns(),
        }
        if told or message["samples"]:
            self.environment.runner.send_message("llm", message)  # type: ignore[union-attr]


class Reporter:
    """Fills Locust's own table: one row for requests, and rows beside the totals for their parts."""

    def __init__(self, environment: Environment, endpoint: str) -> None:
        self._environment = environment
        self._endpoint = endpoint

    def __call__(self, record: RequestRecord) -> None:
        problem = record.problem
        self._environment.events.request.fire(
            request_type="E2E",
            name=self._endpoint,
            response_time=record.e2e_s * 1e3 if record.chunk_ns else 0,
            response_length=record.num_output_tokens or 0,
            exception=RuntimeError(problem) if problem else None,
            context={},
        )
        for row, seconds in (("TTFT", record.ttft_s), ("TPOT", record.tpot_s)):
            if seconds is not None:
                stats = self._environment.stats.get(self._endpoint, row)
                stats.log(seconds * 1e3, 0)  # type: ignore[arg-type]
