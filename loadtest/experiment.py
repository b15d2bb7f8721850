"""Runs trials and turns what they recorded into a result; what kind of run it is, the commands know."""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np

from flightline.client import ClientError, wire
from flightline.loadtest import audit, conditions, openai_probe
from flightline.loadtest.assertions import parse_all
from flightline.loadtest.metrics import Summary, latency_sample, summarise, tokens_in
from flightline.loadtest.options import Arm, LoadOptions
from flightline.loadtest.plan import Pace
from flightline.loadtest.records import RequestRecord
from flightline.loadtest.result import Cell, Result, TrialResult, curve, knee, slo_held
from flightline.loadtest.saved import REQUESTS
from flightline.loadtest.slo import Slo
from flightline.loadtest.target import Target
from flightline.loadtest.telemetry import SERIES, Sampler
from flightline.loadtest.trial import Level, Outcome, Trial, run_trial
from flightline.loadtest.warmup import check_ready, require_new_prompts, wait_until_idle, warm_up
from flightline.loadtest.workload import Workload

TIMELINE_POINTS = 240
MIN_TRIAL_SAMPLES = 3
PROMPTS_APART = 10_000_000


class Experiment:
    """Trials against running servers, under one clock and one sampler."""

    def __init__(
        self,
        options: LoadOptions,
        arms: Sequence[Arm],
        server: Target,
        sampler: Sampler,
        work: Path,
        say: Callable[[str], None],
        ceiling: audit.Ceiling | None,
    ) -> None:
        self.options = options
        self.arms = list(arms)
        self.server = server
        self.sampler = sampler
        self.work = work
        self.say = say
        self.ceiling = ceiling
        self.workload = Workload.of(options.workload_spec)
        self.slo = Slo.parse(options.slo)
        self.outcomes: list[Outcome] = []
        self._used = Counter({arm.label: self._offset(arm) for arm in arms})
        self._number = 0

    def _offset(self, arm: Arm) -> int:
        """Two endpoints of one engine get different prompts: the second would find the first's in its cache.

        What is behind an OpenAI server may be the engine of any other contestant.
        """
        anywhere = any(one.openai for one in self.arms)
        candidates = [one for one in self.arms if one.endpoint != wire.HF_BASELINE]
        engine = [one for one in candidates if anywhere or one.url == arm.url]
        return PROMPTS_APART * engine.index(arm) if arm in engine else 0

    @property
    def first_ns(self) -> int:
        """When the first request was due: the zero of every report's clock."""
        return min((r.start_ns for o in self.outcomes for r in o.records), default=0)

    def check_ready(self) -> None:
        """Raises ClientError: an endpoint is not there."""
        for place, arm in enumerate(self.arms):
            if arm.openai:
                exact, token_ids = not self.options.natural_length, self.options.token_ids
                self.arms[place] = openai_probe.check_ready(
                    arm, exact=exact, token_ids=token_ids, say=self.say
                )
            else:
                check_ready(arm)

    def check_prompts(self) -> None:
        """Raises SettingsError: an engine has seen the prompts of this seed, which should all be new to it."""
        if not self._unique:
            return
        # Once an engine, since the second contestant would find the first's prompt there.
        engines = {arm.url: arm for arm in self.arms if arm.endpoint != wire.HF_BASELINE}
        for index, arm in enumerate(engines.values()):  # two addresses may lead to one engine
            require_new_prompts(arm, self.workload.prompt, self.options.seed, index)

    def warm_up(self, arm: Arm, concurrency: int) -> Pace:
        """Brings the endpoint to working temperature under this load, and tells how fast it is."""
        exact, length = not self.options.natural_length, self.workload.typical_output
        pace = warm_up(arm, self.workload.prompt, concurrency, length, exact=exact)
        wait_until_idle(arm)
        return pace

    def run(self, arm: Arm, level: Level, seconds: float, round_: int = 1) -> Outcome:
        """One trial. Prompts are new ones for the contestant; every contestant gets the same in turn."""
        self._number += 1
        trial = Trial(f"{self._number}-{arm.label}", arm, level, seconds, round_, self._used[arm.label])
        outcome = run_trial(trial, self.options, self.work, self.say)
        self._used[arm.label] += len(outcome.records) + 1
        self.outcomes.append(outcome)
        if outcome.failure is None:
            try:
                wait_until_idle(arm)
            except ClientError as error:
                outcome.failure = str(error)
        summary = self.summary([outcome])
        rate = summary.output_tokens_per_s
        told = outcome.failure or (
            f"{'n/a' if rate is None else format(rate, '.1f')} tokens/s, TTFT p50 {_ms(summary.ttft_s.p50)}, "
            f"TPOT p50 {_ms(summary.tpot_s.p50)}, {summary.completed} answered"
        )
        self.say(f"{trial.name} ({level.label}): {told}")
        return outcome

    def summary(self, outcomes: Sequence[Outcome]) -> Summary:
        return summarise(
            outcomes[0].trial.arm.label,
            [outcome.records for outcome in outcomes],
            [outcome.window for outcome in outcomes],
            self.slo,
            open_loop=not outcomes[0].trial.level.closed,
        )

    def cells(self) -> list[Cell]:
        """One per contestant and level, in the order in which they were first run."""
        groups: dict[tuple[str, Level], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.trial.arm.label, outcome.trial.level), []).append(outcome)
        return [self._cell(outcomes) for outcomes in groups.values()]

    def _cell(self, outcomes: list[Outcome]) -> Cell:
        trial, summary = outcomes[0].trial, self.summary(outcomes)
        windows = [outcome.window for outcome in outcomes if outcome.window]
        use = self.sampler.over(windows)
        tokens = sum(tokens_in(o.window, o.records) for o in outcomes if o.window)
        rate = summary.output_tokens_per_s
        return Cell(
            arm=trial.arm.label,
            endpoint=trial.arm.endpoint,
            level=trial.level.label,
            x=trial.level.x,
            closed=trial.level.closed,
            repeats=len(outcomes),
            summary=summary,
            health=audit.ClientHealth.of(
                [sample for outcome in outcomes for sample in outcome.clients],
                [record for outcome in outcomes for record in outcome.records],
                windows,
            ),
            utilisation=use,
            joules_per_token=use.gpu_energy_j / tokens if use.gpu_energy_j and tokens else None,
            cost_per_million=self.options.price / 3600 / rate * 1e6 if self.options.price and rate else None,
            slo_held=slo_held(summary, self.slo),
            over_capacity="; ".join(self._overload(outcomes)),
        )

    def _overload(self, outcomes: Sequence[Outcome]) -> list[str]:
        return [
            reason
            for outcome in outcomes
            if outcome.window and not outcome.trial.level.closed
            for reason in audit.overload_reasons(outcome.trial.name, outcome.records, outcome.window)
        ]

    def reasons(self, cells: Sequence[Cell], *, overload_is_a_result: bool) -> list[str]:
        """Why the whole run is INVALID.

        Args:
            overload_is_a_result: Sweeps and searches look for the load that is too much.
        """
        reasons = [f"{o.trial.name}: {o.failure}" for o in self.outcomes if o.failure]
        for outcome in self.outcomes:
            name = outcome.trial.name
            reasons += audit.request_reasons(name, outcome.records, unique=self._unique)
            if outcome.window and outcome.expected is not None:
                reasons += audit.sent_reasons(name, outcome.records, outcome.window, outcome.expected)
        for cell in cells:
            label = f"{cell.arm} at {cell.level}"
            reasons += audit.shape_reasons(label, cell.summary)
            reasons += [
                f"{label}: {why}" for why in audit.client_reasons(cell.health, cell.summary, self.ceiling)
            ]
            if cell.over_capacity and not overload_is_a_result:
                reasons.append(cell.over_capacity)
            if cell.utilisation.series.get("gpu_throttled", 0) > 0.01:
                reasons.append(f"{label}: heat or power slowed the GPU down")
        return list(dict.fromkeys(reasons))

    def _unsteady(self, cells: Sequence[Cell], trials: Sequence[TrialResult]) -> list[str]:
        reasons = []
        for cell in cells:
            mine = [t.output_tokens_per_s for t in trials if (t.arm, t.level) == (cell.arm, cell.level)]
            reasons += audit.unsteady_reasons(f"{cell.arm} at {cell.level}", mine)
        return reasons

    @property
    def _unique(self) -> bool:
        return not self.workload.shares_prefixes and self.workload.distinct is None

    def result(self, kind: str, title: str, *, overload_is_a_result: bool = False) -> Result:
        """Everything but what only the command knows."""
        cells = self.cells()
        trials = [self._trial(outcome) for outcome in self.outcomes]
        self._write_requests()
        labels = list(dict.fromkeys(cell.arm for cell in cells))
        knees = {label: knee([cell for cell in cells if cell.arm == label]) for label in labels}
        return Result(
            kind=kind,
            title=title,
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
            reasons=self.reasons(cells, overload_is_a_result=overload_is_a_result),
            unsteady=self._unsteady(cells, trials),
            limits=[],
            notes=self._notes(cells),
            slo=self.slo,
            ceiling=self.ceiling,
            cells=cells,
            trials=trials,
            knees={label: found.level for label, found in knees.items() if found},
            timeline=self._timeline(),
            distributions=self._distributions(),
            conditions=self._conditions(),
        )

    def checked(self, result: Result) -> Result:
        """The result with the user's assertions held against it."""
        result.check(parse_all(self.options.assert_))
        return result

    def _write_requests(self) -> None:
        """One line per request, for whoever wants to compute something else."""
        columns = ("start_s", "prompt_index", "num_input_tokens", "num_output_tokens", "ttft_s", "tpot_s", "e2e_s",
                   "stall_s", "outside_s", "schedule_delay_s", "cancelled", "problem")  # fmt: skip
        with (self.work / REQUESTS).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["repeat", "arm", "level", "measured", *columns])
            first_ns = self.first_ns
            for outcome in self.outcomes:
                trial, window = outcome.trial, outcome.window
                sample = latency_sample(window, outcome.records, not trial.level.closed) if window else []
                measured = {record.id for record in sample}
                for record in outcome.records:
                    values: list[object] = [(record.start_ns - first_ns) / 1e9]
                    values += [getattr(record, name) if record.chunk_ns else None for name in columns[1:]]
                    where = (trial.name, trial.arm.label, trial.level.label, int(record.id in measured))
                    writer.writerow([*where, *("" if value is None else value for value in values)])

    def _trial(self, outcome: Outcome) -> TrialResult:
        summary, window = self.summary([outcome]), outcome.window
        open_loop = not outcome.trial.level.closed
        sample = latency_sample(window, outcome.records, open_loop) if window else []
        times = [record.start_ns for record in outcome.records] or [self.first_ns]
        start, end = (window.start_ns, window.end_ns) if window else (min(times), max(times))
        return TrialResult(
            name=outcome.trial.name,
            arm=outcome.trial.arm.label,
            level=outcome.trial.level.label,
            round=outcome.trial.round,
            start_s=(start - self.first_ns) / 1e9,
            end_s=(end - self.first_ns) / 1e9,
            output_tokens_per_s=summary.output_tokens_per_s,
            ttft_p50_s=_median([record.ttft_s for record in sample]),
            tpot_p50_s=_median([record.tpot_s for record in sample]),
            e2e_p50_s=_median([record.e2e_s for record in sample]),
            answered=summary.completed,
            cut_off=summary.cut_off,
            failed=summary.failed,
            planned_s=outcome.trial.seconds,
        )

    def _notes(self, cells: Sequence[Cell]) -> list[str]:
        lines = []
        if self.workload.shares_prefixes:
            lines.append(
                "The workload shares prefixes: a prefix cache is meant to help, and it does where there is one."
            )
        used = (
            max(
                (r.prompt_index for o in self.outcomes for r in o.records if r.prompt_index < 10**6),
                default=0,
            )
            + 1
        )
        if self.workload.distinct is not None and used > self.workload.distinct:
            repeated = f"{used} prompts were needed and the file has {self.workload.distinct}"
            lines.append(f"{repeated}: repeated ones may come from a prefix cache.")
        for arm in self.arms:
            if arm.openai:
                counted = (
                    "ids of the tokens"
                    if arm.token_ids
                    else "pieces of text, of which there are at most as many"
                )
                lines.append(
                    f"Output tokens of {arm.label} are those of its usage, held against the {counted}."
                )
        if self.sampler.gpus.missing:
            lines.append(f"GPU figures are n/a: {self.sampler.gpus.missing}.")
        lines += [f"{url} could not be read: {why}." for url, why in self.sampler.missing.items()]
        if self.ceiling is None:
            lines.append("The load generator was not calibrated (CALIBRATE_S=0): its ceiling is not known.")
        if all(cell.summary.outside_s.n == 0 for cell in cells):
            lines.append("The server tells no times of its own: client against server could not be compared.")
        return lines

    def _conditions(self) -> dict:
        given = conditions.gather(self.options, self.sampler.gpus, self.server.deployment)
        lengths = "at most" if self.options.natural_length else "exactly (min_tokens = max_tokens)"
        levels = list(dict.fromkeys(outcome.trial.level for outcome in self.outcomes))
        loads = ["closed loop"] if any(level.closed for level in levels) else []
        if any(level.rate for level in levels):
            loads.append(f"open loop, {self.options.arrivals} arrivals")
        loads += [f"trace {level.trace}" for level in levels if level.trace]
        given["load"] = f"{', '.join(loads)}; streaming, greedy; answers as long as asked for, {lengths}"
        given["workload"] = self.workload.describe()
        only_openai = ("api", "token_ids")
        given["arms"] = [
            {name: value for name, value in asdict(arm).items() if arm.openai or name not in only_openai}
            for arm in self.arms
        ]
        return given

    def _timeline(self) -> dict:
        """Tokens/s and requests in flight of each contestant, and the sampler's series, on one axis."""
        records = [record for outcome in self.outcomes for record in outcome.records]
        ends = [record.chunk_ns[-1] for record in records if record.chunk_ns]
        if not ends:
            return {}
        start = self.first_ns
        seconds = (max(ends) - start) / 1e9
        step_s = max(0.5, round(seconds / TIMELINE_POINTS, 1))
        count = int(seconds / step_s) + 1
        lines: list[dict] = []
        for arm in dict.fromkeys(outcome.trial.arm.label for outcome in self.outcomes):
            mine = [r for o in self.outcomes if o.trial.arm.label == arm for r in o.records]
            tokens, held = _binned(mine, start, step_s, count)
            lines.append({"name": "Output tokens/s", "arm": arm, "unit": "", "y": tokens})
            lines.append({"name": "Requests in flight", "arm": arm, "unit": "", "y": held})
        lines += self._sampled(start, step_s, count)
        return {"t": [round(i * step_s, 3) for i in range(count)], "lines": lines}

    def _sampled(self, start_ns: int, step_s: float, count: int) -> list[dict]:
        bins: dict[str, list[list[float]]] = {}

        def put(name: str, at_ns: int, value: float) -> None:
            number = int((at_ns - start_ns) / 1e9 // step_s)
            if 0 <= number < count:
                bins.setdefault(name, [[] for _ in range(count)])[number].append(value)

        samples = self.sampler.samples
        cores = conditions.cores()
        for before, sample in itertools.pairwise(samples):
            seconds = (sample.time_ns - before.time_ns) / 1e9
            busy = (sample.busy_s - before.busy_s) / seconds / cores
            put("CPU of the machine|%", sample.time_ns, min(100.0, 100 * busy))  # its clock ticks in 10 ms
            for field, title in (
                ("gpu_percent", "GPU utilisation|%"),
                ("gpu_memory_mib", "GPU memory|MiB"),
                ("gpu_power_w", "GPU power|W"),
            ):
                value = getattr(sample, field)
                if value is not None:
                    put(title, sample.time_ns, value)
            for name, series in SERIES.items():
                if name in sample.series:
                    put(f"{series.title}|{series.unit}", sample.time_ns, sample.series[name] * series.scale)
        client = "CPU of the load generator|% of a core"
        for outcome in self.outcomes:
            workers: dict[int, list] = {}
            for seen in outcome.clients:
                workers.setdefault(seen.worker, []).append(seen)
            for mine in workers.values():
                for earlier, later in itertools.pairwise(mine):
                    passed = (later.time_ns - earlier.time_ns) / 1e9
                    # One mean for all steps that it is of.
                    for number in range(math.ceil(passed / step_s)):
                        at_ns = later.time_ns - int(number * step_s * 1e9)
                        put(client, at_ns, 100 * (later.cpu_s - earlier.cpu_s) / passed)
        return [
            {
                "name": name.split("|")[0],
                "arm": "",
                "unit": name.split("|")[1],
                "y": [round(sum(values) / len(values), 3) if values else None for values in columns],
            }
            for name, columns in bins.items()
            if any(max(values, default=0.0) for values in columns)
        ]

    def _distributions(self) -> list[dict]:
        groups: dict[tuple[str, str], list[RequestRecord]] = {}
        for outcome in self.outcomes:
            if outcome.window:
                key = (outcome.trial.arm.label, outcome.trial.level.label)
                groups.setdefault(key, []).extend(
                    latency_sample(outcome.window, outcome.records, not outcome.trial.level.closed)
                )
        found = []
        for (arm, level), records in groups.items():
            for metric in ("ttft", "tpot", "e2e", "stall"):
                samples = [v for r in records if (v := getattr(r, f"{metric}_s")) is not None]
                if len(samples) >= 2:
                    x, y = curve(samples)
                    found.append(
                        {"arm": arm, "level": level, "metric": metric, "n": len(samples), "x": x, "y": y}
                    )
        return found


def _binned(
    records: Sequence[RequestRecord], start_ns: int, step_s: float, count: int
) -> tuple[list[float | None], list[float | None]]:
    """Tokens/s, and the mean number in flight, in each step; None where there was no request."""
    tokens, held = np.zeros(count), np.zeros(count)
    edges = start_ns + np.arange(count + 1) * step_s * 1e9
    for record in records:
        if not record.chunk_ns:
            continue
        at = np.minimum(((np.array(record.chunk_ns) - start_ns) / 1e9 / step_s).astype(int), count - 1)
        np.add.at(tokens, at, np.diff(record.chunk_tokens, prepend=0))
        low, high = np.maximum(edges[:-1], record.start_ns), np.minimum(edges[1:], record.chunk_ns[-1])
        held += np.maximum(0, high - low) / (step_s * 1e9)
    empty = held == 0
    return (
        [
            None if none else round(float(value) / step_s, 2)
            for value, none in zip(tokens, empty, strict=True)
        ],
        [None if none else round(float(value), 3) for value, none in zip(held, empty, strict=True)],
    )


def _median(values: Sequence[float | None]) -> float | None:
    """Of one repeat, where fewer samples will do: its uncertainty shows in the spread of the repeats."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if len(known) >= MIN_TRIAL_SAMPLES else None


def _ms(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
