"""Several engine processes as one: each request goes to the one that has the fewest of ours in flight.

The engines know nothing of each other; each has the whole model, its own KV cache and its own scheduler. One that is
gone gets no requests until it is back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from torch_engine.client import NOT_THERE, EngineClient, OutputCallback
from torch_engine.request import Code, EngineStats, GenerationRequest, ModelInfo, RequestError

Handle = tuple[EngineClient, int]


class Replicas:
    """As :class:`EngineClient`, over one or more of them."""

    def __init__(self, socket_paths: Sequence[str]) -> None:
        """Starts connecting in the background."""
        self.engines = [EngineClient(path) for path in socket_paths]
        self._turn = itertools.count()

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
        first = next(self._turn) % len(self.engines)  # among equals they take turns
        candidates = self.engines[first:] + self.engines[:first]
        for engine in sorted(candidates, key=lambda engine: engine.in_flight):
            if not engine.connected:
                continue
            try:
                return engine, engine.submit(request, on_output)
            except RequestError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise
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
