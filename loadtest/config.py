"""Settings of the load tests: one typed object, from the command line and the environment, checked once."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from client import wire


class ConfigError(ValueError):
    """A setting that cannot work; the message names the setting, the value and the remedy."""


def setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


LATEST = "latest"
"""Name of the link to the newest report."""
COMPARISON = "comparison.png"
"""The picture of a VALID ``make bench``, which no other command makes."""
FIRST_BUDGET_S, BUDGET_S = 330.0, 160.0


@dataclass(frozen=True)
class BenchConfig:
    """``make bench``. Each field is also ``--field-name`` and the environment variable ``FIELD_NAME``."""

    url: str = setting("", "gRPC address of a running server; empty: start the one that was built")
    candidate: str = setting(wire.TEXT_GENERATION, "endpoint under test")
    baseline: str = setting(wire.HF_BASELINE, "endpoint that it is compared with")
    concurrency: int = setting(16, "requests in flight, each user sending the next when one is answered")
    output_tokens: int = setting(64, "exact length of every answer")
    prompts: str = setting("", "file of prompts (text lines or JSONL); empty: unique generated prompts")
    seed: int = setting(0, "of the generated prompts")
    budget_s: float = setting(
        0.0,
        "seconds for the server's start, warm-up and measurement together; 0: "
        f"{FIRST_BUDGET_S:.0f} the first time, so that a slow baseline has latencies, then {BUDGET_S:.0f}",
    )
    build_dir: str = setting("build", "folder of 'make build-engines', whose model is served")
    reports: str = setting("reports", "folder that gets one folder per run")

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, remedy: str) -> None:
            if not ok:
                raise ConfigError(f"{name.upper()}={getattr(self, name)!r} is not valid: {remedy}")

        for name in ("candidate", "baseline"):
            require(getattr(self, name) in wire.ENDPOINTS, name, f"use one of {', '.join(wire.ENDPOINTS)}")
        require(self.candidate != self.baseline, "candidate", "it must differ from the baseline")
        require(1 <= self.concurrency <= 4096, "concurrency", "use a number from 1 to 4096")
        require(self.output_tokens >= 2, "output_tokens", "use at least 2 (TPOT needs two tokens)")
        require(self.budget_s >= 0, "budget_s", "use a positive number of seconds, or 0")
        require(self.seed >= 0, "seed", "use 0 or a positive number")
        require(not self.prompts or Path(self.prompts).is_file(), "prompts", "no such file")

    def with_budget(self) -> BenchConfig:
        """The same with the budget chosen, if none was given."""
        first = not any(Path(self.reports).glob(f"*/{COMPARISON}"))
        return replace(self, budget_s=self.budget_s or (FIRST_BUDGET_S if first else BUDGET_S))

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> BenchConfig:
        """Command line before environment before defaults.

        Raises:
            ConfigError: a value that does not parse or cannot work.
        """
        return cls(**read_settings(cls, "python -m loadtest.bench", arguments))


def read_settings(cls: type, program: str, arguments: list[str]) -> dict[str, Any]:
    """Values of a dataclass of settings: command line before environment; the rest keeps its default.

    Raises:
        ConfigError: a value that does not parse.
    """
    parser = argparse.ArgumentParser(prog=program, description=cls.__doc__)
    for field_ in fields(cls):
        option = "--" + field_.name.rstrip("_").replace("_", "-")
        help_text = f"{field_.metadata['help']} (default: {field_.default or 'none'})"
        parser.add_argument(option, dest=field_.name, help=help_text.replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    values = {}
    for field_ in fields(cls):
        text = given[field_.name]
        if text is None:
            text = os.environ.get(field_.name.rstrip("_").upper())
        if text is not None and text != "":
            values[field_.name] = parse_value(field_.name.rstrip("_"), text, type(field_.default))
    return values


def parse_value(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name.upper()}={text!r} is not valid: use {wanted}") from None
