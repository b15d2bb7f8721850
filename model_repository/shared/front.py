"""The two kinds of model: tokens in and out (``tensorrt_llm``), text in and out.

Both answer every request with at least one response, the last one flagged final, errors too. A model that is not
decoupled answers with exactly one, and so takes neither streams nor batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from flightline.model_repository.shared import responses
from flightline.model_repository.shared.contract import NVIDIA, Contract
from flightline.model_repository.shared.emitter import Emitter, Generation, Reply
from flightline.model_repository.shared.responses import ResponseWriter
from flightline.model_repository.shared.tensors import Inputs, Options
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.core.request import (
    Code,
    GenerationRequest,
    ModelInfo,
    RequestError,
    RequestOutput,
)

LONG_PROMPT = 2**14
"""Bytes from which on a prompt is tokenised aside, some milliseconds of work: shorter ones shall not wait for it."""
ASIDE_AT_ONCE = 2
"""Long prompts and guides that are read at a time, beside the others."""


class Endpoint(Protocol):
    """How one kind of model reads a batch row and shows its output."""

    contract: Contract

    def inputs(self, request: Any, lane: str) -> Inputs: ...

    def read(self, inputs: Inputs, row: int, info: ModelInfo) -> GenerationRequest: ...

    def show(
        self, prompt_ids: list[int], output: RequestOutput, options: Options, row: int
    ) -> dict[str, responses.Make]: ...


class TextEndpoint:
    """``text_input``, or ``input_ids`` where the model has that input too, to ``text_output``."""

    def __init__(self, vocabulary: Vocabulary, contract: Contract) -> None:
        self.contract = contract
        self._vocabulary = vocabulary

    def inputs(self, request: Any, lane: str) -> Inputs:
        return Inputs.of(request, lane, self.contract)

    def read(self, inputs: Inputs, row: int, info: ModelInfo) -> GenerationRequest:
        inputs.require_one_text()
        vocabulary, spaced = self._vocabulary, self.contract.spaced_bad_words
        stops = vocabulary.stops(inputs.words("stop_words", row))
        bad_words = inputs.words("bad_words", row)
        return inputs.generation(
            row,
            prompt_ids=self._prompt(inputs, row, info),
            stop=stops.texts,
            stop_ids=stops.tokens,
            bad_ids=tuple(tuple(ids) for word in bad_words for ids in vocabulary.bad_ids(word, spaced)),
            info=info,
            logit_bias=vocabulary.bias(inputs.bias_words(row)),
        )

    def _prompt(self, inputs: Inputs, row: int, info: ModelInfo) -> list[int]:
        if not inputs.has("input_ids"):
            text = inputs.text(row, self._vocabulary.most_bytes(info.max_seq_len))
            return self._vocabulary.encode_prompt(text)
        if inputs.has("text_input"):
            inputs.refuse("input_ids", "comes with text_input: the prompt must be one of the two")
        return inputs.whole_prompt_ids(row, info.vocab_size)

    def show(
        self, prompt_ids: list[int], output: RequestOutput, options: Options, row: int
    ) -> dict[str, responses.Make]:
        text = self._vocabulary.bytes.decode(prompt_ids) + output.text
        count = output.num_output_tokens
        if not self.contract.counts_so_far:
            count = len(prompt_ids) + len(output.token_ids)
        made = responses.text(text, self.contract.flat_text)
        return made | responses.details(output, options, row, count)


class TokenEndpoint:
    """``input_ids`` to ``output_ids``."""

    contract = NVIDIA

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes = vocabulary.bytes

    def inputs(self, request: Any, lane: str) -> Inputs:
        return Inputs.of(request, lane, self.contract)

    def read(self, inputs: Inputs, row: int, info: ModelInfo) -> GenerationRequest:
        stops = inputs.word_ids("stop_words", row)
        texts = (self._bytes.bytes_of(ids) for ids in stops)
        return inputs.generation(
            row,
            prompt_ids=inputs.prompt_ids(row, info.vocab_size),
            stop=tuple(text for text in texts if text),
            # Special tokens have no text to look for.
            stop_ids=tuple(ids[0] for ids in stops if len(ids) == 1 and not self._bytes[ids[0]]),
            bad_ids=tuple(tuple(ids) for ids in inputs.word_ids("bad_words", row)),
            info=info,
            logit_bias=inputs.token_bias(row, info.vocab_size),
        )

    def show(
        self, prompt_ids: list[int], output: RequestOutput, options: Options, row: int
    ) -> dict[str, responses.Make]:
        count = len(prompt_ids) + len(output.token_ids)
        made = responses.ids(prompt_ids, output) | responses.details(output, options, row, count)
        return made | responses.of_lane(output)


class Front:
    """Reads requests, hands each batch row to the engine, and leaves the answering to the emitter."""

    def __init__(
        self,
        pb_utils: Any,
        endpoint: Endpoint,
        emitter: Emitter,
        info: Callable[[], ModelInfo],
        model_config: str,
        *,
        lane: str,
        accumulate: bool = False,
    ) -> None:
        """
        Args:
            info: raises RequestError while there is no engine.
            model_config: the JSON that Triton gives to ``initialize``.
            accumulate: each text of a stream is the whole text so far.
        """
        config = json.loads(model_config)
        self._endpoint = endpoint
        self._emitter = emitter
        self._info = info
        self._lane = lane
        self._accumulate = accumulate
        self._model = config["name"]
        self._decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self._writer = ResponseWriter(pb_utils, model_config)
        self._final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._aside = ThreadPoolExecutor(ASIDE_AT_ONCE, "aside")

    def execute(self, requests: list[Any]) -> None:
        """Returns before anything is generated, a long prompt is tokenised or a guide is looked at."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            with self._answering(reply):
                inputs = self._endpoint.inputs(request, self._lane)
                if inputs.stops():
                    self._stop(reply, self._name(request))
                    continue
                self._emitter.gate.check()
                if inputs.guided or inputs.num_text_bytes > LONG_PROMPT:
                    names = request.requested_output_names()
                    self._aside.submit(self._start, reply, names, inputs.copy(), self._name(request))
                else:
                    self._start(reply, request.requested_output_names(), inputs, self._name(request))

    @contextlib.contextmanager
    def _answering(self, reply: Reply) -> Iterator[None]:
        """Whatever goes wrong with a request is its answer, and the next one is served."""
        try:
            yield
        except RequestError as error:
            self._emitter.refuse(reply, error)
        except Exception as error:
            self._emitter.refuse(reply, RequestError(Code.INTERNAL, f"request not understood: {error!r}"))

    def _start(self, reply: Reply, requested: list[str], inputs: Inputs, name: str) -> None:
        with self._answering(reply):
            generations = self._generations(reply, requested, inputs, name)
            for generation in generations:
                self._emitter.start(generation)

    def close(self) -> None:
        """Starts the requests that still wait, so that closing the emitter answers them: to be closed first."""
        self._aside.shutdown()

    def _name(self, request: Any) -> str:
        """The request's id, as the engine shall know it: two endpoints have one engine and may see the same id."""
        request_id = request.request_id()
        return f"{self._model}/{request_id}" if request_id else ""

    def _stop(self, reply: Reply, name: str) -> None:
        if not name:
            raise RequestError(
                Code.INVALID_ARG, "stop: a request id must be provided for request cancellation"
            )
        self._emitter.stop_request(name)
        if self._endpoint.contract.stop_is_an_error:
            raise RequestError(Code.CANCELLED, "Request cancelled by client")
        self._emitter.acknowledge(reply, self._decoupled)

    def _generations(self, reply: Reply, requested: list[str], inputs: Inputs, name: str) -> list[Generation]:
        info = self._info()
        if inputs.rows > 1 and not self._decoupled:
            raise RequestError(
                Code.UNSUPPORTED,
                f"a batch of {inputs.rows} needs a decoupled model: send its rows one by one, "
                "or build with DECOUPLED=1",
            )
        generations = [
            generation
            for row in range(inputs.rows)
            for generation in self._answers(reply, requested, inputs, row, info, name)
        ]
        reply.open_answers = len(generations)
        return generations

    def _answers(
        self, reply: Reply, requested: list[str], inputs: Inputs, row: int, info: ModelInfo, name: str
    ) -> list[Generation]:
        """As many to one row as it asks for."""
        options = inputs.options(row)
        if not self._decoupled:
            self._require_one_response(options)
        request = dataclasses.replace(self._endpoint.read(inputs, row, info), request_id=name)
        return [
            Generation(reply, one, options.stream, self._write(requested, one.prompt_ids, options, row))
            for one in request.siblings(options.num_sequences)
        ]

    @staticmethod
    def _require_one_response(options: Options) -> None:
        if options.stream:
            raise RequestError(
                Code.UNSUPPORTED,
                "stream is True: streaming is only supported if the model is decoupled; leave stream out, "
                "or build with DECOUPLED=1",
            )
        if options.num_sequences > 1:
            raise RequestError(
                Code.UNSUPPORTED,
                f"num_return_sequences is {options.num_sequences}: several answers are only supported if the model "
                "is decoupled; send as many requests, or build with DECOUPLED=1",
            )

    def _write(
        self, requested: list[str], prompt_ids: list[int], options: Options, row: int
    ) -> Callable[[RequestOutput, bool], Any]:
        """What writes the responses of one answer."""
        contract = self._endpoint.contract
        shows_prompt = not options.exclude_input and (contract.prompt_in_streams or not options.stream)
        text = ""

        def write(output: RequestOutput, first: bool) -> Any:
            nonlocal text
            if self._accumulate:
                text += output.text
                output = dataclasses.replace(output, text=text)
            prompt = prompt_ids if first and shows_prompt else []
            return self._writer.write(requested, self._endpoint.show(prompt, output, options, row))

        return write
