"""The table of parameters in ``docs/GATEWAY.md``, made from the one that requests are checked with."""

from __future__ import annotations

from flightline.gateway.params import BOTH, CHAT, TABLE, Parameter, Rule

HEADS = {
    Rule.HONOURED: "| field | where | value | tensor | |\n|---|---|---|---|---|\n",
    Rule.REFUSED: "| field | where | values that pass | why |\n|---|---|---|---|\n",
}


def parts() -> dict[str, str]:
    """For ``flightline/pages.py``."""
    inert = ", ".join(f"`{each.name}`" for each in TABLE if each.rule is Rule.INERT)
    paragraphs = (
        HEADS[Rule.HONOURED] + "\n".join(_honoured(each) for each in TABLE if each.rule is Rule.HONOURED),
        f"Accepted, and nothing follows from them: {inert}.",
        "Refused with a 400 that names the field, unless the value asks for nothing:",
        HEADS[Rule.REFUSED] + "\n".join(_refused(each) for each in TABLE if each.rule is Rule.REFUSED),
    )
    return {"parameters": "\n\n".join(paragraphs)}


def _where(parameter: Parameter) -> str:
    if parameter.endpoints == BOTH:
        return "both"
    return "chat" if CHAT in parameter.endpoints else "completions"


def _honoured(parameter: Parameter) -> str:
    limits = f", {parameter.low} to {parameter.high}" if parameter.low is not None else ""
    if parameter.low is None and parameter.high is not None:
        limits = f", at most {parameter.high}"
    tensor = ", ".join(f"`{name}`" for name in parameter.tensor.split(", ") if name)
    cells = [f"`{parameter.name}`", _where(parameter), f"{parameter.kind}{limits}", tensor, parameter.what]
    return "| " + " | ".join(cells) + " |"


def _refused(parameter: Parameter) -> str:
    values = [f"`{_json(value)}`" for value in parameter.neutral]
    passing = ", ".join([*values, f"that of `{parameter.like}`"] if parameter.like else values)
    return f"| `{parameter.name}` | {_where(parameter)} | {passing} | {parameter.what} |"


def _json(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else f"{value!r}"
