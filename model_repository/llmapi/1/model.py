"""NVIDIA's ``llmapi`` contract in front of the engine of any backend."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.llmapi import LlmapiEndpoint
from flightline.model_repository.shared.metrics import EngineMetrics
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.process.routing import Replicas


class TritonPythonModel(stub.Served):
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        engine, metrics = stub.engine(pb_utils, values, vocabulary), None
        if isinstance(engine, Replicas):  # NVIDIA's backend has metrics of its own
            metrics = EngineMetrics(pb_utils, args["model_name"], args["model_version"])
        self.serve(pb_utils, args, LlmapiEndpoint(vocabulary), engine, accumulate=True, metrics=metrics)
