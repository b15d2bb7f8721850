"""``/llm`` in Locust's web UI: the endpoints side by side, live, with the verdict so far."""

from __future__ import annotations

from html import escape
from pathlib import Path

from flask import Response, jsonify, request
from locust.web import WebUI

from flightline.loadtest.definitions import DEFINITIONS, P99_SAMPLES
from flightline.loadtest.live import Live

PAGE = Path(__file__).with_name("llm_page.html")

LINK = (
    '<a href="llm" style="position:fixed;right:20px;bottom:20px;z-index:9999;padding:8px 16px;border-radius:999px;'
    'background:#3f8f0f;color:#fff;font:600 14px system-ui,sans-serif;text-decoration:none">LLM figures</a>'
)


def add_to(web_ui: WebUI, live: Live) -> None:
    """Adds the page, its data, and a link to it on Locust's own page."""

    def page() -> str:
        meanings = "; ".join(
            f"{escape(name)}: {escape(DEFINITIONS[name])}" for name in ("TTFT", "TPOT", "E2E")
        )
        text = PAGE.read_text(encoding="utf-8")
        return text.replace("<!--definitions-->", meanings).replace("<!--p99-->", str(P99_SAMPLES))

    def figures() -> Response:
        return jsonify(live.snapshot())

    def linked(response: Response) -> Response:
        if request.path == "/" and response.mimetype == "text/html":
            response.set_data(response.get_data(as_text=True).replace("</body>", f"{LINK}</body>"))
        return response

    app = web_ui.app
    assert app is not None  # made by its constructor
    app.add_url_rule("/llm", "llm", page)
    app.add_url_rule("/llm/live", "llm_live", figures)
    app.after_request(linked)
