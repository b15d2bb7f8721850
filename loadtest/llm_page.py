"""``/llm`` in Locust's web UI: the endpoints side by side, live, with the verdict so far."""

from __future__ import annotations

from pathlib import Path

from flask import jsonify
from locust.web import WebUI

from loadtest.live import Live

PAGE = Path(__file__).with_name("llm_page.html")


def add_to(web_ui: WebUI, live: Live) -> None:
    """Adds the page, its data, and a link to it on Locust's own page."""

    @web_ui.app.route("/llm")
    def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @web_ui.app.route("/llm/live")
    def figures():
        return jsonify(live.snapshot())
