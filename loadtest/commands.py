"""``python -m loadtest run | compare | sweep | search``: what each does with an experiment.

Exit status: 0 the run is VALID and every assertion holds, 1 it is INVALID or could not be done, 2 a setting is
wrong, 3 an assertion does not hold, 130 Ctrl-C before anything was measured.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from client import ClientError, wire
from loadtest import comparison, output
from loadtest.calibrate import calibrate
from loadtest.config import ConfigError
from loadtest.experiment import Experiment
from loadtest.options import (
    Arm,
    CompareOptions,
    LoadOptions,
    RunOptions,
    SearchOptions,
    SweepOptions,
    concurrencies,
    parse_arms,
    parse_levels,
)
from loadtest.plan import BLOCK_OVERHEAD_S
from loadtest.records import RecordsFull
from loadtest.result import Cell, Result, Search
from loadtest.saved import Saved
from loadtest.target import TargetError, target
from loadtest.telemetry import Sampler
from loadtest.trial import Level, LoadError

MIN_ROUNDS = 2
START_ALLOWANCE_S = 3.0


def main(command: str, arguments: list[str]) -> int:
    """Runs one of the commands; errors of the user's and of the server's are one line."""
    started_s = time.monotonic()
    try:
        if command == "compare" and arguments and not arguments[0].startswith("-"):
            return compare_saved(arguments)
        options_of: dict[str, type[LoadOptions]] = {
            "run": RunOptions,
            "compare": CompareOptions,
            "sweep": SweepOptions,
            "search": SearchOptions,
        }
        options = options_of[command].from_arguments(command, arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    body: Callable[[Experiment], Result] = {
        "run": run,
        "compare": lambda experiment: compare(experiment, started_s),
        "sweep": sweep,
        "search": search,
    }[command]
    try:
        return conduct(options, body)
    except (LoadError, TargetError, ClientError, RecordsFull, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: no report was written", file=sys.stderr)
        return 130


def conduct(options: LoadOptions, body: Callable[[Experiment], Result]) -> int:
    """Server, calibration, the command's trials, and the report."""
    reports = Path(options.reports).resolve()
    reports.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".running-", dir=reports))
    work.chmod(0o755)
    try:
        ceiling = calibrate(options.calibrate_s, work, say) if options.calibrate_s else None
        contestants = _arms(options)
        baseline = any(arm.endpoint == wire.HF_BASELINE for arm in contestants)
        with target(options.url or _first_url(options), options.build_dir, say, baseline=baseline) as server:
            arms = [replace(arm, url=arm.url or server.url) for arm in contestants]
            metrics_url = options.metrics_url or server.metrics_url
            with Sampler(server.pids, metrics_url, options.dcgm_url) as sampler:
                experiment = Experiment(options, arms, server, sampler, work, say, ceiling)
                experiment.check_ready()
                result = experiment.checked(body(experiment))
        folder = output.publish(result, work, reports, datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(output.console(result, folder))
    return result.status


def compare_saved(arguments: list[str]) -> int:
    """``compare RUN_A RUN_B``: two report folders, the second against the first.

    Raises:
        ConfigError: a folder without a result of ours, or two runs without a common load.
    """
    if len(arguments) != 2:
        raise ConfigError("compare takes two report folders, or options that begin with --")
    folders = [Path(folder) for folder in arguments]
    result = comparison.merge([Saved.load(folder) for folder in folders])
    reports = folders[1].resolve().parent
    work = Path(tempfile.mkdtemp(prefix=".running-", dir=reports))
    work.chmod(0o755)
    try:
        folder = output.publish(result, work, reports, datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(output.console(result, folder))
    return result.status


def _first_url(options: LoadOptions) -> str:
    """An address among the arms: then no server is started here."""
    arms = parse_arms(getattr(options, "arms", ""), "")
    return next((arm.url for arm in arms if arm.url), "")


def _arms(options: LoadOptions) -> list[Arm]:
    """Addresses that are empty are those of the target."""
    if isinstance(options, RunOptions | SearchOptions):
        return [Arm(options.endpoint, "", options.endpoint)]
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


def compare(experiment: Experiment, started_s: float) -> Result:
    """All arms at all levels in interleaved rounds: A B, B A, A B, ...: drift hits both alike."""
    options, arms = experiment.options, experiment.arms
    assert isinstance(options, CompareOptions)
    levels = [Level(concurrency=c) for c in concurrencies("levels", options.levels)]
    lengths = {}
    for arm in arms:
        for level in levels:
            pace = experiment.warm_up(arm, level.concurrency)
            lengths[arm, level] = pace.block_s(level.concurrency), pace.block_s(level.concurrency, short=True)
            say(f"warm-up of {arm.label}, {level.label}: a block needs {lengths[arm, level][0]:.0f} s")
    left_s = options.budget_s - (time.monotonic() - started_s) - START_ALLOWANCE_S
    seconds, rounds = plan(lengths, options.rounds, left_s)
    total_s = rounds * sum(length + BLOCK_OVERHEAD_S for length in seconds.values())
    say(f"plan: {rounds} rounds of {len(seconds)} blocks, {total_s:.0f} s")
    if total_s > left_s + 1:
        say(
            f"{MIN_ROUNDS} short rounds do not fit BUDGET_S={options.budget_s:g} at this load; "
            f"they are done all the same"
        )
    for number in range(1, rounds + 1):
        order = arms if number % 2 else list(reversed(arms))
        for level in levels:
            for arm in order:
                experiment.run(arm, level, seconds[arm, level], number)
                if experiment.outcomes[-1].failure:
                    return _compared(experiment)
    return _compared(experiment)


def plan(
    lengths: dict[tuple[Arm, Level], tuple[float, float]], rounds: int, budget_s: float
) -> tuple[dict[tuple[Arm, Level], float], int]:
    """Seconds of each block and the number of rounds that the budget holds; at least two, if it must be short ones.

    Args:
        lengths: (full, short) seconds of a block of each arm and level; a short one shows no latency of a
            server that answers one by one.
    """
    full, short = ({key: both[i] for key, both in lengths.items()} for i in (0, 1))
    for seconds, least in ((full, min(rounds, 3)), (short, MIN_ROUNDS)):
        round_s = sum(length + BLOCK_OVERHEAD_S for length in seconds.values())
        fitting = min(rounds, int(budget_s // round_s))
        if fitting >= least:
            return {key: float(round(length)) for key, length in seconds.items()}, fitting
    round_s = sum(length + BLOCK_OVERHEAD_S for length in full.values())
    chosen = full if budget_s >= MIN_ROUNDS * round_s else short
    return {key: float(round(length)) for key, length in chosen.items()}, MIN_ROUNDS


def _compared(experiment: Experiment) -> Result:
    labels = [arm.label for arm in experiment.arms]
    result = experiment.result("compare", " against ".join(reversed(labels)))
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
        for number, level in enumerate(levels, 1):
            say(f"{arm.label}: level {number} of {len(levels)}")
            if counts and number > 1:
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
            limit = f"PRECISION={options.precision:g}"
            break
        if bad is not None and good is None and rate <= options.start / 2**6:
            limit = "even the lowest rate breaks the SLO"
            break
        rate = (
            2 * good
            if bad is None and good
            else bad / 2
            if good is None and bad
            else ((good or 0) * (bad or 0)) ** 0.5
        )
    result = experiment.result(
        "search", f"{arm.label}: highest rate that holds the SLO", overload_is_a_result=True
    )
    result.search = Search(good, bad, trials, limit)
    if good is None:
        result.reasons.append(f"no rate from {rate:.4g} requests/s on holds {experiment.slo.describe()}")
    elif bad is None:
        result.limits.append("no rate was found that breaks the SLO: raise MOST_TRIALS or START")
    return result


def holds(cell: Cell, options: LoadOptions) -> bool:
    """The share is taken as it is: a trial of a search has seldom the samples that would make a p99 certain."""
    from loadtest.slo import Slo

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
