"""Text to text by plain Transformers ``generate()``: what the comparison compares with."""

from __future__ import annotations

import json

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.contract import OURS
from flightline.model_repository.shared.emitter import Emitter
from flightline.model_repository.shared.front import Front, TextEndpoint
from flightline.model_repository.shared.metrics import MemoryMetric
from flightline.model_repository.shared.tensors import TORCH
from flightline.model_repository.shared.transformers_engine import TransformersEngine
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        folder = values["model_dir"]
        max_batch_size = json.loads(args["model_config"])["max_batch_size"]
        endpoint = TextEndpoint(Vocabulary(folder, stub.flag(values, "add_special_tokens")), OURS)
        self._engine = TransformersEngine(folder, values["dtype"], max_batch_size)
        self._memory = MemoryMetric(pb_utils, args["model_name"], args["model_version"])
        self._emitter = Emitter(
            pb_utils,
            self._engine,
            stub.period_s(values, "cancellation_check_period_ms"),
            on_tick=lambda: self._memory.update(self._engine.gpu_memory_bytes),
        )
        self._front = Front(
            pb_utils, endpoint, self._emitter, lambda: self._engine.info, args["model_config"], lane=TORCH
        )

    def execute(self, requests: list) -> None:
        self._front.execute(requests)

    def finalize(self) -> None:
        stub.close(self._front, self._emitter, self._engine)
        self._memory.close()
