"""Locust users, one class per endpoint.

Closed loop (the default): a user sends its next request when one is answered, ``-u`` is the concurrency,
``-r`` the ramp. Open loop (``--rate`` or ``--trace``): requests go out at their times whatever the server
does; one user is enough, and Locust's number of users means nothing.

Locust's own table is the live view. Its percentiles are rounded (two digits); reports are computed from
the raw records (``--records``), and ``/llm`` shows live figures with 1 % resolution.
"""

from __future__ import annotations

import gevent
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from flightline.client import wire
from flightline.loadtest import llm_page
from flightline.loadtest.collector import Collector
from flightline.loadtest.openai_api import APIS, OPENAI
from flightline.loadtest.schedule import PATTERNS
from flightline.loadtest.session import Reporter, Session, plan_of
from flightline.loadtest.workload import PRESETS
from flightline.settings import SettingsError

collector: Collector | None = None
"""Of this process, if it is the master or the only one."""


@events.init_command_line_parser.add_listener
def add_arguments(parser) -> None:
    """Options that the command line, the environment and the web UI's form offer."""
    add = parser.add_argument
    add("--workload", default="short", choices=list(PRESETS), env_var="WORKLOAD", help="What is asked")
    add("--input-tokens", default="", env_var="INPUT_TOKENS", help="Length of prompts, or its distribution")
    add(
        "--output-tokens",
        default="64",
        env_var="OUTPUT_TOKENS",
        help="Length of answers, or its distribution",
    )
    add("--turns", type=int, default=0, env_var="TURNS", help="Of a conversation; 0: as the workload has")
    add("--prompts", default="", env_var="PROMPTS", help="Prompt file; empty: unique generated prompts")
    add("--natural-length", action="store_true", help="Answers may end before --output-tokens")
    add("--seed", type=int, default=0, env_var="SEED", help="Of prompts, lengths and arrivals")
    add("--rate", default="", env_var="RATE", help="Open loop: requests/s, like 4, 1-8 or 2@30,8@30")
    add("--arrivals", default="poisson", choices=list(PATTERNS), env_var="ARRIVALS", help="Of an open loop")
    add("--burstiness", type=float, default=1.0, help="Shape of gamma arrivals; below 1 is burstier")
    add("--trace", default="", env_var="TRACE", help="Open loop: JSONL file of requests to replay")
    add("--trace-speed", type=float, default=1.0, help="2 replays a trace twice as fast")
    add("--ramp-s", type=float, default=0.0, help="Seconds in which an open loop's rate rises from 0")
    add(
        "--arrive-for",
        type=float,
        default=0.0,
        help="Seconds of arrivals, then the rest is awaited; 0: no end",
    )
    add("--model", default="", env_var="OPENAI_MODEL", help="OpenAI servers: the model's name")
    add(
        "--openai-api",
        default="completions",
        choices=list(APIS),
        env_var="OPENAI_API",
        help="OpenAI servers: which",
    )
    add("--token-ids", action="store_true", help="OpenAI servers: ask for token ids, to count by them")
    add("--request-timeout", type=float, default=600.0, help="Seconds until a request has failed")
    hidden = {"include_in_web_ui": False}
    add("--records", default="", env_var="RECORDS", help="JSON-lines file to append to", **hidden)
    add("--first-prompt", type=int, default=0, help="Index of the first prompt", **hidden)
    add("--block", default="", help="Label written into the records", **hidden)


@events.init.add_listener
def set_up(environment: Environment, **_: object) -> None:
    global collector
    gevent.get_hub().loop.update_now()  # --run-time counts from its cached time, seconds old after the imports
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        runner.register_message("llm_finish", finish_worker, concurrent=True)
        return
    collector = Collector(environment)
    if isinstance(runner, MasterRunner):
        runner.register_message("llm", collector.on_message)
        runner.register_message("llm_done", collector.on_done)
        runner.register_message("llm_idle", collector.on_idle)
    if environment.web_ui is not None:
        llm_page.add_to(environment.web_ui, collector.live)
        if not environment.parsed_options.model:  # type: ignore[union-attr]
            for offered in (environment.available_user_classes, environment.available_user_tasks):
                offered.pop(OpenAi.__name__, None)  # type: ignore[union-attr]
            environment.user_classes = [user for user in environment.user_classes if user is not OpenAi]


@events.test_start.add_listener
def start(environment: Environment, **_: object) -> None:
    options = environment.parsed_options
    assert options is not None
    if collector is not None:
        endpoints = [user.endpoint for user in environment.user_classes if issubclass(user, EndpointUser)]
        options.llm_plan = plan_of(environment, endpoints)
        collector.start(options.llm_plan["workers"])
    if not isinstance(environment.runner, MasterRunner):
        try:
            Session.current = Session(environment, environment.host or EndpointUser.host, collector)
        except SettingsError as error:
            environment.process_exit_code = 2
            # Not raised: Locust would only log it and go on without a session.
            print(f"error: {error}", flush=True)
            gevent.spawn(environment.runner.quit)  # type: ignore[union-attr]


@events.test_stopping.add_listener
def gather(environment: Environment, **_: object) -> None:
    if isinstance(environment.runner, MasterRunner) and collector is not None:
        collector.finish()


def finish_worker(environment: Environment, **_: object) -> None:
    close_session()
    environment.runner.send_message("llm_done")  # type: ignore[union-attr]


@events.test_stop.add_listener
@events.quitting.add_listener
def stop(environment: Environment, **_: object) -> None:
    close_session()
    if collector is not None:
        collector.stop()


def close_session() -> None:
    """The next test gets the options of the form anew."""
    session, Session.current = Session.current, None
    if session is not None:
        session.close()


class EndpointUser(User):
    """Sends one prompt after the other to ``endpoint``; in an open loop it only shows that the test runs."""

    abstract = True
    wait_time = constant(0)
    host = wire.variable("URL") or wire.default_url()
    endpoint = ""

    def on_start(self) -> None:
        self.report = Reporter(self.environment, self.endpoint)

    @task
    def talk(self) -> None:
        session = Session.current
        if session is None or session.open_loop:
            gevent.sleep(0.2)
            return
        turns = session.ask(self.endpoint)
        index, turn, ask = next(turns)
        while not session.closing:
            answer = session.send(self.endpoint, index, turn, ask)
            if not answer.record.cancelled:
                self.report(answer.record)
            if answer.record.error is not None:
                gevent.sleep(1.0)  # a server that is gone would be asked thousands of times a second
                return
            try:
                index, turn, ask = turns.send(answer.text)
            except StopIteration:
                return


class TextGeneration(EndpointUser):
    """The single text model in front of the engine."""

    endpoint = wire.TEXT_GENERATION


class Ensemble(EndpointUser):
    """NVIDIA's preprocessing, tensorrt_llm, postprocessing in front of the same engine."""

    endpoint = wire.ENSEMBLE


class OpenAi(EndpointUser):
    """``--model`` of any OpenAI server; the host is its URL, like http://127.0.0.1:9000/v1."""

    endpoint = OPENAI


class HfBaseline(EndpointUser):
    """Plain Transformers ``generate``."""

    endpoint = wire.HF_BASELINE
