"""Memory of zeros that is there at once, and taken before long."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from flightline.torch_engine.core import host_memory as host
from flightline.torch_engine.core.host_memory import host_memory
from flightline.torch_engine.kernels.cpu import native
from flightline.torch_engine.kernels.cpu.pages import take, zeros
from tests.torch_engine.test_kernels import needs_compiler

MIB = 1 << 20
KERNEL = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


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


@pytest.mark.skipif(
    KERNEL < (5, 14), reason="this kernel cannot be asked to take pages: they come when touched"
)
def test_all_of_it_is_taken_before_long_and_stays_what_it_is() -> None:
    tensors = [zeros((16, MIB), torch.int8), zeros((1000,), torch.float32)]
    tensors[0][5, :100] = 3
    before = taken(tensors[0])
    take(tensors).join()
    # Of what was there before, its neighbours' pages perhaps, only the one that was written to is its own.
    assert taken(tensors[0]) - before >= 16 * MIB - mmap.PAGESIZE
    assert tensors[0].sum() == 300 and tensors[0][5, :100].eq(3).all()


def test_more_than_there_is_is_refused() -> None:
    for size in (1 << 55, 1 << 80):
        with pytest.raises(MemoryError, match=f"{size} bytes of memory are not to be had"):
            zeros((size,), torch.int8)


@needs_compiler
def test_caches_that_do_not_fit_together_are_refused(
    make_engine, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would fit, and nothing of the first ones is taken when the next is asked for."""
    settings = {"kernel_dir": library, "num_kv_blocks": 64}
    engine = make_engine(**settings)
    needed = engine.model.kernels.reserved
    assert needed == sum(
        tensor.nbytes
        for cache in engine.runner.caches
        for tensor in engine.model.kernels.cache_tensors(cache)
    )
    monkeypatch.setattr(native, "free_host_memory", lambda: needed)
    make_engine(**settings)
    monkeypatch.setattr(native, "free_host_memory", lambda: needed - 1)
    with pytest.raises(
        MemoryError, match=r"num_kv_blocks=64 blocks .* do not fit the memory of cpu: lower num_kv"
    ):
        make_engine(**settings)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, (4000, 3000)),
        ({"max": "max\n", "current": "900"}, (4000, 3000)),
        (
            {"max": "2048000", "current": "1024000", "stat": "anon 5\ninactive_file 100\nactive_file 24\n"},
            (2000, 1000),
        ),
        ({"max": "9999999999", "current": "0"}, (4000, 3000)),
    ],
)
def test_memory_of_a_container(
    group: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{host.GROUP}{name}": text for name, text in group.items()}
    files["/proc/meminfo"] = "MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\nHugePages_Total: 0\n"
    monkeypatch.setattr(host, "_read", lambda path: files.get(path, ""))
    total, free = expected
    given_back = 124 if "stat" in group else 0
    assert host_memory() == (1024 * total, 1024 * free + given_back)
