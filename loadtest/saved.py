"""A run that was published, read back."""

from __future__ import annotations

import csv
import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flightline.loadtest.result import SCHEMA, Result
from flightline.settings import SettingsError

REPORT, REQUESTS = "report.json", "requests.csv"


@dataclass(frozen=True)
class Saved:
    """A result and its request table."""

    name: str
    result: Result
    requests: list[dict[str, str]]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises SettingsError: the folder has no result of ours, or of another version."""
        try:
            data = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            if data.get("schema") != SCHEMA:
                raise SettingsError(
                    f"{folder / REPORT} is not a result of {SCHEMA}: compare runs of this version"
                )
            with (folder / REQUESTS).open(encoding="utf-8", newline="") as file:
                requests = list(csv.DictReader(file))
            return cls(folder.resolve().name, build(Result, data), requests)
        except OSError as error:
            raise SettingsError(
                f"{folder} is no report folder: {error.strerror} ({error.filename})"
            ) from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise SettingsError(f"{folder / REPORT} cannot be read: {error}") from None

    def samples(self, arm: str, level: str, metric: str) -> list[float]:
        """The figures behind a pooled one: of requests, or of seconds for the throughput."""
        if metric == "output_tokens_per_s":
            spans = [(t.start_s, t.end_s) for t in self.result.trials if (t.arm, t.level) == (arm, level)]
            times = self.result.timeline.get("t", [])
            rates: list[float | None] = next(
                (
                    line["y"]
                    for line in self.result.timeline.get("lines", [])
                    if (line["name"], line["arm"]) == ("Output tokens/s", arm)
                ),
                [],
            )
            step = times[1] - times[0] if len(times) > 1 else 0.0
            return [
                rate
                for at, rate in zip(times, rates, strict=True)
                if rate is not None and any(start <= at and at + step <= end for start, end in spans)
            ]
        column = metric.replace("_p50", "_s")
        rows = [row for row in self.requests if (row["arm"], row["level"]) == (arm, level)]
        return [float(row[column]) for row in rows if row[column] and row["measured"] == "1"]


def build(kind: Any, data: Any) -> Any:
    """A dataclass, and those within it, from what ``asdict`` and JSON made of it."""
    if data is None:
        return None
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is list and typing.get_args(kind):
        return [build(typing.get_args(kind)[0], item) for item in data]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [
            f.name for f in dataclasses.fields(kind) if f.name in data
        ]  # a field with a default may be newer
        return kind(**{name: build(hints[name], data[name]) for name in known})  # type: ignore[operator]
    return data
