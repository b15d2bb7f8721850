"""Text to text in one decoupled model: tokenises, has the engine generate, passes its text on."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.contract import OURS
from flightline.model_repository.shared.front import TextEndpoint
from flightline.model_repository.shared.vocabulary import Vocabulary


class TritonPythonModel(stub.Served):
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        engine = stub.engine(pb_utils, values, vocabulary)
        self.serve(pb_utils, args, TextEndpoint(vocabulary, OURS), engine)
