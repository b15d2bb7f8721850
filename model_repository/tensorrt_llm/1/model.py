"""Token ids to token ids: NVIDIA's contract in front of the engine process."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.front import TokenEndpoint
from flightline.model_repository.shared.metrics import EngineMetrics
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel(stub.Served):
    def initialize(self, args: dict[str, str]) -> None:
        endpoint = TokenEndpoint(Vocabulary(stub.parameters(args)["tokenizer_dir"]))
        metrics = EngineMetrics(pb_utils, args["model_name"], args["model_version"])
        self.serve(pb_utils, args, endpoint, stub.connect_engine(), metrics=metrics)
