"""Text to token ids: the prompt, stop words and bad words of each batch row."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import stub, words
from flightline.model_repository.shared.contract import NVIDIA
from flightline.model_repository.shared.gate import Gate
from flightline.model_repository.shared.tensors import ENGINE, Inputs
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.core.request import Code, RequestError


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        values = stub.parameters(args)
        self._vocabulary = Vocabulary(values["tokenizer_dir"], stub.flag(values, "add_special_tokens"))
        self._lane = values["lane"]
        self._most_bytes = self._vocabulary.most_bytes(int(values["max_seq_len"]))
        self._end_ids_as_stop_words = stub.flag(values, "end_ids_as_stop_words")
        self._gate = Gate.of_server()

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        try:
            self._gate.check()
            outputs = self._encode(Inputs.of(request, self._lane, NVIDIA))
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
            [ids for word in inputs.words("stop_words", row) if (ids := self._stop_ids(word))]
            + self._other_ends(inputs, row)
            for row in rows
        ]
        bad = [
            [ids for word in inputs.words("bad_words", row) if (ids := vocabulary.word_ids(word))]
            for row in rows
        ]
        outputs = {
            "INPUT_ID": prompt_ids,
            "REQUEST_INPUT_LEN": _column([len(ids) for ids in prompts]),
            "REQUEST_OUTPUT_LEN": _column([inputs.max_tokens(row) for row in rows]),
            # As NVIDIA's: a list that is given but empty is one token wide.
            "STOP_WORDS_IDS": words.pack(stop, width=int(inputs.has("stop_words"))),
            "BAD_WORDS_IDS": words.pack(bad, width=int(inputs.has("bad_words"))),
            "OUT_END_ID": _column([inputs.scalar("end_id", row, eos) for row in rows]),
            "OUT_PAD_ID": _column([inputs.scalar("pad_id", row, pad) for row in rows]),
            "EMBEDDING_BIAS": self._bias(inputs),
            # For models with a decoder apart; NVIDIA's ensemble begins it with a pad token.
            "DECODER_INPUT_ID": _column([inputs.scalar("pad_id", row, pad) for row in rows]),
            "REQUEST_DECODER_INPUT_LEN": _column([1] * inputs.rows),
        }
        if inputs.has("prompt_table_extra_id"):  # of virtual tokens, which a text has none of
            outputs["OUT_PROMPT_TABLE_EXTRA_IDS"] = np.zeros(prompt_ids.shape, dtype=np.uint64)
        return outputs

    def _stop_ids(self, word: str) -> list[int]:
        """NVIDIA's backend compares token ids, so it gets those that its own preprocessing would have made."""
        return self._vocabulary.word_ids(word) if self._lane == ENGINE else self._vocabulary.stop_ids(word)

    def _bias(self, inputs: Inputs) -> np.ndarray:
        """float32 [rows, vocabulary]; [rows, 0] where nobody asks for one."""
        biases = [self._vocabulary.bias(inputs.bias_words(row)) for row in range(inputs.rows)]
        bias = np.zeros((inputs.rows, len(self._vocabulary.bytes) if any(biases) else 0), dtype=np.float32)
        for row, pairs in enumerate(biases):
            for token, weight in pairs:
                bias[row, token] = weight
        return bias

    def _other_ends(self, inputs: Inputs, row: int) -> list[list[int]]:
        """NVIDIA's backend takes one end token and Llama 3 has several: the others go as stop words."""
        if not self._end_ids_as_stop_words or inputs.has("end_id"):
            return []
        return [[token] for token in sorted(self._vocabulary.end_ids) if token != self._vocabulary.eos_id]


def _column(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32).reshape(-1, 1)
