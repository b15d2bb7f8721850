"""Token ids to token ids: NVIDIA's contract in front of the engine process."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.emitter import Emitter
from flightline.model_repository.shared.front import Front, TokenEndpoint
from flightline.model_repository.shared.metrics import EngineMetrics
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        endpoint = TokenEndpoint(Vocabulary(values["tokenizer_dir"]))
        self._engine = stub.connect_engine()
        self._metrics = EngineMetrics(pb_utils, args["model_name"], args["model_version"])
        self._emitter = Emitter(
            pb_utils,
            self._engine,
            stub.period_s(values, "cancellation_check_period_ms"),
            on_tick=lambda: self._metrics.update(self._engine.stats),
            on_finish=self._metrics.observe,
        )
        self._front = Front(
            pb_utils,
            endpoint,
            self._emitter,
            lambda: self._engine.info,
            args["model_config"],
            lane=values["lane"],
        )

    def execute(self, requests: list) -> None:
        self._front.execute(requests)

    def finalize(self) -> None:
        stub.close(self._front, self._emitter, self._engine)
        self._metrics.close()
