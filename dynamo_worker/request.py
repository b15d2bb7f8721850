"""Dynamo's request and answer as ours. Nothing here needs Dynamo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flightline.gateway.chat.guides import response_format
from flightline.gateway.logprobs import FLOOR, TokenNames
from flightline.torch_engine.core import grammar
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    Guide,
    RequestError,
    RequestOutput,
    SamplingParams,
)

GREEDY = 0.0
REFUSED = {
    "n": "Dynamo's frontend ends an answer with its first choice, so ask n times",
    "use_beam_search": "there is no beam search",
    "length_penalty": "there is no beam search",
    "best_of": "choose among n answers yourself",
    "include_stop_str_in_output": "stop strings are never part of the answer",
}
"""Sampling options that must ask for nothing, and why."""
_NOTHING = (None, False, 1, 1.0)
FINISH = {
    FinishReason.LENGTH: "length",
    FinishReason.END_ID: "stop",
    FinishReason.STOP: "stop",
    FinishReason.CANCELLED: "cancelled",
}
"""The engine's reasons in Dynamo's words; an error is raised instead."""


def request_of(body: Mapping[str, Any], max_seq_len: int) -> GenerationRequest:
    """What the engine is asked for a body that Dynamo's frontend has tokenised.

    Raises:
        RequestError: INVALID_ARG, a field that cannot work or that would change nothing.
    """
    prompt = list(body["token_ids"])
    sampling = body.get("sampling_options") or {}
    stop = body.get("stop_conditions") or {}
    output = body.get("output_options") or {}
    for name, why in REFUSED.items():
        value = sampling.get(name)
        if value is True or value not in _NOTHING:
            raise _invalid(f"{name} is not supported: {why}")
    if output.get("prompt_logprobs") is not None:
        raise _invalid("prompt_logprobs is not supported: log-probabilities are of generated tokens")
    for name in ("multi_modal_data", "encoder_result", "prefill_result"):
        if body.get(name):
            raise _invalid(f"{name} is not supported: text only, by workers that do all of it")
    room = max_seq_len - len(prompt)
    if room < 1:
        raise _invalid(f"the prompt has {len(prompt)} tokens and the context {max_seq_len}: shorten it")
    top = output.get("logprobs")
    return GenerationRequest(
        prompt_ids=prompt,
        max_tokens=min(int(stop.get("max_tokens") or room), room),
        sampling=_sampling(sampling),
        end_id=-1 if stop.get("ignore_eos") else None,
        stop_ids=tuple([] if stop.get("ignore_eos") else (stop.get("stop_token_ids_hidden") or ()))
        + tuple(stop.get("stop_token_ids") or ()),
        stop=tuple(text.encode() for text in stop.get("stop") or ()),
        min_tokens=int(stop.get("min_tokens") or 0),
        return_log_probs=top is not None,
        top_log_probs=int(top or 0),
        guide=_guide(sampling.get("guided_decoding")),
    )


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    """OpenAI's defaults where nothing is said."""
    temperature = _or(options.get("temperature"), 1.0)
    seed = options.get("seed")
    drawn = temperature != GREEDY  # a negative one is refused by the engine's own check
    return SamplingParams(
        temperature=temperature if drawn else 1.0,
        top_k=max(0, int(_or(options.get("top_k"), 0))) if drawn else 1,
        top_p=_or(options.get("top_p"), 1.0) if drawn else None,
        min_p=options.get("min_p") if drawn else None,
        repetition_penalty=_or(options.get("repetition_penalty"), 1.0),
        presence_penalty=_or(options.get("presence_penalty"), 0.0),
        frequency_penalty=_or(options.get("frequency_penalty"), 0.0),
        seed=None if seed is None else int(seed) % 2**64,
    )


def _or(value: Any, default: float) -> float:
    return default if value is None else value


def _guide(given: Mapping[str, Any] | None) -> Guide | None:
    """Enforced, or refused here: never dropped."""
    wanted = {name: value for name, value in (given or {}).items() if value not in (None, False)}
    wanted.pop("backend", None)
    if not wanted:
        return None
    found = response_format({"structured_outputs": wanted})
    if found is None:
        return None
    guide = Guide(found.type, found.text)
    grammar.check(guide)
    return guide


def _invalid(message: str) -> RequestError:
    return RequestError(Code.INVALID_ARG, message)


def chunk(piece: RequestOutput, names: TokenNames | None) -> dict[str, Any]:
    """An output of the engine as Dynamo's frontend takes it; its last one has the reason and the counts.

    Args:
        names: of tokens, where log-probabilities are wanted.
    """
    made: dict[str, Any] = {"token_ids": list(piece.token_ids), "index": 0}
    if names is not None and piece.token_ids:
        made["log_probs"] = [max(value, FLOOR) for value in piece.log_probs]
        if piece.top_log_probs:
            made["top_logprobs"] = [
                [_entry(rank, token, max(value, FLOOR), names) for rank, (token, value) in enumerate(most, 1)]
                for most in piece.top_log_probs
            ]
    if piece.finish_reason is not None:
        made["finish_reason"] = FINISH[piece.finish_reason]
        made["completion_usage"] = {
            "prompt_tokens": piece.num_input_tokens,
            "completion_tokens": piece.num_output_tokens,
            "total_tokens": piece.num_input_tokens + piece.num_output_tokens,
        }
    return made


def _entry(rank: int, token: int, value: float, names: TokenNames) -> dict[str, Any]:
    text, data = names.of(token)
    return {"rank": rank, "token_id": token, "token": text, "logprob": value, "bytes": list(data)}
