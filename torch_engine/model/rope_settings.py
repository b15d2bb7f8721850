"""Reads the rotary embedding of a configuration, in either spelling. No torch."""

from __future__ import annotations

from typing import Any

from flightline.torch_engine.model.families import FULL, SLIDING, Family
from flightline.torch_engine.model.fields import Fields, UnsupportedModel, names
from flightline.torch_engine.model.spec import Rope

SETTINGS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": names(
        "factor original_max_position_embeddings beta_fast beta_slow truncate attention_factor mscale "
        "mscale_all_dim"
    ),
    "longrope": names("factor original_max_position_embeddings attention_factor short_factor long_factor"),
}
"""What each ``rope_type`` has besides ``rope_theta``."""
NEEDED = {
    "linear": SETTINGS["linear"],
    "llama3": SETTINGS["llama3"],
    "yarn": frozenset({"factor"}),
    "longrope": frozenset({"original_max_position_embeddings", "short_factor", "long_factor"}),
}
OLD_NAMES = {"su": "longrope"}
LISTS = ("short_factor", "long_factor")


def read_rope(fields: Fields, family: Family, kind: str, head_dim: int) -> Rope:
    """The embedding of layers of ``kind``.

    Reads either spelling: ``rope_parameters`` (Transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Raises:
        UnsupportedModel: its type is not implemented, or a setting is unknown, missing or of no sense.
    """
    theta, scaling = _spelled(fields, kind, kind == SLIDING and family.sliding_ropes_are_plain)
    scaling = {key: value for key, value in scaling.items() if key not in family.rope_keys}
    old_spelling = scaling.pop("type", None)
    rope_type = scaling.pop("rope_type", None) or old_spelling or "default"
    rope_type = OLD_NAMES.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type
    if not isinstance(rope_type, str) or rope_type not in SETTINGS:
        raise UnsupportedModel(
            f"{fields.source}: rope_type {rope_type!r} is not supported; supported are {', '.join(SETTINGS)}"
        )
    dims = _dims(fields, family, scaling.pop("partial_rotary_factor", None), head_dim)
    if rope_type == "default" and not set(scaling) - SETTINGS["yarn"] - SETTINGS["llama3"]:
        return Rope(theta, (), dims, family.interleaved)
    if rope_type in ("longrope", "yarn") and "original_max_position_embeddings" in family.keys:
        # Beside the settings, such a family's file has the length that it was trained on at its top.
        scaling["original_max_position_embeddings"] = fields.whole("original_max_position_embeddings")
    unknown = set(scaling) - SETTINGS[rope_type]
    if unknown:
        raise UnsupportedModel(
            f"{fields.source}: {sorted(unknown)} of rope_type {rope_type!r} is not implemented"
        )
    _check(Fields(scaling, f"{fields.source}: rope scaling"), rope_type, (dims or head_dim) // 2)
    settings = {key: tuple(value) if key in LISTS else value for key, value in scaling.items()}
    return Rope(theta, (("rope_type", rope_type), *sorted(settings.items())), dims, family.interleaved)


def _spelled(fields: Fields, kind: str, plain: bool) -> tuple[float, dict[str, Any]]:
    """The base of layers of ``kind``, and what else is said of them; a null says nothing.

    ``plain`` are those that ``rope_scaling`` does not mean.
    """
    theta = fields.positive("rope_theta", 10000.0)
    if plain and fields.config.get("rope_local_base_freq") is not None:
        theta = fields.positive("rope_local_base_freq")
    parameters = fields.table("rope_parameters")
    if kind in parameters:
        parameters = Fields(parameters, fields.source).table(kind)
    elif FULL in parameters or SLIDING in parameters:
        raise UnsupportedModel(f"{fields.source}: rope_parameters lack {kind}")
    elif not parameters and not plain:
        parameters = fields.table("rope_scaling")
    scaling = {key: value for key, value in parameters.items() if value is not None}
    theta = Fields(parameters, fields.source).positive("rope_theta", theta)
    scaling.pop("rope_theta", None)
    return float(theta), scaling


def _dims(fields: Fields, family: Family, share: Any, head_dim: int) -> int | None:
    """Rotated dimensions of a head of which ``share`` turns; None = all."""
    name = "partial_rotary_factor"
    share = fields.config.get(name) if share is None else share
    if share is None or share == 1:
        return None
    if name not in family.keys:
        raise UnsupportedModel(
            f"{fields.source}: {name}={share!r} is not implemented for {family.architecture} (only 1): use another "
            "checkpoint"
        )
    own = Fields({name: share}, fields.source)
    dims = int(head_dim * own.positive(name))
    if dims % 2 or not 0 < dims <= head_dim:
        raise own.refuse(name, f"it turns {dims} of {head_dim} dimensions: it must be an even number of them")
    return dims


def _check(settings: Fields, rope_type: str, pairs: int) -> None:
    for name in sorted(set(settings.config) | NEEDED[rope_type]):
        if name == "truncate":
            settings.flag(name, True)
        elif name in LISTS:
            if len(settings.positives(name)) != pairs:
                raise settings.refuse(name, f"it must have {pairs} numbers, one for each pair of dimensions")
        else:
            settings.positive(name)
    if rope_type == "llama3" and settings.positive("low_freq_factor") >= settings.positive(
        "high_freq_factor"
    ):
        raise settings.refuse("low_freq_factor", "it must be below high_freq_factor")
