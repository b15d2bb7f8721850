"""Several engine processes as one: each request goes to the one that has the least to do for it.

That is to compute what it does not have of the prompt in its KV cache, and the requests of ours that are before it. The
engines know nothing of each other; each has the whole model, its own KV cache and its own scheduler. One that is gone
gets no requests until it is back.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    QueueFull,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.process.client import NOT_THERE, EngineClient, OutputCallback
from flightline.torch_engine.process.prefixes import MOST_ENGINES, Prefixes, chunk_keys

SOCKETS_VARIABLE = "FLIGHTLINE_ENGINE_SOCKETS"
"""Tells Triton's stubs where the engine processes are: paths with colons between."""


@dataclass(eq=False)
class Handle:
    """Where a request is."""

    engine: EngineClient | None = None
    number: int = 0
    """That engine's handle."""
    cancelled: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


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
        """As :meth:`EngineClient.submit`; raises RequestError UNAVAILABLE if no engine is there.

        An engine whose queue is full passes it on to the next; the last one's refusal is the answer.
        """
        count = len(self.engines)
        keys = chunk_keys(request.prompt_ids) if self._prefixes else []
        known = self._prefixes.known(keys, count) if self._prefixes else [0] * count

        def cost(number: int) -> int:
            return TOKENS_PER_REQUEST * self.engines[number].in_flight - known[number]

        turn = next(self._turn)  # among equals they take turns
        order = iter(sorted(((turn + offset) % count for offset in range(count)), key=cost))
        handle = Handle()

        def hand_over(refusal: RequestError) -> None:
            """To the next engine that takes it; raises ``refusal`` if there is none."""
            with handle.lock:
                for number in order:
                    engine = self.engines[number]
                    if not engine.connected:
                        continue
                    try:
                        handle.number = engine.submit(request, pass_on)
                    except RequestError as error:
                        if error.code is not Code.UNAVAILABLE:
                            raise
                        continue
                    handle.engine = engine
                    if handle.cancelled:
                        engine.cancel(handle.number)
                    if self._prefixes:
                        self._prefixes.add(keys, number)
                    return
            raise refusal

        def pass_on(output: RequestOutput) -> None:
            if isinstance(output.error, QueueFull):
                try:
                    hand_over(output.error)
                    return
                except RequestError:
                    pass
            on_output(output)

        hand_over(RequestError(Code.UNAVAILABLE, NOT_THERE))
        return handle

    def cancel(self, handle: Handle) -> None:
        """As :meth:`EngineClient.cancel`."""
        with handle.lock:
            handle.cancelled = True
            if handle.engine is not None:
                handle.engine.cancel(handle.number)

    def stop(self, request_id: str) -> None:
        """As :meth:`EngineClient.stop`, wherever the request is; if no engine knows it, each keeps the stop a while."""
        engines = [engine for engine in self.engines if engine.connected]
        answers: list[bool] = []

        def on_known(known: bool) -> None:
            answers.append(known)
            if len(answers) == len(engines) and not any(answers):
                for engine in engines:
                    engine.stop(request_id)

        for engine in engines:
            engine.stop(request_id, keep=False, on_known=on_known)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
