"""The live page's figures: a page that is opened in the middle of a run shows what has been."""

from __future__ import annotations

import http.server
import itertools
import json
import re
from pathlib import Path

import pytest

from flightline.loadtest import live
from flightline.loadtest.records import ClientSample
from tests.answering import answering
from tests.loadtest.test_locust import in_chromium


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def sample() -> ClientSample:
    return ClientSample(worker=0, time_ns=0, wall_ns=0, cpu_s=0.0, in_flight=1, lags_ms=[])


def answer(endpoint: str, tokens: int) -> dict:
    times = {"delay_s": 0.0, "ttft_s": 0.2, "tpot_s": 0.01, "e2e_s": 0.5}
    return {"endpoint": endpoint, "tokens": tokens, "problem": None, "error": False, **times}


def run(clock, seconds: int) -> dict:
    """``fast`` answers every second, ``slow`` not once."""
    figures = live.Live()
    figures.start(["fast", "slow"])
    for _ in range(seconds):
        clock[0] += 1.0
        figures.add(answer("fast", 50))
        figures.sample(sample())
    return figures.snapshot()


def test_a_page_opened_late_has_the_whole_history_of_all_contestants(clock):
    seen = run(clock, 30)
    assert list(seen["endpoints"]) == ["fast", "slow"]
    assert seen["endpoints"]["slow"]["answered"] == 0
    for name in ("fast", "slow"):
        assert [point["t"] for point in seen["history"][name]] == list(range(1, 31))
    last = seen["history"]["fast"][-1]
    assert 45 <= last["tokens_per_s"] <= 55 and last["ttft_s"] == pytest.approx(0.2, rel=0.01)
    assert seen["history"]["slow"][-1] == {"t": 30, "tokens_per_s": 0, "ttft_s": None, "tpot_s": None}


def test_a_long_run_is_kept_in_bounds_from_its_start_to_now(clock):
    points = run(clock, 4000)["history"]["fast"]
    assert 200 <= len(points) <= live.HISTORY_POINTS
    assert points[0]["t"] == 1 and points[-1]["t"] > 3950
    steps = [later["t"] - earlier["t"] for earlier, later in itertools.pairwise(points)]
    assert max(steps) < 40


def test_a_new_run_starts_anew(clock):
    figures = live.Live()
    figures.start(["old"])
    clock[0] += 2
    figures.sample(sample())
    figures.start(["new"])
    assert figures.snapshot()["history"] == {} and list(figures.snapshot()["endpoints"]) == ["new"]


PAGE = Path(live.__file__).with_name("llm_page.html")  # whose module imports Locust, and that patches threads
LOOK = """<!doctype html><body><iframe width="390" src="llm"></iframe><iframe width="1366" src="llm"></iframe>
<pre id="found"></pre><script>
setTimeout(() => {
  const texts = (page, what) => [...page.querySelectorAll(what)].map(each => each.textContent);
  const look = page => ({
    width: page.documentElement.scrollWidth,
    cards: texts(page, ".card h2"),
    axis: texts(page, "figure:first-child text").slice(3),
    lines: [...page.querySelectorAll("path")].map(each => each.getAttribute("d").split("L").length),
  });
  const pages = [...document.querySelectorAll("iframe")].map(frame => look(frame.contentDocument));
  document.getElementById("found").textContent = JSON.stringify(pages);
}, 2500);
</script>"""
"""The page on a phone and on a laptop, and what each shows."""


@pytest.mark.slow
def test_a_page_opened_late_shows_all_of_it_on_every_screen(clock):
    figures = json.dumps(run(clock, 30))
    files = {"/": LOOK, "/llm": PAGE.read_text(encoding="utf-8"), "/llm/live": figures}

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

    with answering(Pages) as url:
        seen = in_chromium(f"{url}/")
    pages = json.loads(re.search(r'<pre id="found">(.*?)</pre>', seen)[1])
    for page, width in zip(pages, (390, 1366), strict=True):
        assert page["width"] <= width
        assert page["cards"] == ["fast", "slow"]
        assert page["axis"] == ["1 s", "30 s"]
        # Tokens/s, TTFT and TPOT of either; who has not answered has the first alone.
        assert page["lines"] == [30, 30, 30, 1, 30, 1]
