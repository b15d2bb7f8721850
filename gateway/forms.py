"""Answers as OpenAI's JSON: whole, or event by event.

A ``Stream`` makes bytes of Triton's pieces as they come, a ``Whole`` one body at the end. The usual chunk, text of one
choice and nothing else, is its constant parts around the JSON of the text.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import orjson

from flightline.gateway.chat.guides import Reasoning
from flightline.gateway.chat.parsers import Delta, OutputParser
from flightline.gateway.errors import ApiError
from flightline.gateway.job import Job
from flightline.gateway.logprobs import CompletionLogprobs, TokenNames, chat_entries, joined
from flightline.gateway.served import ServedModel
from flightline.gateway.upstream import Piece
from flightline.torch_engine.text.stream import TokenBytes

DONE = b"data: [DONE]\n\n"
_HOLE = "\x00hole"


class Stream(Protocol):
    def open(self) -> bytes:
        """What comes before the first piece."""

    def feed(self, pieces: Sequence[Piece]) -> bytes: ...

    def close(self) -> bytes:
        """What comes after the last piece."""

    def fail(self, error: ApiError) -> bytes:
        """Ends a stream that cannot go on."""


class Whole(Protocol):
    def feed(self, pieces: Sequence[Piece]) -> None: ...

    def body(self) -> bytes: ...


def event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def last_event(error: ApiError) -> bytes:
    """Ends a stream that cannot go on, wherever it is."""
    return event({"error": error.inner}) + DONE


class ThoughtCount:
    """How many of an answer's tokens are thoughts: those that begin and end in them."""

    def __init__(self, parser: OutputParser, tokens: TokenBytes) -> None:
        self._parser = parser
        self._tokens = tokens
        self.count = 0

    def note(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            if not self._parser.may_think:
                return
            inside = self._parser.thinking
            self._parser.feed(self._tokens[token].decode("latin-1"))  # what marks thoughts is ASCII
            self.count += inside and self._parser.thinking


class Counts:
    """Generated tokens of each choice."""

    def __init__(self, job: Job, tokens: TokenBytes) -> None:
        self._prompt = job.num_prompt_tokens
        self._choices = [0] * (len(job.prompts) * job.n)
        self._n = job.n
        self._cached: dict[int, int] = {}
        """By prompt; of several choices the first counts: the others share what it has computed."""
        self._thoughts: list[ThoughtCount] = []
        """Of each choice, where there may be any."""
        if job.plan is not None and job.reasoning is not Reasoning.NONE:
            tokens = tokens if job.skips_special_tokens else tokens.with_special
            self._thoughts = [ThoughtCount(job.plan.parser(job.reasoning), tokens) for _ in self._choices]

    def note(self, piece: Piece) -> None:
        if piece.num_output_tokens:
            self._choices[piece.choice] = piece.num_output_tokens
        elif piece.text:  # a token at least; how many there were the last piece says
            self._choices[piece.choice] += 1
        if self._thoughts:
            self._thoughts[piece.choice].note(piece.token_ids)
        if piece.num_cached_tokens is not None and piece.choice % self._n == 0:
            self._cached[piece.choice] = piece.num_cached_tokens

    @property
    def generated(self) -> int:
        return sum(self._choices)

    def usage(self) -> dict[str, Any]:
        """Of all choices; each prompt counts once."""
        made: dict[str, Any] = {
            "prompt_tokens": self._prompt,
            "completion_tokens": self.generated,
            "total_tokens": self._prompt + self.generated,
        }
        if self._cached:
            made["prompt_tokens_details"] = {"cached_tokens": sum(self._cached.values())}
        if self._thoughts:
            thought = sum(choice.count for choice in self._thoughts)
            made["completion_tokens_details"] = {"reasoning_tokens": thought}
        return made


class _Base:
    """Id, time and name, the same in all chunks."""

    def __init__(self, prefix: str, kind: str, job: Job, model: ServedModel) -> None:
        self.job = job
        self.counts = Counts(job, model.vocabulary.bytes)
        self.names = TokenNames(model.vocabulary.bytes, job.ids_as_tokens)
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": job.model,
        }
        self.choices = range(len(job.prompts) * job.n)

    def prompt_ids(self) -> dict[str, Any]:
        """Where token ids are wanted, those of the prompt; of several prompts a list of lists."""
        if not self.job.return_token_ids:
            return {}
        prompts = self.job.prompts
        return {"prompt_token_ids": prompts[0] if len(prompts) == 1 else prompts}


class _SseBase(_Base):
    """What both kinds of stream share."""

    def chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any] | None = None) -> bytes:
        made = {**self.head, "choices": choices, **(extra or {})}
        if self.job.continuous_usage and choices:
            made["usage"] = self.counts.usage()
        elif self.job.include_usage and "usage" not in made:
            made["usage"] = None
        return event(made)

    def around(self, choice: dict[str, Any]) -> tuple[bytes, bytes]:
        """The bytes before and after the JSON of a text that stands as ``_HOLE`` in ``choice``."""
        before, after = self.chunk([choice]).split(orjson.dumps(_HOLE))
        return before, after

    @property
    def plain(self) -> bool:
        """A chunk has only text."""
        job = self.job
        return job.top_logprobs is None and not job.return_token_ids and not job.continuous_usage

    def close(self) -> bytes:
        if not self.job.include_usage:
            return DONE
        return self.chunk([], {"usage": self.counts.usage()}) + DONE

    def fail(self, error: ApiError) -> bytes:
        return last_event(error)


class ChatChoice:
    """One answer of a chat, taken apart."""

    def __init__(self, job: Job, names: TokenNames) -> None:
        self._job = job
        self._names = names
        self.parser: OutputParser | None = None
        if job.plan is not None and (job.plan.format or job.reasoning != "none"):
            self.parser = job.plan.parser(job.reasoning)
        self.entries: list[dict[str, Any]] = []
        """Log-probabilities that nobody was told yet: their text may be held back."""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def feed(self, piece: Piece) -> list[Delta]:
        if self._job.top_logprobs is not None:
            self.entries += chat_entries(piece, self._job.top_logprobs, self._names)
        if self._job.return_token_ids:
            self.token_ids += piece.token_ids
        if self.parser is None:
            deltas = [Delta("text", piece.text)] if piece.text else []
            self.finish_reason = piece.finish_reason
        else:
            deltas = self.parser.feed(piece.text) if piece.text else []
            if piece.finish_reason is not None:
                rest, self.finish_reason = self.parser.finish(piece.finish_reason)
                deltas = [*deltas, *rest]
        if not self._job.include_reasoning:
            deltas = [delta for delta in deltas if delta.kind != "reasoning"]
        return deltas

    def told(self) -> dict[str, Any]:
        """What goes beside the next delta."""
        made: dict[str, Any] = {"logprobs": None}
        if self._job.top_logprobs is not None and self.entries:
            made["logprobs"] = {"content": self.entries, "refusal": None}
            self.entries = []
        if self._job.return_token_ids:
            made["token_ids"], self.token_ids = self.token_ids, []
        return made


def _delta(delta: Delta) -> dict[str, Any]:
    """As the SDKs expect it: the id and the name of a call once, in its first delta."""
    if delta.kind == "text":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    if delta.kind == "tool_start":
        function = {"name": delta.name, "arguments": ""}
        call = {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


class ChatStream(_SseBase):
    """``chat.completion.chunk`` events."""

    def __init__(self, job: Job, model: ServedModel) -> None:
        super().__init__("chatcmpl", "chat.completion.chunk", job, model)
        self._choices = [ChatChoice(job, self.names) for _ in self.choices]
        hole = {"delta": {"content": _HOLE}, "logprobs": None, "finish_reason": None}
        self._around = [self.around({"index": index, **hole}) for index in self.choices] if self.plain else []

    def open(self) -> bytes:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        extra = self.prompt_ids()
        return b"".join(self.chunk([{"index": index, **first}], extra) for index in self.choices)

    def feed(self, pieces: Sequence[Piece]) -> bytes:
        made: list[bytes] = []
        for piece in pieces:
            self.counts.note(piece)
            choice = self._choices[piece.choice]
            if self._around and choice.parser is None and piece.finish_reason is None:
                if piece.text:
                    before, after = self._around[piece.choice]
                    made += (before, orjson.dumps(piece.text), after)
                continue
            for delta in choice.feed(piece):
                if self._around and delta.kind == "text":
                    before, after = self._around[piece.choice]
                    made += (before, orjson.dumps(delta.text), after)
                else:
                    made.append(self._chunk(piece.choice, _delta(delta)))
            if choice.finish_reason is not None:
                made.append(self._chunk(piece.choice, {}, choice.finish_reason))
        return b"".join(made)

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        told = self._choices[index].told()
        return self.chunk([{"index": index, "delta": delta, **told, "finish_reason": finish_reason}])


class ChatWhole(_Base):
    """A ``chat.completion``."""

    def __init__(self, job: Job, model: ServedModel) -> None:
        super().__init__("chatcmpl", "chat.completion", job, model)
        self._choices = [ChatChoice(job, self.names) for _ in self.choices]
        self._messages = [Message() for _ in self.choices]

    def feed(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.counts.note(piece)
            self._messages[piece.choice].extend(self._choices[piece.choice].feed(piece))

    def body(self) -> bytes:
        choices = []
        for index, (choice, message) in enumerate(zip(self._choices, self._messages, strict=True)):
            told = choice.told()
            choices.append(
                {"index": index, "message": message.made(), **told, "finish_reason": choice.finish_reason}
            )
        return orjson.dumps(
            {**self.head, "choices": choices, "usage": self.counts.usage(), **self.prompt_ids()}
        )


class Message:
    """An assistant's message, put together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []

    def extend(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if delta.kind == "text":
                self._texts.append(delta.text)
            elif delta.kind == "reasoning":
                self._thoughts.append(delta.text)
            elif delta.kind == "tool_start":
                self._calls.append({"id": delta.call_id, "type": "function", "name": delta.name})
                self._arguments.append([])
            else:
                self._arguments[delta.index].append(delta.text)

    def made(self) -> dict[str, Any]:
        text = "".join(self._texts)
        content = None if self._calls and not text.strip() else text
        made: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._thoughts:
            made["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            made["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": "".join(arguments)},
                }
                for call, arguments in zip(self._calls, self._arguments, strict=True)
            ]
        return made


class CompletionStream(_SseBase):
    """``text_completion`` events."""

    def __init__(self, job: Job, model: ServedModel) -> None:
        super().__init__("cmpl", "text_completion", job, model)
        self._logprobs = completion_logprobs(job, self.names, len(self.choices))
        hole = {"text": _HOLE, "logprobs": None, "finish_reason": None}
        self._around = [self.around({"index": index, **hole}) for index in self.choices] if self.plain else []
        self._unechoed = set(self.choices) if job.echoed else set()

    def open(self) -> bytes:
        if self._logprobs and self.job.echoed:
            return b""  # the prompt comes with its log-probabilities
        if not self.job.echoed and not self.job.return_token_ids:
            return b""
        extra = self.prompt_ids()
        texts = self.job.echoed or [""] * len(self.job.prompts)
        return b"".join(
            self.chunk([{"index": index, "text": texts[index // self.job.n], **_NOTHING}], extra)
            for index in self.choices
        )

    def feed(self, pieces: Sequence[Piece]) -> bytes:
        made: list[bytes] = []
        for piece in pieces:
            if self.job.echoes_only:
                piece = untold(piece)
            self.counts.note(piece)
            if self._around and piece.finish_reason is None:
                if piece.text:
                    before, after = self._around[piece.choice]
                    made += (before, orjson.dumps(piece.text), after)
                continue
            if self._logprobs and piece.choice in self._unechoed:
                self._unechoed.remove(piece.choice)
                made.append(self._echo(piece))
            choice = {
                "index": piece.choice,
                "text": piece.text,
                "logprobs": None,
                "finish_reason": piece.finish_reason,
            }
            if self._logprobs:
                choice["logprobs"] = self._logprobs[piece.choice].entries(piece)
            if self.job.return_token_ids:
                choice["token_ids"] = list(piece.token_ids)
            made.append(self.chunk([choice]))
        return b"".join(made)

    def _echo(self, piece: Piece) -> bytes:
        """The prompt of the choice whose first piece this is, with its log-probabilities."""
        prompt = piece.choice // self.job.n
        text = self.job.echoed[prompt]
        told = self._logprobs[piece.choice].prompt(self.job.prompts[prompt], text, piece)
        choice = {"index": piece.choice, "text": text, "logprobs": told, "finish_reason": None}
        return self.chunk([choice], self.prompt_ids())


def untold(piece: Piece) -> Piece:
    """Without what was generated."""
    reason = piece.finish_reason and "length"
    return dataclasses.replace(
        piece, text="", num_output_tokens=0, finish_reason=reason, token_ids=(), log_probs=(), top_ids=(),
        top_log_probs=(),
    )  # fmt: skip


_NOTHING: dict[str, Any] = {"logprobs": None, "finish_reason": None}


def completion_logprobs(job: Job, names: TokenNames, choices: int) -> list[CompletionLogprobs]:
    """One for each choice; none where nobody has asked for log-probabilities."""
    if job.top_logprobs is None:
        return []
    return [CompletionLogprobs(job.top_logprobs, names) for _ in range(choices)]


class CompletionWhole(_Base):
    """A ``text_completion``."""

    def __init__(self, job: Job, model: ServedModel) -> None:
        super().__init__("cmpl", "text_completion", job, model)
        self._pieces: list[list[Piece]] = [[] for _ in self.choices]
        self._logprobs = completion_logprobs(job, self.names, len(self.choices))

    def feed(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self.job.echoes_only:
                piece = untold(piece)
            self.counts.note(piece)
            self._pieces[piece.choice].append(piece)

    def body(self) -> bytes:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(self._pieces)]
        return orjson.dumps(
            {**self.head, "choices": choices, "usage": self.counts.usage(), **self.prompt_ids()}
        )

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        echoed = self.job.echoed[index // self.job.n] if self.job.echoed else ""
        made: dict[str, Any] = {
            "index": index,
            "text": echoed + "".join(piece.text for piece in pieces),
            "logprobs": None,
            "finish_reason": pieces[-1].finish_reason,
        }
        if self._logprobs:
            parts = []
            if self.job.echoed:
                parts = [
                    self._logprobs[index].prompt(self.job.prompts[index // self.job.n], echoed, pieces[0])
                ]
            made["logprobs"] = joined([*parts, *map(self._logprobs[index].entries, pieces)])
        if self.job.return_token_ids:
            made["token_ids"] = [token for piece in pieces for token in piece.token_ids]
        return made
