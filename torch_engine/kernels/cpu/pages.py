"""Memory of zeros that is there at once: a page is cleared when it is touched, and all are touched before long.

Clearing a KV cache's pages can take longer than all else of a start (a virtual machine gets memory slowly from its host
at times), and a server that starts anew after a crash need not wait for it. Yet a cache that does not fit should show
itself soon after the start, not under load: hence :func:`take`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading

import torch

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: touches pages without changing what they hold."""
STRIDE = 1 << 20
"""Bytes that are asked for at once: whoever wants other memory waits for so many."""
LEAST_URGENT = 19


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on its own pages, none of which is taken yet.

    Raises:
        MemoryError: the system has no room for so many bytes.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size} bytes of memory are not to be had: {error}") from None
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def take(tensors: list[torch.Tensor]) -> threading.Thread:
    """Touches all pages of ``tensors`` in a thread of its own, behind all other work of this machine.

    An older kernel refuses, and a page is then taken when something is written to it.
    """
    thread = threading.Thread(target=_touch, args=(tensors,), name="pages", daemon=True)
    thread.start()
    return thread


def _touch(tensors: list[torch.Tensor]) -> None:
    with contextlib.suppress(OSError):  # some sandboxes forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_URGENT)
    # Unlike mmap's own method, ctypes lets other Python threads run meanwhile.
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        size = tensor.nbytes
        for start in range(0, size, STRIDE):
            if advise(tensor.data_ptr() + start, min(STRIDE, size - start), POPULATE_WRITE):
                return
