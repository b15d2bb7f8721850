"""What the models inside Triton's Python stubs share: how they start, answer and end."""

from __future__ import annotations

import json
import os
from typing import Any

from flightline.model_repository.shared.bls_engine import BlsEngine
from flightline.model_repository.shared.emitter import Emitter
from flightline.model_repository.shared.front import Endpoint, Front
from flightline.model_repository.shared.metrics import Metrics
from flightline.model_repository.shared.tensors import TORCH
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.core.request import ModelInfo, RequestError
from flightline.torch_engine.process.routing import SOCKETS_VARIABLE, Replicas


def parameters(args: dict[str, str]) -> dict[str, str]:
    """``parameters`` of the model's config.pbtxt."""
    return {
        key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
    }


def connect_engine() -> Replicas:
    """Client of the engine processes that the supervisor runs, which may still load.

    Requests get UNAVAILABLE until one is there; the supervisor calls nobody ready before that.

    Raises:
        RuntimeError: nobody has said where the engine is.
    """
    paths = os.environ.get(SOCKETS_VARIABLE)
    if not paths:
        raise RuntimeError(f"{SOCKETS_VARIABLE} is not set: start the server with 'make serve'")
    return Replicas(paths.split(os.pathsep))


def engine(pb_utils: Any, values: dict[str, str], vocabulary: Vocabulary) -> Replicas | BlsEngine:
    """The engine that a text model drives: a process, or a model of this server with NVIDIA's backend."""
    if values["engine"] == "process":
        return connect_engine()
    info = ModelInfo(
        vocab_size=len(vocabulary.bytes),
        max_seq_len=int(values["max_seq_len"]),
        end_ids=tuple(sorted(id for id in vocabulary.end_ids if id is not None)),
        model_dir=values["tokenizer_dir"],
    )
    return BlsEngine(pb_utils, info, vocabulary.bytes, values["engine"], flag(values, "decoupled"))


def error_response(pb_utils: Any, error: RequestError) -> Any:
    """A ``pb_utils.InferenceResponse``."""
    code = getattr(pb_utils.TritonError, error.code.value)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.message, code))


def flag(values: dict[str, str], name: str, default: str = "true") -> bool:
    """A boolean parameter, spelled as NVIDIA's templates allow."""
    return values.get(name, default).lower() in ("true", "1")


class Served:
    """``TritonPythonModel`` of an endpoint that an engine answers; its ``initialize`` calls :meth:`serve`."""

    def serve(
        self,
        pb_utils: Any,
        args: dict[str, str],
        endpoint: Endpoint,
        engine: Any,
        *,
        accumulate: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        """
        Args:
            args: what Triton gives to ``initialize``.
            engine: one of :func:`engine`, or Transformers.
            accumulate: each text of a stream is the whole text so far.
        """
        values = parameters(args)
        hooks: dict[str, Any] = {}
        if metrics is not None:
            hooks = {"on_tick": lambda: metrics.update(engine.stats), "on_finish": metrics.observe}
        period_s = int(values["cancellation_check_period_ms"]) / 1000
        self._engine, self._metrics = engine, metrics
        self._emitter = Emitter(pb_utils, engine, period_s, **hooks)
        self._front = Front(
            pb_utils,
            endpoint,
            self._emitter,
            lambda: engine.info,
            args["model_config"],
            lane=values.get("lane", TORCH),
            accumulate=accumulate,
        )

    def execute(self, requests: list[Any]) -> None:
        self._front.execute(requests)

    def finalize(self) -> None:
        """The prompts that wait in the front need an emitter, and that one an engine."""
        for part in (self._front, self._emitter, self._engine, self._metrics):
            if part is not None:
                part.close()
