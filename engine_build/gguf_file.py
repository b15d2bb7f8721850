"""Reading a GGUF file: header, then tensors on demand.

The reader of the ``gguf`` package makes a numpy view of every vocabulary entry, which takes seconds; only its table of
types is used. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flightline.engine_build.errors import BuildError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufFile:
    """``facts`` are the key-value pairs of the header."""

    def __init__(self, path: Path) -> None:
        """Raises:
        BuildError: not a GGUF file of version 2 or 3, or cut short.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                if file.read(4) != b"GGUF" or _scalar(file, "I") not in (2, 3):
                    raise ValueError("not GGUF version 2 or 3")
                tensor_count, fact_count = _scalar(file, "Q"), _scalar(file, "Q")
                self.facts: dict[str, Any] = {}
                for _ in range(fact_count):
                    name = _string(file)
                    self.facts[name] = _value(file, _scalar(file, "I"))
                self._tensors = [_tensor_entry(file) for _ in range(tensor_count)]
                alignment = self.facts.get("general.alignment", 32)
                self._data_start = -(-file.tell() // alignment) * alignment
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise BuildError(f"{path} is not a readable GGUF file ({error}): fetch it again") from None

    @property
    def entries(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape as numpy and torch write it (rows first), and type of each tensor."""
        return [(name, shape, _type_name(kind)) for name, shape, kind, _ in self._tensors]

    def raw_tensors(self) -> Iterator[tuple[str, tuple[int, ...], str, np.ndarray]]:
        """As :attr:`entries`, each with its bytes, [rows, bytes of a row], mapped from the file.

        Raises BuildError if the file is cut short.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        data = np.memmap(self.path, dtype=np.uint8, mode="r")
        for name, shape, kind, offset in self._tensors:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            start, size = self._data_start + offset, int(np.prod(shape)) // block * block_bytes
            if start + size > len(data):
                raise BuildError(f"{self.path} is cut short at tensor {name}: fetch it again")
            raw = data[start : start + size].reshape(*shape[:-1], -1)
            yield name, shape, _type_name(kind), raw


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind}"


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, count = _scalar(file, "I"), _scalar(file, "Q")
        if item in _SCALARS:
            form = f"<{count}{_SCALARS[item]}"
            return list(struct.unpack(form, file.read(struct.calcsize(form))))
        return [_value(file, item) for _ in range(count)]
    return _scalar(file, _SCALARS[kind])


def _tensor_entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = _string(file), _scalar(file, "I")
    shape = struct.unpack(f"<{rank}Q", file.read(8 * rank))[::-1]
    return name, shape, _scalar(file, "I"), _scalar(file, "Q")
