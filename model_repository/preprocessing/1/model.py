"""Text to token ids: the prompt, stop words and bad words of each batch row."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from model_repository.shared import stub, words
from model_repository.shared.tensors import Inputs
from model_repository.shared.vocabulary import Vocabulary
from torch_engine.request import Code, RequestError


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        self._vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        self._most_bytes = self._vocabulary.most_bytes(int(values["max_seq_len"]))
        self._end_ids_as_stop_words = stub.flag(values, "end_ids_as_stop_words")

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        try:
            outputs = self._encode(Inputs.of(request))
        except RequestError as error:
            return stub.error_response(pb_utils, error)
        except Exception as error:  # whatever a client has sent, the others are served
            return stub.error_response(
                pb_utils, RequestError(Code.INTERNAL, f"request not understood: {error!r}")
            )
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def _encode(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Rows of different length are padded; REQUEST_INPUT_LEN says how long each is."""
        vocabulary, rows = self._vocabulary, range(inputs.rows)
        eos = -1 if vocabulary.eos_id is None else vocabulary.eos_id
        pad = eos if vocabulary.pad_id is None else vocabulary.pad_id
        prompts = [vocabulary.encode_prompt(inputs.text(row, self._most_bytes)) for row in rows]
        prompt_ids = np.full((len(prompts), max(map(len, prompts))), pad, dtype=np.int32)
        for row, ids in enumerate(prompts):
            prompt_ids[row, : len(ids)] = ids
        stop = [
            [ids for word in inputs.words("stop_words", row) if (ids := vocabulary.stop_ids(word))]
            + self._other_ends(inputs, row)
            for row in rows
        ]
        bad = [
            [ids for word in inputs.words("bad_words", row) for ids in vocabulary.bad_ids(word)]
            for row in rows
        ]
        nothing = (inputs.rows, 0)
        return {
            "INPUT_ID": prompt_ids,
            "REQUEST_INPUT_LEN": _column([len(ids) for ids in prompts]),
            "REQUEST_OUTPUT_LEN": _column([inputs.max_tokens(row) for row in rows]),
            "STOP_WORDS_IDS": words.pack(stop),
            "BAD_WORDS_IDS": words.pack(bad),
            "OUT_END_ID": _column([inputs.scalar("end_id", row, eos) for row in rows]),
            "OUT_PAD_ID": _column([inputs.scalar("pad_id", row, pad) for row in rows]),
            # For models that we do not serve; the ensemble's wiring wants them nevertheless.
            "DECODER_INPUT_ID": np.zeros(nothing, dtype=np.int32),
            "REQUEST_DECODER_INPUT_LEN": _column([0] * inputs.rows),
            "EMBEDDING_BIAS": np.zeros(nothing, dtype=np.float32),
            "OUT_PROMPT_TABLE_EXTRA_IDS": np.zeros(nothing, dtype=np.uint64),
        }

    def _other_ends(self, inputs: Inputs, row: int) -> list[list[int]]:
        """NVIDIA's backend takes one end token and Llama 3 has several: the others go as stop words."""
        if not self._end_ids_as_stop_words or inputs.has("end_id"):
            return []
        return [[token] for token in sorted(self._vocabulary.end_ids) if token != self._vocabulary.eos_id]


def _column(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32).reshape(-1, 1)
