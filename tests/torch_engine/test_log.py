from __future__ import annotations

import io
import json
import re

import pytest

from flightline.torch_engine.process.log import logger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_line_has_time_and_level() -> None:
    stream = io.StringIO()
    logger("engine", stream).error("step %d failed", 3)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ERROR engine: step 3 failed\n", stream.getvalue()
    )


def test_a_person_gets_the_message_alone() -> None:
    stream = Terminal()
    logger("serve", stream).info("stopped")
    assert stream.getvalue() == "serve: stopped\n"


def test_json_is_an_object_a_line_whatever_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    stream = io.StringIO()
    log = logger("engine", stream)
    log.info('two\nlines and a "quote" 😀')
    try:
        raise ValueError("odd")
    except ValueError:
        log.exception("request not taken")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["source"], first["message"]) == (
        "info",
        "engine",
        'two\nlines and a "quote" 😀',
    )
    assert second["level"] == "error" and "ValueError: odd" in second["exception"]


def test_a_full_disk_ends_nobody() -> None:
    logger("serve", Full()).info("stopped")


def test_an_unknown_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "xml")
    with pytest.raises(ValueError, match="LOG_FORMAT='xml' is not valid: use one of text, json"):
        logger("serve")
