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

from flightline import settings
from flightline.client import wire
from flightline.loadtest import llm_page
from flightline.loadtest.collector import Collector
from flightline.loadtest.openai_api import OPENAI
from flightline.loadtest.options import IN_LOCUST, RunOptions
from flightline.loadtest.session import Reporter, Session, plan_of
from flightline.settings import SettingsError

FORM_TOKENS = "64"
"""Length of answers that Locust's own command line and page begin with."""
collector: Collector | None = None
"""Of this process, if it is the master or the only one."""


@events.init_command_line_parser.add_listener
def add_arguments(parser) -> None:
    """Options that the command line, the environment and the web UI's form offer."""
    add, known = parser.add_argument, {field.name: field for field in settings.fields(RunOptions)}
    for name in IN_LOCUST:
        field = known[name]
        if isinstance(field.default, bool):
            add(settings.flag(field), action="store_true", help=field.metadata["help"])
            continue
        add(
            settings.flag(field),
            type=type(field.default),
            default=FORM_TOKENS if name == "output_tokens" else field.default,
            choices=field.metadata["choices"] or None,
            env_var=settings.variables(field)[-1],
            help=field.metadata["help"],
        )
    add(
        "--arrive-for",
        type=float,
        default=0.0,
        help="seconds of arrivals, then the rest is awaited; 0: no end",
    )
    add("--model", default="", env_var="OPENAI_MODEL", help="of OpenAI servers: the model's name")
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
            environment.user_classes = [user for user in environment.user_classes if user is not OpenAi]
        # Locust offers all classes of this file, also those that its command line does not name.
        named = {user.__name__ for user in environment.user_classes}
        for offered in (environment.available_user_classes, environment.available_user_tasks):
            for name in offered.keys() - named:  # type: ignore[union-attr]
                del offered[name]  # type: ignore[union-attr]


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
