"""Text to text by plain Transformers ``generate()``: what the comparison compares with."""

from __future__ import annotations

import json

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.contract import OURS
from flightline.model_repository.shared.front import TextEndpoint
from flightline.model_repository.shared.metrics import MemoryMetric
from flightline.model_repository.shared.transformers_engine import TransformersEngine
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel(stub.Served):
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        folder = values["model_dir"]
        max_batch_size = json.loads(args["model_config"])["max_batch_size"]
        endpoint = TextEndpoint(Vocabulary(folder, stub.flag(values, "add_special_tokens")), OURS)
        engine = TransformersEngine(folder, values["dtype"], max_batch_size)
        metrics = MemoryMetric(pb_utils, args["model_name"], args["model_version"])
        self.serve(pb_utils, args, endpoint, engine, metrics=metrics)
