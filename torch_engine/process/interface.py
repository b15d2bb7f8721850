"""What an engine process asks of its engine: ours, or another one's behind the same socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from flightline.torch_engine.core.blocks import BlockEvent
from flightline.torch_engine.core.request import EngineStats, GenerationRequest, ModelInfo, RequestOutput


class Running(Protocol):
    """A request that an engine has taken."""

    @property
    def request(self) -> GenerationRequest:
        """What was asked for."""


class Configured(Protocol):
    """The part of an engine's configuration that its process reads."""

    @property
    def abandon_after_s(self) -> float:
        """A request whose output nobody has taken for so many seconds is cancelled."""


class ServedEngine(Protocol):
    """One model; requests are named by whoever adds them. All calls come from one thread."""

    failed_steps: int
    """Steps in a row that failed as a whole."""

    @property
    def info(self) -> ModelInfo:
        """The model, for those who connect."""

    @property
    def config(self) -> Configured:
        """As it was loaded."""

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has something to do."""

    @property
    def stats(self) -> EngineStats:
        """A snapshot of now."""

    @property
    def sequences(self) -> Mapping[Any, Running]:
        """The requests that run, by their keys."""

    def add(self, key: Any, request: GenerationRequest, arrival_ns: int) -> None:
        """Takes a request. Raises RequestError if it can never run, or too many wait."""

    def cancel(self, key: Any) -> RequestOutput | None:
        """Stops a request; returns its last output, or None if it has ended or ends with a later step."""

    def step(self) -> list[tuple[Any, RequestOutput]]:
        """Works for a moment; returns what became of which request."""

    def close(self) -> None:
        """The last call."""


@runtime_checkable
class CacheTeller(Protocol):
    """An engine that tells which prompts' beginnings it holds."""

    def watch_blocks(self) -> list[BlockEvent]:
        """Begins to keep what happens to the cache; returns what it holds now."""

    def block_events(self) -> list[BlockEvent]:
        """What has happened since the last call."""
