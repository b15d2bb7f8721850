"""``surface.json``, and objects that have exactly the fields it lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SURFACE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "surface.json").read_text())


class Strict:
    """An object with the listed fields and no other (pydantic's ``extra="forbid"``)."""

    table: str

    def __init__(self, **values: Any) -> None:
        fields = SURFACE[self.table]
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"{type(self).__name__}: extra inputs are not permitted: {unknown}")
        self.__dict__.update(fields | values)
