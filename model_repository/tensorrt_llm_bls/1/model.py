"""``text_generation`` under the name, with the tensors and with the habits of NVIDIA's ``tensorrt_llm_bls``.

Theirs calls the three models of the ensemble; this one drives the same engine itself.
"""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.contract import NVIDIA
from flightline.model_repository.shared.front import TextEndpoint
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel(stub.Served):
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        engine = stub.engine(pb_utils, values, vocabulary)
        accumulate = stub.flag(values, "accumulate_tokens", default="false")
        self.serve(pb_utils, args, TextEndpoint(vocabulary, NVIDIA), engine, accumulate=accumulate)
