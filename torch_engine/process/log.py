"""What a process tells its operator: a line with time and level, or JSON for machines (``LOG_FORMAT=json``).

On a terminal a line is the message alone, as a person who has just typed a command wants it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TextIO

VARIABLE = "LOG_FORMAT"
FORMATS = ("text", "json")


class _Handler(logging.StreamHandler[TextIO]):
    """A full disk, or a reader that has gone, must not end who logs."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Text(logging.Formatter):
    def __init__(self, dated: bool) -> None:
        super().__init__()
        self._dated = dated

    def format(self, record: logging.LogRecord) -> str:
        line = f"{record.name}: {record.getMessage()}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return f"{_utc(record)} {record.levelname} {line}" if self._dated else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "source": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _utc(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{record.msecs:03.0f}Z"


def logger(source: str, stream: TextIO | None = None) -> logging.Logger:
    """The logger of one part of the server (``serve``, ``engine``, ...); writes to ``stream``, by default stderr.

    Raises:
        ValueError: ``LOG_FORMAT`` is neither ``text`` nor ``json``.
    """
    chosen = os.environ.get(VARIABLE) or "text"
    if chosen not in FORMATS:
        raise ValueError(f"{VARIABLE}={chosen!r} is not valid: use one of {', '.join(FORMATS)}")
    made = logging.getLogger(source)
    made.handlers.clear()
    stream = stream or sys.stderr
    handler = _Handler(stream)
    handler.setFormatter(_Json() if chosen == "json" else _Text(dated=not stream.isatty()))
    made.addHandler(handler)
    made.setLevel(logging.INFO)
    made.propagate = False
    return made
