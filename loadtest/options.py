"""Settings of ``run``, ``compare``, ``bench``, ``sweep`` and ``search``, checked once at the edge."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flightline.client import wire
from flightline.loadtest.assertions import parse_all
from flightline.loadtest.openai_api import APIS, COMPLETIONS, is_openai
from flightline.loadtest.schedule import PATTERNS, Profile
from flightline.loadtest.slo import Slo
from flightline.loadtest.workload import PRESETS, Workload, WorkloadSpec, read_trace
from flightline.settings import SettingsError, existing_file, setting, value_error

COMPARISON = "comparison.png"
"""The picture of a VALID ``bench``, which no other command makes."""
FIRST_BUDGET_S, BUDGET_S = 330.0, 160.0
MOST_IN_FLIGHT = 4096
LEAST = 1e-3
"""Of numbers that cannot be 0."""


@dataclass(frozen=True)
class Arm:
    """A contestant: an endpoint of a Triton server, or a model of an OpenAI server."""

    label: str
    url: str
    """gRPC address, or ``http://HOST:PORT/v1``."""
    endpoint: str
    """Triton's model, or the OpenAI server's."""
    api: str = COMPLETIONS
    """Of an OpenAI server."""
    token_ids: bool = False
    """The OpenAI server sends them when asked."""

    @property
    def openai(self) -> bool:
        return is_openai(self.url)


def _file(text: str) -> str:
    return str(existing_file(text))


@dataclass(frozen=True)
class LoadOptions:
    """What all commands share."""

    url: str = setting("", "gRPC address of a running server; empty: start the one that was built")
    workload: str = setting("short", f"what is asked: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    input_tokens: str = setting("", "length of prompts, like 128, uniform:64:256 or lognormal:180:0.8<=1500")
    output_tokens: str = setting("", "length of answers, exact; a number or a distribution")
    natural_length: bool = setting(False, "answers may end before that")
    turns: int = setting(0, "of a conversation; 0: as the workload has", least=0)
    prompts: str = setting("", "file of prompts (text lines or JSONL) instead of generated ones", parse=_file)
    seed: int = setting(0, "of prompts, lengths and arrivals", least=0)
    arrivals: str = setting("poisson", f"of an open loop: {', '.join(PATTERNS)}", choices=PATTERNS)
    burstiness: float = setting(1.0, "shape of gamma arrivals: below 1 is burstier than Poisson", least=LEAST)
    ramp_s: float = setting(0.0, "seconds in which the load rises; not measured", least=0)
    discard_s: float = setting(0.0, "seconds after the ramp that are not measured either", least=0)
    drain_s: float = setting(
        60.0, "longest wait for the last answers of an open loop", least=LEAST, variable="LAST_ANSWERS_S"
    )
    request_timeout: float = setting(600.0, "seconds until a request has failed", least=LEAST)
    processes: int = setting(1, "worker processes of the load generator on this machine", least=1, most=256)
    workers: int = setting(
        0, "wait for so many 'flightline loadtest worker', on any machines, instead", least=0
    )
    master_port: int = setting(5557, "where those workers connect", least=1, most=65535)
    openai_api: str = setting(COMPLETIONS, f"of OpenAI servers: {' or '.join(APIS)}", choices=APIS)
    token_ids: bool = setting(True, "ask OpenAI servers that know it for token ids, to count by them")
    slo: str = setting(
        "mlperf-server", "mlperf-server, mlperf-interactive, or limits like ttft=2s,tpot=100ms,p=99"
    )
    price: float = setting(0.0, "dollars per hour of the machine, for the cost of a million tokens", least=0)
    metrics_url: str = setting("", "Triton's metrics page; empty: that of the server started here, else none")
    dcgm_url: str = setting("", "metrics page of a DCGM exporter, like http://127.0.0.1:9400/metrics")
    calibrate_s: float = setting(5.0, "seconds to find the load generator's own ceiling; 0: do not", least=0)
    assert_: str = setting(
        "", "what must hold, like 'ttft_p99<500ms, ratio>=6'; exit status 3 if it does not"
    )
    build_dir: str = setting("build", "folder of the build whose model is served")
    reports: str = setting("reports", "folder that gets one folder per run")

    def __post_init__(self) -> None:
        Workload.of(self.workload_spec)
        Slo.parse(self.slo)
        parse_all(self.assert_)

    def _require(self, ok: bool, name: str, remedy: str) -> None:
        if not ok:
            raise value_error(self.__dataclass_fields__[name], getattr(self, name), remedy)

    def _require_one_endpoint(self, text: str) -> None:
        one = len(parse_arms(text, self.url, "endpoint")) == 1
        self._require(
            one, "endpoint", f"use one of {', '.join(wire.ENDPOINTS)}, or http://HOST:PORT/v1#MODEL"
        )

    @property
    def workload_spec(self) -> WorkloadSpec:
        return WorkloadSpec(
            self.workload, self.input_tokens, self.output_tokens, self.prompts, self.seed, self.turns
        )


def _with(base: str, default: Any, **limits: Any) -> Any:
    """A setting of all commands that has another default in one."""
    return setting(default, LoadOptions.__dataclass_fields__[base].metadata["help"], **limits)


@dataclass(frozen=True)
class RunOptions(LoadOptions):
    """One load on one endpoint: closed loop, open loop (--rate) or the replay of a trace (--trace)."""

    endpoint: str = setting(wire.TEXT_GENERATION, "endpoint under test, or http://HOST:PORT/v1#MODEL")
    concurrency: int = setting(16, "closed loop: requests in flight", least=1, most=MOST_IN_FLIGHT)
    rate: str = setting("", "open loop: requests/s, like 4, 1-8 (rising) or 2@30,8@30 (stages)")
    trace: str = setting("", "open loop: JSONL file of requests to replay")
    trace_speed: float = setting(1.0, "2 replays a trace twice as fast", least=LEAST)
    seconds: float = setting(30.0, "of load; a trace may be shorter", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_endpoint(self.endpoint)
        self._require(not (self.rate and self.trace), "trace", "give either a rate or a trace")
        self._require(
            self.ramp_s + self.discard_s < self.seconds, "seconds", "use more than RAMP_S and DISCARD_S"
        )
        if self.rate:
            Profile.parse(self.rate, self.seconds, self.ramp_s)
        if self.trace:
            read_trace(self.trace, self.seed)


@dataclass(frozen=True)
class CompareOptions(LoadOptions):
    """Several endpoints, or servers, under the same loads, in turns."""

    arms: str = setting("", "contestants as LABEL=HOST:PORT/ENDPOINT or LABEL=http://HOST:PORT/v1#MODEL with commas "
                        "between, slowest first; empty: hf_baseline and text_generation of one server")  # fmt: skip
    output_tokens: str = _with("output_tokens", "16")
    levels: str = setting("1,4", "concurrencies that all get")
    rounds: int = setting(3, "repeats; fewer if the budget does not hold them", least=1, most=20)
    full_rounds: int = setting(
        3, "below so many rounds, blocks become shorter before rounds become fewer", least=1, most=20
    )
    stretch: bool = setting(False, "make blocks longer, until the budget is used")
    budget_s: float = setting(
        270.0, "seconds for the server's start, warm-up and measurement together", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        concurrencies("levels", self.levels)
        parse_arms(self.arms, self.url)


@dataclass(frozen=True)
class BenchOptions(LoadOptions):
    """Two endpoints under one load: ``compare`` with the settings of the project's headline figure."""

    candidate: str = setting(wire.TEXT_GENERATION, "endpoint under test, or a contestant as in compare")
    baseline: str = setting(
        wire.HF_BASELINE, "endpoint that it is compared with, or a contestant as in compare"
    )
    concurrency: int = setting(
        16,
        "requests in flight, each user sending the next when one is answered",
        least=1,
        most=MOST_IN_FLIGHT,
    )
    output_tokens: str = _with("output_tokens", "64")
    calibrate_s: float = _with("calibrate_s", 0.0, least=0)
    budget_s: float = setting(
        0.0,
        "seconds for the server's start, warm-up and measurement together; 0: "
        f"{FIRST_BUDGET_S:.0f} the first time, so that a slow baseline has latencies, then {BUDGET_S:.0f}",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("candidate", "baseline"):
            parse_arms(getattr(self, name), self.url, name)
        self._require(self.candidate != self.baseline, "candidate", "it must differ from the baseline")
        self._require(self.output_tokens != "1", "output_tokens", "use at least 2 (TPOT needs two tokens)")

    def compared(self) -> CompareOptions:
        """The comparison that this is, with the budget chosen if none was given."""
        first = not any(Path(self.reports).glob(f"*/{COMPARISON}"))
        return CompareOptions(
            **{field.name: getattr(self, field.name) for field in fields(LoadOptions)},
            arms=f"{self.baseline}, {self.candidate}",
            levels=str(self.concurrency),
            rounds=5,
            full_rounds=1,
            stretch=True,
            budget_s=self.budget_s or (FIRST_BUDGET_S if first else BUDGET_S),
        )


@dataclass(frozen=True)
class SweepOptions(LoadOptions):
    """Loads from low to high: the curve of latency over throughput, with its knee."""

    arms: str = setting("", "as in compare; empty: text_generation of one server")
    levels: str = setting("1,2,4,8,16", "concurrencies, or requests/s if they start with 'rate:'")
    seconds: float = setting(20.0, "of load at each level", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_levels("levels", self.levels)
        parse_arms(self.arms, self.url)


@dataclass(frozen=True)
class SearchOptions(LoadOptions):
    """The highest rate of requests that holds the SLO."""

    endpoint: str = setting(wire.TEXT_GENERATION, "endpoint under test, or http://HOST:PORT/v1#MODEL")
    start: float = setting(1.0, "requests/s to begin with", least=LEAST)
    precision: float = setting(
        0.1, "relative width at which the search ends", least=0.01, most=1, variable="SEARCH_PRECISION"
    )
    most_trials: int = setting(12, "trials at most", least=1, most=50)
    seconds: float = setting(30.0, "of load in each trial", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_endpoint(self.endpoint)


IN_LOCUST = (
    *(
        "workload",
        "input_tokens",
        "output_tokens",
        "turns",
        "prompts",
        "natural_length",
        "seed",
        "rate",
        "arrivals",
    ),
    *("burstiness", "trace", "trace_speed", "ramp_s", "openai_api", "token_ids", "request_timeout"),
)
"""Fields of ``RunOptions`` that are options of Locust's too, and stand in its page's form."""
OPTIONS: dict[str, type[LoadOptions]] = {
    "run": RunOptions,
    "compare": CompareOptions,
    "bench": BenchOptions,
    "sweep": SweepOptions,
    "search": SearchOptions,
}
"""Commands that measure a server."""


@dataclass(frozen=True)
class CalibrateOptions:
    """What the load generator itself can take in, against a null server."""

    seconds: float = setting(8.0, "of load", least=1)
    openai: bool = setting(False, "over HTTP, as OpenAI servers are asked", variable="")


@dataclass(frozen=True)
class WorkerOptions:
    """Load from this machine, run after run, until Ctrl-C."""

    master_host: str = setting("127.0.0.1", "where the run was started")
    master_port: int = setting(5557, "its port for workers", least=1, most=65535)
    runs: int = setting(0, "end after so many trials; 0: never", least=0, variable="")


@dataclass(frozen=True)
class UiOptions:
    """Locust's web page; other options are Locust's."""

    url: str = setting("", "gRPC address of the server; empty: the one of this machine")
    locust_port: int = setting(8089, "of the page", least=1, most=65535)
    concurrency: int = setting(16, "users that the form begins with", least=1, most=MOST_IN_FLIGHT)


def concurrencies(name: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1 or max(values) > MOST_IN_FLIGHT or len(set(values)) < len(values):
        raise SettingsError(
            f"{name.upper()}={text!r} is not valid: use different numbers from 1 to 4096, like 1,8"
        )
    return values


def parse_levels(name: str, text: str) -> tuple[list[int], list[float]]:
    """(concurrencies, rates); one of them is empty."""
    if not text.startswith("rate:"):
        return sorted(concurrencies(name, text)), []
    try:
        rates = [float(part) for part in text.removeprefix("rate:").split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise SettingsError(
            f"{name.upper()}={text!r} is not valid: use different positive rates, like rate:1,2,4"
        )
    return [], sorted(rates)


def parse_arms(text: str, url: str, name: str = "arms") -> list[Arm]:
    """``LABEL=HOST:PORT/ENDPOINT`` or ``LABEL=http://HOST:PORT/v1#MODEL`` with commas between.

    A label that is left out is the endpoint, and an address that is left out is ``url``.

    Raises:
        SettingsError: not such a list, or a label twice.
    """
    arms = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        label, equals, where = part.partition("=") if not is_openai(part) else ("", "", part)
        if not equals:
            label, where = "", part
        if is_openai(where):
            address, _, endpoint = where.partition("#")
            known = bool(endpoint) and bool(urlsplit(address).hostname)
        else:
            address, slash, endpoint = where.rpartition("/")
            address, known = address if slash else url, endpoint in wire.ENDPOINTS
        if not known or (equals and not label):
            raise SettingsError(
                f"{name.upper()}={part!r} is not valid: use LABEL=HOST:PORT/ENDPOINT with an endpoint of "
                f"{', '.join(wire.ENDPOINTS)}, or LABEL=http://HOST:PORT/v1#MODEL"
            )
        arms.append(Arm(label or endpoint, address.rstrip("/"), endpoint))
    if len({arm.label for arm in arms}) < len(arms):
        raise SettingsError(f"{name.upper()}={text!r} is not valid: each label may come once")
    return arms
