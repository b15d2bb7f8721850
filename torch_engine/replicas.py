"""Several engine processes as one: each request goes to the one that has the least to do for it.

That is to compute what it does not have of the prompt in its KV cache, and the requests of ours that are before it. The
engines know nothing of each other; each has the whole model, its own KV cache and its own scheduler. One that is gone
gets no requests until it is back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from torch_engine.client import NOT_THERE, EngineClient, OutputCallback
from torch_engine.prefixes import MOST_ENGINES, Prefixes, chunk_keys
from torch_engine.request import Code, EngineStats, GenerationRequest, ModelInfo, RequestError

Handle = tuple[EngineClient, int]

TOKENS_PER_REQUEST = 256
"""Tokens of a prompt that cost an engine as much as answering one more request at the same time, by order of magnitude.

So a conversation of 2,000 tokens stays with its engine until that has eight requests more than another, and short
prompts go wherever there are fewest.
"""


class Replicas:
    """As :class:`EngineClient`, over one or more of them."""

    def __init__(self, socket_paths: Sequence[str]) -> None:
        """Starts connecting in the background; all that use the same sockets know what the others have sent.

        More than ``MOST_ENGINES`` are told apart by their requests in flight alone.
        """
        self.engines = [EngineClient(path) for path in socket_paths]
        self._turn = itertools.count()
        several = 1 < len(self.engines) <= MOST_ENGINES
        self._prefixes = Prefixes(str(Path(socket_paths[0]).with_name("prefixes"))) if several else None

    @property
    def info(self) -> ModelInfo:
        """Facts about the model. Raises RequestError UNAVAILABLE before the first connection to an engine."""
        for engine in self.engines:
            if engine.connected:
                return engine.info
        return self.engines[0].info

    @property
    def stats(self) -> EngineStats:
        """The engines' last snapshots, added up."""
        snapshots = [engine.stats for engine in self.engines]
        sums = {
            field.name: sum(getattr(snapshot, field.name) for snapshot in snapshots)
            for field in dataclasses.fields(EngineStats)
        }
        sums["tokens_per_block"] = max(snapshot.tokens_per_block for snapshot in snapshots)
        return EngineStats(**sums)

    @property
    def connected(self) -> bool:
        """All of them are there."""
        return all(engine.connected for engine in self.engines)

    def submit(self, request: GenerationRequest, on_output: OutputCallback) -> Handle:
        """As :meth:`EngineClient.submit`; raises RequestError UNAVAILABLE if no engine is there."""
        count = len(self.engines)
        keys = chunk_keys(request.prompt_ids) if self._prefixes else []
        known = self._prefixes.known(keys, count) if self._prefixes else [0] * count

        def cost(number: int) -> int:
            return TOKENS_PER_REQUEST * self.engines[number].in_flight - known[number]

        turn = next(self._turn)  # among equals they take turns
        for number in sorted(((turn + offset) % count for offset in range(count)), key=cost):
            engine = self.engines[number]
            if not engine.connected:
                continue
            try:
                handle = engine.submit(request, on_output)
            except RequestError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise
                continue
            if self._prefixes:
                self._prefixes.add(keys, number)
            return engine, handle
        raise RequestError(Code.UNAVAILABLE, NOT_THERE)

    def cancel(self, handle: Handle) -> None:
        """As :meth:`EngineClient.cancel`."""
        engine, number = handle
        engine.cancel(number)

    def stop(self, request_id: str) -> None:
        """As :meth:`EngineClient.stop`, wherever the request is."""
        for engine in self.engines:
            engine.stop(request_id)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
