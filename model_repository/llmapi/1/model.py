"""NVIDIA's ``llmapi`` contract in front of the engine of any backend."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.emitter import Emitter
from flightline.model_repository.shared.front import Front
from flightline.model_repository.shared.llmapi import LlmapiEndpoint
from flightline.model_repository.shared.metrics import EngineMetrics
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.process.routing import Replicas


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        self._engine = engine = stub.engine(pb_utils, values, vocabulary)
        self._metrics = None
        hooks = {}
        if isinstance(engine, Replicas):  # NVIDIA's backend has metrics of its own
            self._metrics = metrics = EngineMetrics(pb_utils, args["model_name"], args["model_version"])
            hooks = {"on_tick": lambda: metrics.update(engine.stats), "on_finish": metrics.observe}
        period_s = stub.period_s(values, "cancellation_check_period_ms")
        self._emitter = Emitter(pb_utils, engine, period_s, **hooks)
        self._front = Front(
            pb_utils,
            LlmapiEndpoint(vocabulary),
            self._emitter,
            lambda: engine.info,
            args["model_config"],
            lane=values["lane"],
            accumulate=True,
        )

    def execute(self, requests: list) -> None:
        self._front.execute(requests)

    def finalize(self) -> None:
        stub.close(self._front, self._emitter, self._engine)
        if self._metrics is not None:
            self._metrics.close()
