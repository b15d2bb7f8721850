"""Results of imagined servers, made by everything that comes after the measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flightline.loadtest.commands import compared
from flightline.loadtest.experiment import Experiment
from flightline.loadtest.metrics import steady_window
from flightline.loadtest.options import Arm, CompareOptions
from flightline.loadtest.records import ClientSample, RequestRecord
from flightline.loadtest.result import Result
from flightline.loadtest.target import Target
from flightline.loadtest.telemetry import Sampler
from flightline.loadtest.trial import Level, Outcome, Trial
from tests.loadtest.traces import batch_server, serial_server

ENGINE, BASELINE = "text_generation", "hf_baseline"
DEPLOYED = {"model": "Tiny", "lane": "torch", "precision": "fp8", "baseline": {"dtype": "bfloat16"}}


def outcome(
    name: str,
    endpoint: str,
    records: Sequence[RequestRecord],
    round_: int = 1,
    clients: Sequence[ClientSample] = (),
    failure: str | None = None,
) -> Outcome:
    trial = Trial(name, Arm(endpoint, "here", endpoint), Level(concurrency=16), 20.0, round_)
    return Outcome(trial, list(records), list(clients), steady_window(records), None, failure)


def bench(
    work: Path,
    extra: Sequence[RequestRecord] = (),
    failure: str | None = None,
    clients: Sequence[ClientSample] = (),
    last_s: float = 5.0,
    service_s: float = 2.0,
) -> Result:
    """A lone round: the engine answers in 4 s, the baseline one by one in ``service_s``, the engine in ``last_s``."""
    arms = [Arm(name, "here", name) for name in (BASELINE, ENGINE)]
    options = CompareOptions(output_tokens="8", levels="16")
    target = Target("here", lambda: [], DEPLOYED)
    experiment = Experiment(options, arms, target, Sampler(lambda: []), work, lambda line: None, None)
    experiment.outcomes = [
        outcome("1", ENGINE, [*batch_server(16, 4.0, 20.0), *extra], clients=clients),
        outcome("2", BASELINE, serial_server(16, service_s, 60.0, endpoint=BASELINE), failure=failure),
        outcome("3", ENGINE, batch_server(16, last_s, 20.0)),
    ]
    return compared(experiment, "bench")
