"""Memory of zeros that is there at once, and taken before long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flightline.torch_engine.kernels.cpu.pages import take, zeros

MIB = 1 << 20


def taken(tensor: torch.Tensor) -> int:
    """Bytes of its pages that are in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(side, 16) for side in area.groups())
            inside = start <= tensor.data_ptr() < end
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_zeros_are_taken_when_they_are_touched(dtype: torch.dtype) -> None:
    tensor = zeros((3, 16, MIB), dtype)
    assert (tensor.shape, tensor.dtype) == ((3, 16, MIB), dtype)
    before = taken(tensor)
    tensor[1, 2].fill_(7)
    assert MIB * dtype.itemsize <= taken(tensor) - before < 2 * MIB * dtype.itemsize
    assert torch.equal(tensor[1, 2], torch.full((MIB,), 7, dtype=dtype)) and not tensor[1, 3].any()


def test_all_of_it_is_taken_before_long_and_stays_what_it_is() -> None:
    tensors = [zeros((16, MIB), torch.int8), zeros((1000,), torch.float32)]
    tensors[0][5, :100] = 3
    thread = take(tensors)
    thread.join()
    assert taken(tensors[0]) >= 16 * MIB
    assert tensors[0].sum() == 300 and tensors[0][5, :100].eq(3).all()


def test_more_than_there_is_is_refused() -> None:
    for size in (1 << 55, 1 << 80):
        with pytest.raises(MemoryError, match=f"{size} bytes of memory are not to be had"):
            zeros((size,), torch.int8)
