"""The tables of ``docs/SETTINGS.md``, made from the dataclasses that the commands read."""

from __future__ import annotations

import dataclasses
from typing import Any

from flightline import settings
from flightline.engine_build.settings import Settings as BuildSettings
from flightline.gateway.settings import GatewaySettings
from flightline.loadtest.options import OPTIONS, CalibrateOptions, LoadOptions, UiOptions, WorkerOptions
from flightline.supervisor.settings import ServeSettings

COMMANDS: dict[str, type] = {
    "flightline build": BuildSettings,
    "flightline serve": ServeSettings,
    "flightline serve: the gateway": GatewaySettings,
    "flightline loadtest: all commands": LoadOptions,
    **{f"flightline loadtest {name}": options for name, options in OPTIONS.items()},
    "flightline loadtest calibrate": CalibrateOptions,
    "flightline loadtest worker": WorkerOptions,
    "flightline loadtest ui": UiOptions,
}
"""``flightline preflight`` reads the first, and the ports of the second."""


def parts() -> dict[str, str]:
    """For ``flightline/pages.py``."""
    return {"settings": "\n".join(section(command, cls) for command, cls in COMMANDS.items())}


def section(command: str, cls: type) -> str:
    shared = (
        set(settings.fields(LoadOptions)) if cls is not LoadOptions and issubclass(cls, LoadOptions) else ()
    )
    rows = "".join(_row(field) for field in settings.fields(cls) if field not in shared)
    return f"## {command}\n\n{cls.__doc__}\n\n| flag | environment | default | what for |\n|---|---|---|---|\n{rows}"


def _row(field: dataclasses.Field[Any]) -> str:
    flag = f"`{settings.off_flag(field) if field.default is True else settings.flag(field)}`"
    names = settings.variables(field)
    where = f"`{names[0]}`" if names else ""
    if len(names) == 1 and field.metadata.get("short") is False:
        where += " (no short name)"
    cells = (flag, where, settings.shown_default(field), field.metadata["help"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
