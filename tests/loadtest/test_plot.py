"""Pictures of reports, on those that were measured on an H200."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

from flightline.loadtest import plot
from flightline.loadtest.result import Result
from flightline.loadtest.saved import build
from flightline.loadtest.workload import Workload, WorkloadSpec
from tests.loadtest.made import bench

REPORTS = Path(__file__).resolve().parents[2] / "benchmarks" / "h200"


def measured(name: str) -> Result:
    return build(Result, json.loads((REPORTS / name / "report.json").read_text()))


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """Draws a result; returns the panels, and all texts of the picture with those of its panels."""

    def draw(result):
        figures = []
        monkeypatch.setattr(plot.plt, "close", figures.append)
        plot.summary(result, tmp_path / "summary.png")
        monkeypatch.undo()
        figure = figures[0]
        found = [t.get_text() for t in figure.texts] + [
            t.get_text() for axes in figure.axes for t in axes.texts
        ]
        plt.close(figure)
        assert matplotlib.image.imread(tmp_path / "summary.png").shape[1] == 1600
        return figure.axes, found

    return draw


def test_a_comparison_at_two_loads_is_bars_with_the_ratios_of_the_report(texts):
    result = measured("headline")
    panels, found = texts(result)
    assert len(panels) == 4 and not any(axes.lines for axes in panels)
    ratios = {(c.metric, c.condition): c.ratio.value for c in result.comparisons}
    assert f"{ratios['output_tokens_per_s', '64 in flight']:.1f}× the throughput" in found
    assert f"1/{ratios['e2e_p50', '1 in flight']:.1f} of the latency" in found
    rates = [c.summary.output_tokens_per_s for c in result.cells if c.arm == "text_generation"]
    assert f"{rates[1]:,.0f} tok/s" in found


def test_a_comparison_at_one_load_is_two_panels_and_without_medians_compares_the_means(texts, tmp_path):
    panels, found = texts(bench(tmp_path))
    assert len(panels) == 2
    assert "7.16× the throughput" in found and "1/7.16 of the latency" in found
    assert "16 in flight: median time until an answer is complete" in found
    _, found = texts(
        bench(tmp_path, service_s=6.0, last_s=4.0)
    )  # no request of the baseline began and ended in time
    assert "1/24.0 of the latency" in found and "96.0 s" in found
    assert "16 in flight: mean time of an answer (Little's law)" in found


def test_bars_without_a_figure_say_so_and_claim_no_ratio(texts):
    result = measured("headline")
    empty = dataclasses.replace(
        result.cells[0].summary,
        output_tokens_per_s=None,
        e2e_s=dataclasses.replace(result.cells[0].summary.e2e_s, p50=None),
    )
    result.cells[0] = dataclasses.replace(result.cells[0], summary=empty)
    result.comparisons = []
    result.reasons = ["on purpose"]
    _, found = texts(result)
    assert found.count("n/a") == 2
    assert not any("×" in text or "of the latency" in text for text in found)
    assert any(text.startswith("INVALID") for text in found)


def test_a_sweep_is_curves_over_all_loads_with_the_knee(texts):
    result = measured("sweep")
    panels, found = texts(result)
    assert list(panels[0].get_xticks()) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert found.count("knee") == 2


def test_lengths_that_the_prompts_of_a_preset_do_not_have_are_not_described_as_theirs():
    assert Workload.of(WorkloadSpec()).describe().startswith("short questions")
    described = Workload.of(WorkloadSpec(input_tokens="128", output_tokens="128")).describe()
    assert "questions" not in described and "(input 128, output 128 tokens)" in described
    assert Workload.of(WorkloadSpec("chat", input_tokens="99")).describe().startswith("chat-like")
