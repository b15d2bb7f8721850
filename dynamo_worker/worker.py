"""The worker: an engine process of ours, its prefix cache told to Dynamo's router, its answers to the frontend.

Dynamo's ``Worker`` (Rust) registers, drains and unregisters; what it asks of an engine is here. The engine is asked
straight over its socket, without Triton: Dynamo's frontend has tokenised the prompt and makes text of the tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from dynamo._core import Context
from dynamo.common.backend.engine import (
    EngineConfig,
    GenerateChunk,
    GenerateRequest,
    LLMEngine,
    LlmRegistration,
)
from dynamo.common.backend.publisher import ComponentSnapshot, KvEventSource, PushSource
from dynamo.common.backend.worker import WorkerConfig
from dynamo.llm import KvEventPublisher
from dynamo.llm.exceptions import Cancelled, EngineShutdown, InvalidArgument, Unknown, WorkerUnavailable

from flightline.deployment import Deployment
from flightline.dynamo_worker.request import chunk, request_of
from flightline.gateway.logprobs import TokenNames
from flightline.supervisor import engine_process
from flightline.supervisor.engine_process import EngineProcess
from flightline.supervisor.server import ENGINE_PROCESS
from flightline.torch_engine.core.blocks import ROOT, BlockEvent
from flightline.torch_engine.core.request import Code, FinishReason, RequestError, RequestOutput
from flightline.torch_engine.process.client import EngineClient
from flightline.torch_engine.text.stream import TokenBytes

START_S = 3600.0
STATS_PERIOD_S = 0.2
EXIT_S = 5.0


class FlightlineEngine(LLMEngine):
    """One engine of a build folder."""

    def __init__(self, deployment: Deployment, name: str, log: Path) -> None:
        self._deployment = deployment
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="flightline-dynamo-")
        self._client = EngineClient(f"{self._folder.name}/engine.sock")
        self._engine = EngineProcess(
            "the engine process",
            ENGINE_PROCESS[deployment.lane],
            deployment.engine_dir,
            log,
            self._client,
            engine_process.share(0, 1, deployment.device),
        )
        self._names_of_tokens = TokenNames(TokenBytes.from_dir(deployment.source_dir), as_ids=False)
        self._snapshots: Any = None
        self._stopped = threading.Event()
        self._watch: threading.Thread | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[FlightlineEngine, WorkerConfig]:
        options = _parser().parse_args(argv)
        deployment = Deployment.load(Path(options.build_dir).absolute())
        name = options.served_model_name or deployment.model
        engine = cls(deployment, name, Path(options.log))
        config = WorkerConfig(
            namespace=options.namespace,
            component=options.component,
            model_name=str(deployment.source_dir),
            served_model_name=name,
            discovery_backend=options.discovery_backend,
            request_plane=options.request_plane,
            event_plane=options.event_plane,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            enable_kv_routing=not options.disable_kv_routing,
        )
        return engine, config

    # -- life ----------------------------------------------------------------------------------------

    async def start(self, worker_id: int) -> EngineConfig:
        """Raises EngineShutdown: the engine ended at its start; its log's last lines say why."""
        self._engine.log.write_bytes(b"")
        child = self._engine.start()
        deadline = time.monotonic() + START_S
        while not (self._client.connected and self._client.stats.kv_blocks_max):
            if child.exit_code is not None:
                raise EngineShutdown(f"{child.name} {child.how_it_ended()} at start:\n{child.tail()}")
            if time.monotonic() > deadline:
                raise EngineShutdown(f"{child.name} was not ready after {START_S:.0f} s:\n{child.tail()}")
            await asyncio.sleep(0.05)
        self._watch = threading.Thread(target=self._watch_engine, name="watch-engine", daemon=True)
        self._watch.start()
        stats = self._client.stats
        return EngineConfig(
            model=str(self._deployment.source_dir),
            served_model_name=self._name,
            llm=LlmRegistration(
                context_length=self._client.info.max_seq_len,
                kv_cache_block_size=stats.tokens_per_block,
                total_kv_blocks=stats.kv_blocks_max,
                max_num_seqs=stats.max_requests,
            ),
        )

    async def cleanup(self) -> None:
        self._stopped.set()
        if self._watch is not None:
            self._watch.join()
        if self._engine.child is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._engine.child.stop, EXIT_S)
            self._engine.child = None
            self._client.close()
            self._folder.cleanup()

    def _watch_engine(self) -> None:
        """Tells how full the cache is; a worker whose engine has died leaves, so that no more is sent here."""
        while not self._stopped.wait(STATS_PERIOD_S):
            if self._engine.child is not None and self._engine.child.exit_code is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if self._snapshots is not None:
                stats = self._client.stats
                self._snapshots.publish(
                    0,
                    ComponentSnapshot(
                        kv_used_blocks=stats.kv_blocks_used,
                        kv_total_blocks=stats.kv_blocks_max,
                        gpu_cache_usage=stats.kv_blocks_used / max(1, stats.kv_blocks_max),
                        dp_rank=0,
                    ),
                )

    # -- what the router knows -----------------------------------------------------------------------

    def component_metrics_dp_ranks(self) -> list[int]:
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        self._snapshots = publisher

    async def kv_event_sources(self) -> list[KvEventSource]:
        def ready(publisher: KvEventPublisher) -> None:
            self._client.watch_blocks(lambda events: publish(publisher, events))

        return [PushSource(on_ready=ready, dp_rank=0)]

    # -- requests ------------------------------------------------------------------------------------

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Raises the exceptions by which Dynamo's frontend knows what to answer, or to ask another worker."""
        try:
            asked = request_of(request, self._client.info.max_seq_len)
        except RequestError as error:
            raise _told(error) from None
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[RequestOutput] = asyncio.Queue()

        def on_output(output: RequestOutput) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, output)

        names = self._names_of_tokens if asked.return_log_probs else None
        try:
            handle = self._client.submit(asked, on_output)
        except RequestError as error:
            raise _told(error) from None
        stopped = asyncio.ensure_future(context.async_killed_or_stopped())
        try:
            while True:
                taken = asyncio.ensure_future(pieces.get())
                await asyncio.wait({taken, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not taken.done():
                    taken.cancel()
                    raise Cancelled("the client has gone")
                piece = taken.result()
                if piece.finish_reason is FinishReason.ERROR:
                    assert piece.error is not None
                    raise _told(piece.error)
                yield chunk(piece, names)  # type: ignore[misc]
                if piece.finish_reason is not None:
                    return
        finally:
            stopped.cancel()
            self._client.cancel(handle)


def publish(publisher: KvEventPublisher, events: list[BlockEvent]) -> None:
    """Blocks by their uids: the router hashes the tokens itself."""
    for event in events:
        if event.tokens:
            parent = None if event.parent_uid == ROOT else event.parent_uid
            publisher.publish_stored(list(event.tokens), [len(event.tokens)], [event.uid], parent)
        else:
            publisher.publish_removed([event.uid])


def _told(error: RequestError) -> Exception:
    """An error of the engine as Dynamo's: only an engine that has gone lets the frontend ask another worker."""
    if error.code in (Code.INVALID_ARG, Code.UNSUPPORTED):
        return InvalidArgument(error.message)
    if error.code is Code.CANCELLED:
        return Cancelled(error.message)
    if error.code is Code.UNAVAILABLE:
        full = "queue is full" in error.message
        return WorkerUnavailable(error.message) if full else EngineShutdown(error.message)
    return Unknown(error.message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flightline.dynamo_worker", description="An engine as a worker of NVIDIA Dynamo."
    )
    parser.add_argument("--build-dir", default="build", help="folder of 'make build-engines'")
    parser.add_argument("--served-model-name", default="", help="default: the build's")
    parser.add_argument("--log", default="engine.log", help="the engine's log")
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--component", default="backend")
    parser.add_argument("--discovery-backend", default="etcd", help="etcd, kubernetes, file or mem")
    parser.add_argument("--request-plane", default="tcp")
    parser.add_argument("--event-plane", default=None, help="nats or zmq; default: Dynamo's own")
    parser.add_argument("--tool-call-parser", default=None)
    parser.add_argument("--reasoning-parser", default=None)
    parser.add_argument(
        "--disable-kv-routing", action="store_true", help="tell the router nothing of the cache"
    )
    return parser
