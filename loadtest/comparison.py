"""Contestants against each other: at equal load, each at its best, and at the SLO."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from flightline.loadtest.confidence import Ratio, bootstrap_ratio, ratio_of_rounds
from flightline.loadtest.definitions import P50_SAMPLES
from flightline.loadtest.result import Cell, Comparison, Result, TrialResult
from flightline.loadtest.saved import Saved
from flightline.settings import SettingsError

METRICS = {
    "output_tokens_per_s": "output_tokens_per_s",
    "ttft_p50": "ttft_p50_s",
    "tpot_p50": "tpot_p50_s",
    "e2e_p50": "e2e_p50_s",
}
"""Name of a comparison's metric -> field of a trial."""


def compare(result: Result, labels: Sequence[str]) -> list[Comparison]:
    """Neighbours in the order of the labels, and the last against the first: how the gain splits up.

    Each ratio is of (second, first) for throughput and of (first, second) for times, so that more than 1 is
    in favour of the second.
    """
    pairs = list(itertools.pairwise(labels))
    if len(labels) > 2:
        pairs.append((labels[0], labels[-1]))
    found: list[Comparison] = []
    for first, second in pairs:
        mine = {label: [cell for cell in result.cells if cell.arm == label] for label in (first, second)}
        for level in dict.fromkeys(cell.level for cell in mine[first]):
            if any(cell.level == level for cell in mine[second]):
                found += [_at(result, level, first, second, metric) for metric in METRICS]
        if max(map(len, mine.values())) > 1:  # else there is no level to choose
            found += _at_best(result, mine[first], mine[second], first, second)
            found += _at_slo(result, mine[first], mine[second], first, second)
    return found


def _at(result: Result, level: str, first: str, second: str, metric: str) -> Comparison:
    return _comparison(result, metric, level, (first, level), (second, level))


def _comparison(
    result: Result, metric: str, condition: str, one: tuple[str, str], other: tuple[str, str], note: str = ""
) -> Comparison:
    """``one`` and ``other`` are (contestant, level)."""
    field = METRICS[metric]
    ours, theirs = (_by_round(result.trials, *where, field) for where in (one, other))
    less_is_better = metric != "output_tokens_per_s"
    rounds = [
        [(a, b) if less_is_better else (b, a) for a in ours[number] for b in theirs[number]]
        for number in sorted(set(ours) & set(theirs))
    ]
    a, b = (_pooled(result.cells, *where, metric) for where in (one, other))
    return Comparison(metric, condition, one[0], other[0], a, b, ratio_of_rounds(rounds), note)


def _by_round(
    trials: Sequence[TrialResult], arm: str, level: str, field: str
) -> dict[int, list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for trial in trials:
        if (trial.arm, trial.level) == (arm, level):
            found.setdefault(trial.round, []).append(getattr(trial, field))
    return found


def _pooled(cells: Sequence[Cell], arm: str, level: str, metric: str) -> float | None:
    cell = next(cell for cell in cells if cell.arm == arm and cell.level == level)
    if metric == "output_tokens_per_s":
        return cell.summary.output_tokens_per_s
    return getattr(cell.summary, metric.replace("_p50", "_s")).p50


def _at_best(
    result: Result, first_cells: Sequence[Cell], second_cells: Sequence[Cell], first: str, second: str
) -> list[Comparison]:
    best = [_fastest(cells) for cells in (first_cells, second_cells)]
    if best[0] is None or best[1] is None:
        return []
    one, other = best[0], best[1]
    note = f"{first} at {one.level}, {second} at {other.level}"
    where = (first, one.level), (second, other.level)
    return [_comparison(result, "output_tokens_per_s", "each at its best", *where, note)]


def _at_slo(
    result: Result, first_cells: Sequence[Cell], second_cells: Sequence[Cell], first: str, second: str
) -> list[Comparison]:
    """The most throughput that each gives while it keeps the SLO."""
    needed = result.slo.percent / 100
    kept = [
        _fastest([c for c in cells if c.summary.attained is not None and c.summary.attained >= needed])
        for cells in (first_cells, second_cells)
    ]
    condition = f"at the SLO {result.slo.name}"
    if kept[0] is None or kept[1] is None:
        who = [label for label, cell in zip((first, second), kept, strict=True) if cell is None]
        a, b = (cell.summary.output_tokens_per_s if cell else None for cell in kept)
        note = f"{' and '.join(who)} kept it at no level"
        return [Comparison("output_tokens_per_s", condition, first, second, a, b, Ratio(None), note)]
    one, other = kept[0], kept[1]
    note = f"{first} at {one.level}, {second} at {other.level}"
    where = (first, one.level), (second, other.level)
    return [_comparison(result, "output_tokens_per_s", condition, *where, note)]


def _fastest(cells: Sequence[Cell]) -> Cell | None:
    measured = [
        cell for cell in cells if cell.summary.output_tokens_per_s is not None and not cell.over_capacity
    ]
    return max(measured, key=lambda cell: cell.summary.output_tokens_per_s or 0.0, default=None)


def limits(result: Result) -> list[str]:
    """What a comparison leaves open."""
    lines = []
    for cell in result.cells:
        if cell.summary.output_tokens_per_s is not None and cell.summary.e2e_s.p50 is None:
            lines.append(
                f"no latency of {cell.arm} at {cell.level} ({cell.summary.e2e_s.n} of its requests began and ended in "
                f"the windows, a median needs {P50_SAMPLES}): raise BUDGET_S"
            )
    return lines


def merge(saved: Sequence[Saved]) -> Result:
    """One result of two runs, the second against the first, at the loads that both have.

    They were not interleaved: what the machine did otherwise meanwhile is in the ratio, and no repeats pair up.
    So the intervals are bootstrapped over requests, and over seconds for the throughput.

    Raises:
        SettingsError: no common load.
    """
    one, other = saved
    levels = [c.level for c in one.result.cells if any(d.level == c.level for d in other.result.cells)]
    if not levels:
        raise SettingsError(f"{one.name} and {other.name} have no load in common")
    result = replace(
        one.result,
        kind="compare",
        title=f"{other.name} against {one.name}",
        reasons=[f"{run.name}: {reason}" for run in saved for reason in run.result.reasons],
        unsteady=[f"{run.name}: {reason}" for run in saved for reason in run.result.unsteady],
        notes=[
            "Two saved runs: not interleaved, so the ratios hold what else happened on the machine.",
            *(f"{run.name}: {note}" for run in saved for note in run.result.notes),
        ],
        cells=[_renamed(cell, run.name) for run in saved for cell in run.result.cells],
        trials=[],
        comparisons=[],
        knees={},
        search=None,
        timeline={},
        distributions=[_renamed(d, run.name) for run in saved for d in run.result.distributions],
        conditions={run.name: run.result.conditions for run in saved},
    )
    for level in dict.fromkeys(levels):
        arms = [next(c.arm for c in run.result.cells if c.level == level) for run in saved]
        first, second = (_renamed_arm(run.name, arm) for run, arm in zip(saved, arms, strict=True))
        for metric in METRICS:
            samples = [run.samples(arm, level, metric) for run, arm in zip(saved, arms, strict=True)]
            if metric == "output_tokens_per_s":
                ratio = bootstrap_ratio(samples[1], samples[0], None)
            else:
                ratio = bootstrap_ratio(samples[0], samples[1])
            a, b = (_pooled(result.cells, label, level, metric) for label in (first, second))
            result.comparisons.append(Comparison(metric, level, first, second, a, b, ratio))
    return result


def _renamed_arm(run: str, arm: str) -> str:
    return f"{run}: {arm}"


def _renamed(thing, run: str):
    if isinstance(thing, dict):
        return {**thing, "arm": _renamed_arm(run, thing["arm"])}
    return replace(thing, arm=_renamed_arm(run, thing.arm))
