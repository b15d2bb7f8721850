"""Token ids to text, each response by itself.

That is exact, without knowing what came before, because ``tensorrt_llm`` releases tokens in groups
whose text is whole.
"""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub
from flightline.torch_engine.core.request import Code, RequestError
from flightline.torch_engine.text.stream import TokenBytes


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._bytes = TokenBytes.from_dir(stub.parameters(args)["tokenizer_dir"])

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        try:
            return self._decode(request)
        except RequestError as error:
            return stub.error_response(pb_utils, error)
        except Exception as error:  # others share the batch
            return stub.error_response(
                pb_utils, RequestError(Code.INTERNAL, f"request not understood: {error!r}")
            )

    def _decode(self, request: object) -> object:
        """int32 [batch, beams, n] and lengths [batch, beams] -> bytes [batch * beams], without a batch dimension
        as NVIDIA's has none: their clients index it once."""
        tokens = _array(request, "TOKENS_BATCH")
        lengths = _array(request, "SEQUENCE_LENGTH")
        if tokens is None or lengths is None or tokens.shape[:2] != lengths.shape:
            raise RequestError(
                Code.INVALID_ARG,
                "TOKENS_BATCH and SEQUENCE_LENGTH are required, with the same batch and beam dimensions",
            )
        texts = np.empty(lengths.shape, dtype=np.object_)
        for at, length in np.ndenumerate(lengths):
            texts[at] = self._bytes.decode(tokens[at][: max(length, 0)].tolist()).encode("utf-8")
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", texts.ravel())])


def _array(request: object, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
