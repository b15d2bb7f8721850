"""From the command line and the environment to typed settings, checked once."""

from __future__ import annotations

import argparse
import os
from dataclasses import Field, field, fields
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; the message names the setting, the value and the remedy."""


def setting(default: Any, help_text: str, *, variable: str = "") -> Any:
    """A field of a dataclass of settings: ``--field-name``, and an environment variable.

    Args:
        variable: Its name, where ``FIELD_NAME`` already means something else.
    """
    return field(default=default, metadata={"help": help_text, "variable": variable})


def variable_of(field_: Field) -> str:
    """The environment variable, which is also the setting's name in errors."""
    return field_.metadata["variable"] or field_.name.rstrip("_").upper()


def read_settings(cls: type, program: str, arguments: list[str]) -> dict[str, Any]:
    """Values of a dataclass of settings: command line before environment; the rest keeps its default.

    Raises:
        ConfigError: a value that does not parse.
    """
    parser = argparse.ArgumentParser(prog=program, description=cls.__doc__)
    for field_ in fields(cls):
        option = "--" + field_.name.rstrip("_").replace("_", "-")
        help_text = f"{field_.metadata['help']} ({variable_of(field_)}; default: {field_.default or 'none'})"
        parser.add_argument(option, dest=field_.name, help=help_text.replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    values = {}
    for field_ in fields(cls):
        text = given[field_.name]
        if text is None:
            text = os.environ.get(variable_of(field_))
        if text is not None and text != "":
            values[field_.name] = _parse(variable_of(field_), text, type(field_.default))
    return values


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name}={text!r} is not valid: use {wanted}") from None
