"""``python -m flightline.loadtest run | compare | bench | sweep | search``: what each does with an experiment.

Exit status: 0 the run is VALID and every assertion holds, 1 it is INVALID, UNSTEADY or could not be done, 2 a setting
is wrong, 3 an assertion does not hold, 130 Ctrl-C before anything was measured.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from flightline import settings
from flightline.client import ClientError, wire
from flightline.loadtest import comparison, output
from flightline.loadtest.calibrate import calibrate
from flightline.loadtest.experiment import Experiment
from flightline.loadtest.options import (
    OPTIONS,
    Arm,
    BenchOptions,
    CompareOptions,
    LoadOptions,
    RunOptions,
    SearchOptions,
    SweepOptions,
    concurrencies,
    parse_arms,
    parse_levels,
)
from flightline.loadtest.plan import Key, Pace, Plan, plan
from flightline.loadtest.records import RecordsFull
from flightline.loadtest.result import Cell, Result, Search
from flightline.loadtest.saved import Saved
from flightline.loadtest.slo import Slo
from flightline.loadtest.target import TargetError, target
from flightline.loadtest.telemetry import Sampler
from flightline.loadtest.trial import Level, LoadError
from flightline.loadtest.words import number
from flightline.settings import SettingsError

START_ALLOWANCE_S = 3.0


def main(command: str, arguments: list[str]) -> int:
    """Runs one of the commands; errors of the user's and of the server's are one line."""
    started_s = time.monotonic()
    try:
        if command == "compare" and arguments and not arguments[0].startswith("-"):
            return compare_saved(arguments)
        options = settings.load(OPTIONS[command], f"flightline loadtest {command}", arguments)
        if isinstance(options, BenchOptions):
            options = options.compared()
            say(f"BUDGET_S={options.budget_s:g}")
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    body: Callable[[Experiment], Result] = {
        "run": run,
        "compare": lambda experiment: compare(experiment, started_s),
        "bench": lambda experiment: compare(experiment, started_s, kind="bench"),
        "sweep": sweep,
        "search": search,
    }[command]
    try:
        return conduct(options, body)
    except SettingsError as error:  # a setting that only the server shows to be wrong
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (LoadError, TargetError, ClientError, RecordsFull, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: no report was written", file=sys.stderr)
        return 130


def conduct(options: LoadOptions, body: Callable[[Experiment], Result]) -> int:
    """Server, calibration, the command's trials, and the report."""
    contestants = _arms(options)
    baseline = any(arm.endpoint == wire.HF_BASELINE for arm in contestants)
    reports = Path(options.reports).resolve()
    with working_folder(reports) as work:
        protocols = sorted({arm.openai for arm in contestants}) if options.calibrate_s else []
        ceilings = [calibrate(options.calibrate_s, work, say, openai) for openai in protocols]
        ceiling = min(ceilings, key=lambda found: found.tokens_per_s, default=None)
        url = options.url or next((arm.url for arm in contestants if arm.url and not arm.openai), "")
        if not url and all(arm.url for arm in contestants):
            url = contestants[0].url  # no Triton is needed
        with target(url, options.build_dir, say, baseline=baseline) as server:
            arms = [replace(arm, url=arm.url or server.url, api=options.openai_api) for arm in contestants]
            metrics_url = options.metrics_url or server.metrics_url
            with Sampler(server.pids, metrics_url, options.dcgm_url) as sampler:
                experiment = Experiment(options, arms, server, sampler, work, say, ceiling)
                experiment.check_ready()
                experiment.check_prompts()
                result = experiment.checked(body(experiment))
        return publish(result, work, reports)


@contextmanager
def working_folder(reports: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it was published."""
    reports.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".running-", dir=reports))
    work.chmod(0o755)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(result: Result, work: Path, reports: Path) -> int:
    """Writes and prints the report; returns the exit status."""
    folder = output.publish(result, work, reports, datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))
    print(output.console(result, folder))
    return result.status


def compare_saved(arguments: list[str]) -> int:
    """``compare RUN_A RUN_B``: two report folders, the second against the first.

    Raises:
        SettingsError: a folder without a result of ours, or two runs without a common load.
    """
    if len(arguments) != 2:
        raise SettingsError("compare takes two report folders, or options that begin with --")
    folders = [Path(folder) for folder in arguments]
    result = comparison.merge([Saved.load(folder) for folder in folders])
    reports = folders[1].resolve().parent
    with working_folder(reports) as work:
        return publish(result, work, reports)


def _arms(options: LoadOptions) -> list[Arm]:
    """Addresses that are empty are those of the target."""
    if isinstance(options, RunOptions | SearchOptions):
        return parse_arms(options.endpoint, "")
    given = parse_arms(getattr(options, "arms", ""), "")
    if given:
        return given
    both = [Arm(wire.HF_BASELINE, "", wire.HF_BASELINE), Arm(wire.TEXT_GENERATION, "", wire.TEXT_GENERATION)]
    return both if isinstance(options, CompareOptions) else both[1:]


def run(experiment: Experiment) -> Result:
    """One load on one endpoint."""
    options, arm = experiment.options, experiment.arms[0]
    assert isinstance(options, RunOptions)
    if options.rate or options.trace:
        level = Level(rate=options.rate, trace=options.trace, trace_speed=options.trace_speed)
        experiment.warm_up(arm, 4)
    else:
        level = Level(concurrency=options.concurrency)
        experiment.warm_up(arm, options.concurrency)
    experiment.run(arm, level, options.seconds)
    return experiment.result("run", f"{arm.label}, {level.label}")


def compare(experiment: Experiment, started_s: float, kind: str = "compare") -> Result:
    """All arms at all levels in interleaved rounds: A B, B A, A B, ...: drift hits both alike."""
    options, arms = experiment.options, {arm.label: arm for arm in experiment.arms}
    assert isinstance(options, CompareOptions)
    levels = {level.label: level for level in map(Level, concurrencies("levels", options.levels))}
    paces = {}
    for contestant in arms.values():
        for load in levels.values():
            pace = paces[contestant.label, load.label] = experiment.warm_up(contestant, load.concurrency)
            say(
                f"warm-up of {contestant.label}, {load.label}: the requests take about {number(pace.wave_s)} s"
            )
    left_s = options.budget_s - (time.monotonic() - started_s) - START_ALLOWANCE_S
    lengths = {}
    for (arm, level), pace in paces.items():
        users = levels[level].concurrency
        lengths[arm, level] = pace.block_s(users), pace.block_s(users, short=True)
    chosen = plan(lengths, options.rounds, options.full_rounds, left_s)
    if options.stretch:
        chosen = chosen.stretched(left_s)
    _tell(chosen, paces, options.budget_s, left_s)
    for round_, order in enumerate(chosen.orders(list(arms)), 1):
        for load in levels.values():
            for label in order:
                experiment.run(arms[label], load, chosen.seconds[label, load.label], round_)
                if experiment.outcomes[-1].failure:
                    return compared(experiment, kind)
    return compared(experiment, kind)


def _tell(chosen: Plan, paces: dict[Key, Pace], budget_s: float, left_s: float) -> None:
    """What will be done, and what the budget is too short for."""
    blocks = ", ".join(f"{arm} {seconds} s at {level}" for (arm, level), seconds in chosen.seconds.items())
    say(f"plan: {chosen.rounds} round(s) of {blocks}: {chosen.total_s:.0f} s")
    if chosen.total_s > left_s + 1:
        say(f"the shortest plan does not fit BUDGET_S={budget_s:g} at this load; it is done all the same")
    for (arm, level), pace in paces.items():
        if not pace.shows_latency(chosen.seconds[arm, level]):
            about = f"about {number(pace.wave_s)} s each"
            say(f"BUDGET_S={budget_s:g} is too short for latencies of {arm}, {level} ({about})")


def compared(experiment: Experiment, kind: str) -> Result:
    """What the trials of a comparison found."""
    labels = [arm.label for arm in experiment.arms]
    result = experiment.result(kind, " against ".join(reversed(labels)))
    result.cells.sort(
        key=lambda cell: (cell.x or 0, labels.index(cell.arm))
    )  # a lone round begins with the last
    result.comparisons = comparison.compare(result, labels)
    result.limits += comparison.limits(result)
    return result


def sweep(experiment: Experiment) -> Result:
    """Each arm at each level, from low to high; ends early when a rate is more than the arm holds."""
    options = experiment.options
    assert isinstance(options, SweepOptions)
    counts, rates = parse_levels("levels", options.levels)
    levels = [Level(concurrency=c) for c in counts] or [Level(rate=f"{rate:g}") for rate in rates]
    for arm in experiment.arms:
        experiment.warm_up(arm, min(counts or [4]))
        for place, level in enumerate(levels, 1):
            say(f"{arm.label}: level {place} of {len(levels)}")
            if counts and place > 1:
                experiment.warm_up(arm, level.concurrency)
            experiment.run(arm, level, options.seconds)
            cell = experiment.cells()[-1]
            if experiment.outcomes[-1].failure or cell.over_capacity:
                if cell.over_capacity:
                    say(f"{arm.label}: {level.label} is more than it holds; the sweep of it ends here")
                break
    title = f"{', '.join(arm.label for arm in experiment.arms)}: {'concurrency' if counts else 'rate'} sweep"
    result = experiment.result("sweep", title, overload_is_a_result=True)
    if len(experiment.arms) > 1:
        labels = [arm.label for arm in experiment.arms]
        result.comparisons = comparison.compare(result, labels)
    return result


def search(experiment: Experiment) -> Result:
    """Doubles the rate until the SLO breaks, then halves the interval."""
    options, arm = experiment.options, experiment.arms[0]
    assert isinstance(options, SearchOptions)
    experiment.warm_up(arm, 4)
    good: float | None = None
    bad: float | None = None
    rate, trials, limit = options.start, 0, f"MOST_TRIALS={options.most_trials}"
    while trials < options.most_trials:
        trials += 1
        experiment.run(arm, Level(rate=f"{rate:.4g}"), options.seconds)
        if experiment.outcomes[-1].failure:
            limit = "a trial failed"
            break
        cell = experiment.cells()[-1]
        if holds(cell, options):
            good = rate
        else:
            bad = rate
        say(f"{rate:.4g} requests/s {'hold' if good == rate else 'break'} the SLO ({_attained(cell)})")
        if good is not None and bad is not None and bad / good <= 1 + options.precision:
            limit = f"SEARCH_PRECISION={options.precision:g}"
            break
        if bad is not None and good is None and rate <= options.start / 2**6:
            limit = "even the lowest rate breaks the SLO"
            break
        rate = _next_rate(good, bad)
    result = experiment.result(
        "search", f"{arm.label}: highest rate that holds the SLO", overload_is_a_result=True
    )
    result.search = Search(good, bad, trials, limit)
    if good is None:
        result.reasons.append(f"no rate from {rate:.4g} requests/s on holds {experiment.slo.describe()}")
    elif bad is None:
        result.limits.append("no rate was found that breaks the SLO: raise MOST_TRIALS or START")
    return result


def _next_rate(good: float | None, bad: float | None) -> float:
    """Between the two if both are known, else on from the one that is."""
    if good is None:
        return (bad or 0.0) / 2
    return 2 * good if bad is None else (good * bad) ** 0.5


def holds(cell: Cell, options: LoadOptions) -> bool:
    """The share is taken as it is: a trial of a search has seldom the samples that would make a p99 certain."""
    attained = cell.summary.attained
    return (
        not cell.over_capacity and attained is not None and attained >= Slo.parse(options.slo).percent / 100
    )


def _attained(cell: Cell) -> str:
    attained = cell.summary.attained
    share = "n/a" if attained is None else f"{100 * attained:.1f} % kept it"
    return f"{share}, n={cell.summary.e2e_s.n}" + (", over capacity" if cell.over_capacity else "")


def say(text: str) -> None:
    print(f"loadtest: {text}", flush=True)
