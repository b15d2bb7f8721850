"""One loader for all settings: a field comes from the command line, else the environment, else its default.

A command declares its settings as a frozen dataclass whose fields are made by :func:`setting`; :func:`load` reads it.
``max_seq_len`` is ``--max-seq-len`` on the command line and ``FLIGHTLINE_MAX_SEQ_LEN`` in the environment. The short
name ``MAX_SEQ_LEN``, which ``make`` passes on, is read where the long one is not set. An empty value counts as unset.

There are libraries for this. None is used, because ``flightline preflight`` reads these same settings before anything
is installed, and because NVIDIA's image has a pydantic of its own that must stay as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

PREFIX = "FLIGHTLINE_"
MOST = 2**31 - 1
T = TypeVar("T")


class SettingsError(ValueError):
    """A setting that cannot work; the message is one line that names the setting, the value and the remedy."""


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    variable: str | None = None,
    short: bool = True,
    flag: str | None = None,
) -> Any:
    """A field of a dataclass of settings, of type ``str``, ``int``, ``float``, ``bool`` or ``Path``, or one or None.

    Args:
        default: taken where nothing is said; the type ``dict`` for an empty one.
        help: for ``--help`` and docs/SETTINGS.md; of a switch, what it lets the command do.
        least: smallest number allowed.
        most: largest number allowed.
        choices: texts allowed.
        parse: makes the value of any other type, or raises ValueError with the remedy.
        variable: name in the environment without its prefix, where it is not the field's; "" = command line only.
        short: whether the name without the prefix is read too.
        flag: name on the command line, where it is not the field's.
    """
    metadata = {
        "help": help,
        "least": least,
        "most": most,
        "choices": tuple(choices),
        "parse": parse,
        "variable": variable,
        "short": short,
        "flag": flag,
    }
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def existing_file(text: str) -> Path:
    """The absolute path of a file that is there. Raises ValueError: it is not."""
    if not Path(text).is_file():
        raise ValueError("there is no such file: give the path of one, or leave it out")
    return Path(text).absolute()


def load(
    cls: type[T],
    program: str,
    arguments: Sequence[str] | None = None,
    error: Callable[[str], Exception] = SettingsError,
) -> T:
    """The settings of ``cls`` from ``arguments`` (the process's own by default) and the environment.

    Raises:
        SettingsError: a value that cannot be read or is not allowed; ``error`` makes another exception of the text.
    """
    parser = argparse.ArgumentParser(prog=program, description=(cls.__doc__ or "").splitlines()[0])
    add_flags(parser, cls)
    return read(cls, vars(parser.parse_args(arguments)), error)


def read(
    cls: type[T],
    given: Mapping[str, str | None],
    error: Callable[[str], Exception] = SettingsError,
    **more: Any,
) -> T:
    """The settings of ``cls``; ``given`` are the command line's texts by field, ``more`` what else it has.

    Raises as :func:`load`.
    """
    values = dict(more)
    kinds = typing.get_type_hints(cls)
    for field in fields(cls):
        text = given.get(field.name)
        if text is None:
            text = from_environment(field)
        if text:
            values[field.name] = _value(field, kinds[field.name], text, error)
    return cls(**values)


def add_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Adds a flag for each field; one that several classes share is added once. Values stay text until :func:`read`."""
    added: set[str] = set()
    for cls in classes:
        kinds = typing.get_type_hints(cls)
        for field in fields(cls):
            if field.name in added:
                continue
            added.add(field.name)
            options: dict[str, Any] = {"dest": field.name, "help": _help(field)}
            if kinds[field.name] is not bool:
                parser.add_argument(flag(field), metavar=_metavar(kinds[field.name]), **options)
                continue
            if field.default:
                parser.add_argument(off_flag(field), action="store_const", const="0", **options)
                options["help"] = argparse.SUPPRESS
            parser.add_argument(flag(field), nargs="?", const="1", metavar="0|1", **options)


def given_flags(given: argparse.Namespace, cls: type) -> list[str]:
    """The flags of ``cls`` that the command line had, to be given to another process."""
    texts = {flag(field): getattr(given, field.name) for field in fields(cls)}
    return [f"{name}={text}" for name, text in texts.items() if text is not None]


def fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    """Those that are settings."""
    return tuple(field for field in dataclasses.fields(cls) if "help" in field.metadata)  # type: ignore[arg-type]


def flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("flag") or "--" + field.name.rstrip("_").replace("_", "-")


def off_flag(field: dataclasses.Field[Any]) -> str:
    """The one that switches off what is on by default."""
    return "--no-" + flag(field).removeprefix("--")


def variables(field: dataclasses.Field[Any]) -> list[str]:
    """Names in the environment, the first that is set counts; none for a setting of the command line only."""
    name = _name(field)
    if not name:
        return []
    return [PREFIX + name, *([name] if field.metadata.get("short", True) else [])]


def shown_default(field: dataclasses.Field[Any]) -> str:
    """As a user would write it."""
    if field.default in (None, "", (), dataclasses.MISSING):
        return "none"
    if isinstance(field.default, bool):
        return str(int(field.default))
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def from_environment(field: dataclasses.Field[Any]) -> str | None:
    return next((text for name in variables(field) if (text := os.environ.get(name))), None)


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata["help"]
    notes = variables(field)[:1]
    if field.default is True:
        text = f"do not {text}"
    elif type(field.default) is not bool and (default := shown_default(field)) != "none":
        notes.append(f"default: {default}")
    return (f"{text} [{', '.join(notes)}]" if notes else text).replace("%", "%%")


def _name(field: dataclasses.Field[Any]) -> str:
    given = field.metadata.get("variable")
    return field.name.rstrip("_").upper() if given is None else given


def _value(field: dataclasses.Field[Any], kind: Any, text: str, error: Callable[[str], Exception]) -> Any:
    choices = field.metadata.get("choices") or ()
    try:
        if choices and text not in choices:
            raise ValueError(f"use one of {', '.join(choices)}")
        if parse := field.metadata.get("parse"):
            return parse(text)
        return _parse(_plain(kind), text, field.metadata.get("least"), field.metadata.get("most"))
    except ValueError as remedy:
        raise value_error(field, text, str(remedy), error) from None


def value_error(
    field: dataclasses.Field[Any],
    value: object,
    remedy: str,
    error: Callable[[str], Exception] = SettingsError,
) -> Exception:
    """For a value that is not allowed, also where only its neighbours show that."""
    return error(f"{_name(field) or flag(field)}={value!r} is not valid: {remedy}")


def _plain(kind: Any) -> type:
    """``X`` of ``X | None``."""
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _parse(kind: type, text: str, least: float | None, most: float | None) -> Any:
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("use 0 or 1")
        return text == "1"
    if kind not in (int, float):
        return kind(text)
    wanted = "a whole number" if kind is int else "a number"
    if least is not None:
        wanted += f" from {least:.10g} to {most:.10g}" if most is not None else f" of at least {least:g}"
    number = _number(kind, text)
    if number is None or not (-math.inf if least is None else least) <= number <= (most or math.inf):
        raise ValueError(f"use {wanted}")
    return number


def _number(kind: type, text: str) -> int | float | None:
    """None for what is none, or is so long that it is a slip of the pen."""
    if len(text) > 20 or (kind is int and not re.fullmatch(r"-?[0-9]+", text)):
        return None
    try:
        number = kind(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _metavar(kind: Any) -> str:
    known = {int: "N", float: "NUMBER", Path: "PATH"}
    return known.get(kind if isinstance(kind, type) else _plain(kind), "TEXT")
