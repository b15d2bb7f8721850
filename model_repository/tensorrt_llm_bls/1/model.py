"""``text_generation`` under the name, with the tensors and with the habits of NVIDIA's ``tensorrt_llm_bls``.

Theirs calls the three models of the ensemble; this one drives the same engine itself.
"""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.contract import NVIDIA
from flightline.model_repository.shared.emitter import Emitter
from flightline.model_repository.shared.front import Front, TextEndpoint
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        endpoint = TextEndpoint(vocabulary, NVIDIA)
        self._engine = stub.engine(pb_utils, values, vocabulary)
        self._emitter = Emitter(pb_utils, self._engine, stub.period_s(values, "cancellation_check_period_ms"))
        self._front = Front(
            pb_utils,
            endpoint,
            self._emitter,
            lambda: self._engine.info,
            args["model_config"],
            lane=values["lane"],
            accumulate=stub.flag(values, "accumulate_tokens", default="false"),
        )

    def execute(self, requests: list) -> None:
        self._front.execute(requests)

    def finalize(self) -> None:
        stub.close(self._front, self._emitter, self._engine)
