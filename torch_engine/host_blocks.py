"""KV blocks in host memory, and the copies between them and the blocks that the kernels read.

Block by block the bytes of all layers lie together in host memory. They are gathered there by way of a buffer on the
device: what waits for the bus between device and host is a stream of its own, and the steps wait for it only where they
need a block that comes back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from flightline.torch_engine.core.blocks import Moves

STAGED_BYTES = 64 << 20
PIECE_BYTES = 1 << 30
"""Of host memory allocated at once: PyTorch rounds pinned memory up to a power of two."""


class HostBlocks:
    """``num_blocks`` blocks in host memory, pinned beside a GPU.

    Args:
        tensors: the KV caches, each [blocks, ...]; one that is there twice counts once.

    Raises:
        MemoryError: the host does not have as much memory.
    """

    def __init__(self, tensors: list[torch.Tensor], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        distinct = {tensor.data_ptr(): tensor for tensor in tensors}.values()
        self._parts = [tensor.view(tensor.shape[0], -1).view(torch.uint8) for tensor in distinct]
        self.block_bytes = sum(part.shape[1] for part in self._parts)
        device = self._parts[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_piece = max(1, PIECE_BYTES // self.block_bytes)
        try:
            if num_blocks * self.block_bytes > _physical_memory():
                raise RuntimeError(f"it has {_physical_memory()}")
            self._pieces = [
                torch.empty(
                    min(self._in_piece, num_blocks - begin),
                    self.block_bytes,
                    dtype=torch.uint8,
                    pin_memory=self._stream is not None,
                )
                for begin in range(0, num_blocks, self._in_piece)
            ]
        except RuntimeError as error:  # torch has no exception of its own for a host's memory
            raise MemoryError(
                f"num_host_kv_blocks={num_blocks} blocks of {self.block_bytes} bytes do not fit the host's memory "
                f"({error}): lower HOST_KV_GIB"
            ) from None
        staged = max(1, min(num_blocks, STAGED_BYTES // self.block_bytes))
        self._saving, self._restoring = (
            torch.empty(staged, self.block_bytes, dtype=torch.uint8, device=device) for _ in range(2)
        )
        self._saved, self._restored = (
            torch.cuda.Event() if self._stream is not None else None for _ in range(2)
        )
        """Since when the buffers may be written again."""

    def move(self, moves: Moves) -> None:
        """Queues the copies between the steps before and those after."""
        count = len(self._saving)
        for begin in range(0, len(moves.saved), count):
            self._save(moves.saved[begin : begin + count])
        for begin in range(0, len(moves.restored), count):
            self._restore(moves.restored[begin : begin + count])

    def _save(self, pairs: list[tuple[int, int]]) -> None:
        self._wait(self._saved)
        blocks, at = self._index([block for block, _ in pairs]), 0
        for part in self._parts:
            beyond = at + part.shape[1]
            self._saving[: len(pairs), at:beyond] = part.index_select(0, blocks)
            at = beyond
        with self._beside(self._now()):
            for number, (_, host) in enumerate(pairs):
                self._host(host).copy_(self._saving[number], non_blocking=True)
            if self._saved is not None:
                self._saved.record()

    def _restore(self, pairs: list[tuple[int, int]]) -> None:
        with self._beside(self._restored):
            for number, (host, _) in enumerate(pairs):
                self._restoring[number].copy_(self._host(host), non_blocking=True)
            arrived = self._now()
        self._wait(arrived)
        blocks, at = self._index([block for _, block in pairs]), 0
        for part in self._parts:
            beyond = at + part.shape[1]
            part.index_copy_(0, blocks, self._restoring[: len(pairs), at:beyond])
            at = beyond
        if self._restored is not None:
            self._restored.record()

    def _host(self, number: int) -> torch.Tensor:
        piece, row = divmod(number, self._in_piece)
        return self._pieces[piece][row]

    def _index(self, blocks: list[int]) -> torch.Tensor:
        index = torch.tensor(blocks)
        if self._stream is None:
            return index
        return index.pin_memory().to(self._saving.device, non_blocking=True)

    def _now(self) -> torch.cuda.Event | None:
        """An event of the current stream."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    @staticmethod
    def _wait(event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    @contextlib.contextmanager
    def _beside(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """On the stream of the copies, after ``event``; without a GPU right here."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._wait(event)
            yield


def _physical_memory() -> int:
    """Bytes. More would be promised, and missed when it is written to."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
