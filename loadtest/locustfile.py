"""Locust users, one class per endpoint, closed loop: a user sends its next request when one is answered.

Locust's own table is the live view. Its percentiles are rounded (two digits); reports are computed from
the raw records (``--records``).
"""

from __future__ import annotations

import itertools
import os

import gevent
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import WorkerRunner

from client import wire
from loadtest.bridge import Bridge, Load
from loadtest.prompts import Prompts
from loadtest.records import RecordWriter, RequestRecord

PROMPTS_PER_WORKER = 1_000_000


@events.init_command_line_parser.add_listener
def add_arguments(parser) -> None:
    """Options that the command line, the environment and the web UI's form offer."""
    add = parser.add_argument
    add("--output-tokens", type=int, default=64, env_var="OUTPUT_TOKENS", help="Exact output length")
    add("--prompts", default="", env_var="PROMPTS", help="Prompt file; empty: unique generated prompts")
    add("--seed", type=int, default=0, env_var="SEED", help="Of the generated prompts")
    add("--request-timeout", type=float, default=600.0, help="Seconds until a request has failed")
    hidden = {"include_in_web_ui": False}
    add("--records", default="", env_var="RECORDS", help="JSON-lines file to append to", **hidden)
    add("--first-prompt", type=int, default=0, help="Index of the first prompt", **hidden)
    add("--block", default="", help="Label written into the records", **hidden)


class Session:
    """What the users of one worker process share; made by the first user, after any fork."""

    _current: Session | None = None

    def __init__(self, environment: Environment, url: str) -> None:
        options = environment.parsed_options
        assert options is not None  # Locust's command line has been read
        self.options = options
        self.stats = environment.stats
        self.prompts = Prompts(options.seed, options.prompts)
        self.bridge = Bridge(url, RecordWriter(options.records) if options.records else None)
        runner = environment.runner
        worker = runner.worker_index if isinstance(runner, WorkerRunner) else 0
        first = options.first_prompt + worker * PROMPTS_PER_WORKER
        self._counters = {endpoint: itertools.count(first) for endpoint in wire.ENDPOINTS}

    @classmethod
    def of(cls, environment: Environment, url: str) -> Session:
        if cls._current is None:
            cls._current = cls(environment, url)
        return cls._current

    @classmethod
    def close(cls) -> None:
        if cls._current is not None:
            cls._current.bridge.close()
            cls._current = None

    def next_load(self, endpoint: str) -> Load:
        index = next(self._counters[endpoint])
        return Load(
            endpoint=endpoint,
            prompt=self.prompts[index],
            prompt_index=index,
            output_tokens=int(self.options.output_tokens),
            block=self.options.block,
            timeout_s=float(self.options.request_timeout),
        )


@events.init.add_listener
def set_the_clock(**_: object) -> None:
    """``--run-time`` counts from gevent's cached time, which the imports have made seconds old."""
    gevent.get_hub().loop.update_now()


@events.test_stop.add_listener
@events.quitting.add_listener
def close_session(environment: Environment, **_: object) -> None:
    """The next test gets the options of the form anew."""
    Session.close()


class EndpointUser(User):
    """Sends one prompt after the other to ``endpoint`` and reports E2E, TTFT and TPOT."""

    abstract = True
    wait_time = constant(0)
    host = os.environ.get("URL") or wire.DEFAULT_URL
    endpoint = ""

    def on_start(self) -> None:
        self.session = Session.of(self.environment, self.host)

    @task
    def generate(self) -> None:
        record = self.session.bridge.run(self.session.next_load(self.endpoint))
        if not record.cancelled:
            self._report(record)
        if record.error is not None:
            gevent.sleep(1.0)  # a server that is gone would be asked thousands of times a second

    def _report(self, record: RequestRecord) -> None:
        problem = record.problem
        self.environment.events.request.fire(
            request_type="E2E",
            name=self.endpoint,
            response_time=record.e2e_s * 1e3 if record.chunk_ns else 0,
            response_length=record.num_output_tokens or 0,
            exception=RuntimeError(problem) if problem else None,
            context={},
        )
        # Rows of their own, past the totals: they are parts of requests and not requests.
        for row, seconds in (("TTFT", record.ttft_s), ("TPOT", record.tpot_s)):
            if seconds is not None:
                self.session.stats.get(self.endpoint, row).log(seconds * 1e3, 0)  # type: ignore[arg-type]


class TextGeneration(EndpointUser):
    """The single text model in front of the engine."""

    endpoint = wire.TEXT_GENERATION


class Ensemble(EndpointUser):
    """NVIDIA's preprocessing, tensorrt_llm, postprocessing in front of the same engine."""

    endpoint = wire.ENSEMBLE


class HfBaseline(EndpointUser):
    """Plain Transformers ``generate``."""

    endpoint = wire.HF_BASELINE
