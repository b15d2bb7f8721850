"""The two kinds of decoupled model: tokens in and out (``tensorrt_llm``), text in and out.

Both answer every request with at least one response, the last one flagged final, errors too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from model_repository.shared import responses
from model_repository.shared.emitter import Emitter, Generation, Reply
from model_repository.shared.responses import ResponseWriter
from model_repository.shared.tensors import Inputs, Options
from model_repository.shared.vocabulary import Vocabulary
from torch_engine.request import Code, GenerationRequest, ModelInfo, RequestError, RequestOutput

LONG_PROMPT = 2**14
"""Bytes from which on a prompt is tokenised aside, some milliseconds of work: shorter ones shall not wait for it."""
LONG_PROMPTS_AT_ONCE = 2


class Door(Protocol):
    """How one kind of model reads a batch row and shows its output."""

    def read(self, inputs: Inputs, row: int, info: ModelInfo) -> GenerationRequest: ...

    def show(self, prompt_ids: list[int], output: RequestOutput) -> dict[str, responses.Make]: ...


class TextDoor:
    """``text_input`` to ``text_output``."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def read(self, inputs: Inputs, row: int, info: ModelInfo) -> GenerationRequest:
        vocabulary = self._vocabulary
        stop = (vocabulary.stop_bytes(word) for word in inputs.words("stop_words", row))
        bad_words = inputs.words("bad_words", row)
        return inputs.generation(
            row,
            prompt_ids=vocabulary.encode_prompt(inputs.text(row, vocabulary.most_bytes(info.max_seq_len))),
            stop=tuple(word for word in stop if word is not None),
            bad_ids=tuple(tuple(ids) for word in bad_words for ids in vocabulary.bad_ids(word)),
            info=info,
        )

    def show(self, prompt_ids: list[int], output: RequestOutput) -> dict[str, responses.Make]:
        return responses.text(self._vocabulary.bytes.decode(prompt_ids) + output.text)


class TokenDoor:
    """``input_ids`` to ``output_ids``."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes = vocabulary.bytes

    def read(self, inputs: Inputs, row: int, info: ModelInfo) -> GenerationRequest:
        stop = (self._bytes.bytes_of(ids) for ids in inputs.word_ids("stop_words", row))
        return inputs.generation(
            row,
            prompt_ids=inputs.prompt_ids(row, info.vocab_size),
            stop=tuple(word for word in stop if word),
            bad_ids=tuple(tuple(ids) for ids in inputs.word_ids("bad_words", row)),
            info=info,
        )

    def show(self, prompt_ids: list[int], output: RequestOutput) -> dict[str, responses.Make]:
        return responses.ids(prompt_ids, output)


class Front:
    """Reads requests, hands each batch row to the engine, and leaves the answering to the emitter."""

    def __init__(
        self, pb_utils: Any, door: Door, emitter: Emitter, info: Callable[[], ModelInfo], model_config: str
    ) -> None:
        """``info`` raises RequestError while there is no engine."""
        self._door = door
        self._emitter = emitter
        self._info = info
        self._model = json.loads(model_config)["name"]
        self._writer = ResponseWriter(pb_utils, model_config)
        self._final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._long = ThreadPoolExecutor(LONG_PROMPTS_AT_ONCE, "long-prompt")

    def execute(self, requests: list[Any]) -> None:
        """Returns before anything is generated, and before a long prompt is tokenised."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            with self._answering(reply):
                inputs = Inputs.of(request)
                if inputs.scalar("stop", 0, False):
                    self._stop(reply, self._name(request))
                elif inputs.num_text_bytes > LONG_PROMPT:
                    names = request.requested_output_names()
                    self._long.submit(self._start, reply, names, inputs.copy(), self._name(request))
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
        self._long.shutdown(wait=False, cancel_futures=True)

    def _name(self, request: Any) -> str:
        """The request's id, as the engine shall know it: both doors have the same engine and may see the same id."""
        request_id = request.request_id()
        return f"{self._model}/{request_id}" if request_id else ""

    def _stop(self, reply: Reply, name: str) -> None:
        if not name:
            raise RequestError(
                Code.INVALID_ARG, "stop: a request id must be provided for request cancellation"
            )
        self._emitter.stop_request(name)
        reply.sender.send(flags=self._final)

    def _generations(self, reply: Reply, requested: list[str], inputs: Inputs, name: str) -> list[Generation]:
        info = self._info()
        generations = [
            self._generation(reply, requested, inputs, row, info, name) for row in range(inputs.rows)
        ]
        reply.open_rows = len(generations)
        return generations

    def _generation(
        self, reply: Reply, requested: list[str], inputs: Inputs, row: int, info: ModelInfo, name: str
    ) -> Generation:
        options: Options = inputs.options(row)
        request = dataclasses.replace(self._door.read(inputs, row, info), request_id=name)

        def write(output: RequestOutput, first: bool) -> Any:
            prompt = request.prompt_ids if first and not options.exclude_input else []
            made = self._door.show(prompt, output)
            made.update(responses.details(output, options, row))
            return self._writer.write(requested, made)

        return Generation(reply, request, options.stream, write)
