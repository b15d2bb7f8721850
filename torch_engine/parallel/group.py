"""What the ranks of one model compute together. Each rank calls the same, in the same order.

The sums are the same to the bit on every rank, so that all of them hold the same hidden states.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

LOOPBACK = "127.0.0.1"
PATIENCE = timedelta(hours=1)
"""Of the libraries. Who watches the ranks (``ranks.py``) has less, and can say which one it was."""

MOST_AT_ONCE = 512 << 10
"""Bytes that up to four ranks add up in one kernel; NCCL is as fast from about there on."""
ALIGNMENT = 16


class PeerLost(Exception):
    """Another rank did not do its part."""


@dataclass(frozen=True)
class Boxes:
    """Memory of each rank that all others write to."""

    own: torch.Tensor
    """uint8, zeros at first."""
    addresses: torch.Tensor
    """[ranks] int64: where this rank finds each one's."""


class Group(Protocol):
    rank: int
    size: int

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory that the other ranks can read: the next :meth:`sum` of what is written there is faster. Or None."""

    def boxes(self, size: int) -> Boxes | None:
        """Boxes of ``size`` bytes; None if these ranks cannot write to each other's memory."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``x``; may be ``x`` itself, changed."""

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of each rank, in their order: [ranks, *x.shape]."""

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, N]`` of each rank side by side: [T, ranks * N]."""

    def told(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's ``x``; on the others it is written into theirs."""

    def leave(self) -> None:
        """The last call."""


class Alone:
    """The only rank."""

    rank = 0
    size = 1

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def boxes(self, size: int) -> Boxes | None:
        return None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def told(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self) -> None: ...


class Together:
    """Ranks that reach each other through a process group of PyTorch: gloo between CPUs, NCCL between GPUs.

    NCCL queues its work on the current stream, where a CUDA graph captures it.
    """

    def __init__(self, processes: Any) -> None:
        """``processes`` is a ``torch.distributed.ProcessGroup``."""
        self._processes = processes
        self.rank: int = processes.rank()
        self.size: int = processes.size()
        self.begun = 0
        """Operations so far: who has begun the fewest keeps the others waiting."""

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def boxes(self, size: int) -> Boxes | None:
        return None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        options = distributed_c10d.AllreduceOptions()
        options.asyncOp = False  # on the current stream: another one costs a step of a graph twice
        self._do(lambda: self._processes.allreduce([x], options))
        return x

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        mine = x.contiguous().view(1, -1)
        everyone = torch.empty(self.size, mine.shape[1], dtype=x.dtype, device=x.device)
        options = distributed_c10d.AllgatherOptions()
        options.asyncOp = False
        self._do(lambda: self._processes._allgather_base(everyone, mine, options))
        return everyone.view(self.size, *x.shape)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x).transpose(0, 1).reshape(x.shape[0], -1)

    def told(self, x: torch.Tensor) -> torch.Tensor:
        options = distributed_c10d.BroadcastOptions()
        options.rootRank = 0
        options.asyncOp = False
        self._do(lambda: self._processes.broadcast([x], options))
        return x

    def leave(self) -> None:
        """Ends the library's threads while this process is whole: at its end they would end it with SIGABRT."""
        self._processes = None

    def _do(self, operation: Callable[[], Any]) -> None:
        self.begun += 1
        try:
            work = operation()
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise PeerLost(str(error)) from error


class Linked(Together):
    """GPUs that read each other's memory: small sums take one kernel, in which each rank reads all others' terms.

    That is PyTorch's symmetric memory, without NVLink's multicast. What is larger, NCCL adds up.
    """

    def __init__(self, processes: Any, device: torch.device) -> None:
        """Raises RuntimeError if these GPUs cannot do that, or do it wrongly."""
        super().__init__(processes)
        import torch.distributed._symmetric_memory as symmetric

        self._most = MOST_AT_ONCE if self.size <= 4 else MOST_AT_ONCE // 2
        self._shared = symmetric.empty(self._most, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._shared, processes)
        self._name = processes.group_name
        self._copies = False
        """Whether the kernel copies its terms itself."""
        self._check(device)

    def _check(self, device: torch.device) -> None:
        terms = (torch.arange(1024, device=device) % 8 * (self.rank + 1)).to(
            torch.bfloat16
        )  # exact in any order
        expected = super().sum(terms.clone())
        if not torch.equal(self.sum(terms), expected):
            raise RuntimeError("sums over symmetric memory are wrong")
        try:
            self._copies = True
            works = torch.equal(self.sum(terms), expected)
        except (RuntimeError, AttributeError):
            works = False
        self._copies = bool(self.stack(torch.tensor([works], dtype=torch.int32, device=device)).all())

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        size = math.prod(shape) * dtype.itemsize
        if size > self._most or size % ALIGNMENT or dtype not in (torch.bfloat16, torch.float32):
            return None
        return self._shared[:size].view(dtype).view(shape)

    def boxes(self, size: int) -> Boxes | None:
        import torch.distributed._symmetric_memory as symmetric

        own: Any = None
        addresses = [0] * self.size
        try:
            own = symmetric.empty(size, dtype=torch.uint8, device=self._shared.device)
            handle = symmetric.rendezvous(own, self._processes)
            own.zero_()
            begin = own.data_ptr() - handle.buffer_ptrs[self.rank]  # the same on all ranks
            addresses = [int(address) + begin for address in handle.buffer_ptrs]
        except (RuntimeError, AttributeError) as error:
            logging.getLogger("engine").warning("no memory for sums in one kernel with the norm (%s)", error)
            own = None
        table = torch.tensor(addresses, dtype=torch.int64, device=self._shared.device)
        # Also a barrier: nobody writes before all boxes are zeros.
        there = self.stack(torch.tensor([own is not None], dtype=torch.int32, device=table.device))
        return Boxes(own, table) if bool(there.all()) else None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() != self._shared.data_ptr():
            room = self.room(tuple(x.shape), x.dtype)
            if room is None:
                return super().sum(x)
            if self._copies:
                return self._at_once(torch.ops.symm_mem.one_shot_all_reduce_copy, room, x.contiguous())
            x = room.copy_(x)
        return self._at_once(torch.ops.symm_mem.one_shot_all_reduce, x)

    def _at_once(self, operation: Any, *tensors: torch.Tensor) -> torch.Tensor:
        self.begun += 1
        total: torch.Tensor = operation(*tensors, "sum", self._name)
        return total


def meeting_place() -> tuple[Any, int]:
    """Where the ranks find each other: rank 0's store and its port, which no other machine reaches."""
    listener = socket.create_server((LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK, port, None, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port


def join(
    rank: int, size: int, device: torch.device, port: int, store: Any = None, linked: bool = True
) -> Together:
    """Returns when all ranks have come; ``store`` is rank 0's. ``linked``: GPUs may read each other's memory."""
    store = store or dist.TCPStore(LOOPBACK, port, None, is_master=False)
    store.set_timeout(PATIENCE)
    if device.type == "cpu":
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack the options
        options = gloo._Options()
        options._timeout = PATIENCE
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        return Together(gloo(store, rank, size, options))
    torch.cuda.set_device(device)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    dist.init_process_group(
        "nccl", store=store, rank=rank, world_size=size, timeout=PATIENCE, device_id=device
    )
    together = Together(dist.group.WORLD)
    return _linked(together, device) if linked else together


def _linked(together: Together, device: torch.device) -> Together:
    """The same ranks over symmetric memory, if that works on all of them."""
    try:
        group: Together | None = Linked(dist.group.WORLD, device)
    except (RuntimeError, ImportError, AttributeError) as error:
        logging.getLogger("engine").warning("NCCL adds up small sums, too: no symmetric memory (%s)", error)
        group = None
    works = together.stack(torch.tensor([group is not None], dtype=torch.int32, device=device))
    return group if group is not None and bool(works.all()) else together
