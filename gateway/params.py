"""Every field that a request to /v1/completions or /v1/chat/completions may have, once.

``TABLE`` says of each what it must be and what becomes of it. The server's own parameters are in it as
``client/params.py`` declares them, the other fields are declared here. Validation reads it, and so does
``docs/GATEWAY.md``. A field is honoured, or inert (it says nothing about the answer), or refused unless its value asks
for nothing; one that is not in the table is refused too: nothing is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from flightline.client.params import DECLARED, INT32_MOST, MOST_TOP_LOG_PROBS, Declaration
from flightline.gateway.errors import ApiError, invalid

MOST_CHOICES = 128
"""Answers to one request: ``n`` times its prompts."""
MOST_IDS = 1024


class Kind(StrEnum):
    """What a value must be."""

    NUMBER = "number"
    INTEGER = "integer"
    BOOLEAN = "boolean"
    TEXT = "string"
    TEXTS = "string or list of strings"
    IDS = "list of token ids"
    BIAS = "object: token id to number"
    OBJECT = "object"
    ANY = "any"


class Rule(StrEnum):
    HONOURED = "honoured"
    INERT = "accepted, without effect"
    REFUSED = "refused"


CHAT, COMPLETIONS = "chat", "completions"
BOTH = (CHAT, COMPLETIONS)


@dataclass(frozen=True)
class Parameter:
    """One field of the request's JSON."""

    name: str
    kind: Kind
    rule: Rule = Rule.HONOURED
    endpoints: tuple[str, ...] = BOTH
    low: float | None = None
    high: float | None = None
    default: Any = None
    tensor: str = ""
    """The input of ``text_generation`` that has its value."""
    neutral: tuple = ()
    """Of a refused one: the values that ask for nothing."""
    like: str = ""
    """And a field whose value, in the same request, does so too."""
    what: str = ""


def _inert(*names: str, what: str = "", endpoints: tuple[str, ...] = BOTH) -> list[Parameter]:
    return [Parameter(name, Kind.ANY, Rule.INERT, endpoints, what=what) for name in names]


def _refused(
    name: str, *neutral: Any, what: str, endpoints: tuple[str, ...] = BOTH, like: str = ""
) -> Parameter:
    return Parameter(name, Kind.ANY, Rule.REFUSED, endpoints, neutral=neutral, like=like, what=what)


_KINDS = {"FP32": Kind.NUMBER, "INT32": Kind.INTEGER, "UINT64": Kind.INTEGER, "BOOL": Kind.BOOLEAN}
_LISTS = {"INT32": Kind.IDS, "BYTES": Kind.TEXTS}
OFFERED = {
    declared.openai.name or name: name for name, declared in DECLARED.items() if declared.openai is not None
}
"""Fields that are request parameters of the server's: the field's name -> the tensor's."""


def _offered(field: str, declared: Declaration) -> Parameter:
    openai = declared.openai
    assert openai is not None
    kinds = _LISTS if declared.many else _KINDS
    return Parameter(
        field,
        kinds[declared.wire_type],
        low=openai.low,
        high=openai.high,
        default=openai.default,
        tensor=OFFERED[field],
        what=openai.what,
    )


_C, _T = (CHAT,), (COMPLETIONS,)
_GUIDE = "guided_decoding_guide, guided_decoding_guide_type"
_NO_BEAMS = "there is no beam search"
_ONE_SCHEDULE = "requests are served in the order in which they came"

TABLE: tuple[Parameter, ...] = (
    Parameter("model", Kind.TEXT, what="a name of `/v1/models`; left out: the served one"),
    Parameter("messages", Kind.ANY, endpoints=_C, what="text only; `developer` is `system`"),
    Parameter("prompt", Kind.ANY, endpoints=_T, what="text, token ids, or a list of either"),
    *(_offered(field, DECLARED[name]) for field, name in OFFERED.items() if field != "max_tokens"),
    Parameter("max_tokens", Kind.INTEGER, low=1, high=INT32_MOST, endpoints=_C, tensor="max_tokens",
              what="default: the rest of the context"),
    Parameter("max_tokens", Kind.INTEGER, low=0, high=INT32_MOST, endpoints=_T, tensor="max_tokens",
              what="default 16; 0 with `echo` only"),
    Parameter("max_completion_tokens", Kind.INTEGER, low=1, high=INT32_MOST, endpoints=_C, tensor="max_tokens",
              what="wins over `max_tokens`"),
    Parameter("logit_bias", Kind.BIAS, low=-100, high=100, tensor="logit_bias_ids, logit_bias_weights"),
    Parameter("stream", Kind.BOOLEAN, default=False, tensor="stream"),
    Parameter("stream_options", Kind.OBJECT,
              what="`include_usage`, `continuous_usage_stats`, `include_obfuscation` (false); with `stream` only"),
    Parameter("logprobs", Kind.BOOLEAN, endpoints=_C, default=False, tensor="return_log_probs",
              what="of the model's distribution before temperature, penalties and masks where the backend has it"),
    Parameter("top_logprobs", Kind.INTEGER, low=0, high=MOST_TOP_LOG_PROBS, endpoints=_C, tensor="top_logprobs",
              what="needs `logprobs`"),
    Parameter("logprobs", Kind.INTEGER, low=0, high=MOST_TOP_LOG_PROBS, endpoints=_T, tensor="top_logprobs"),
    Parameter("echo", Kind.BOOLEAN, endpoints=_T, default=False, tensor="return_prompt_log_probs",
              what="the prompt before its answer; with `logprobs` its tokens' too, in backend torch"),
    Parameter("return_token_ids", Kind.BOOLEAN, default=False,
              what="`prompt_token_ids` and `token_ids` beside the text"),
    Parameter("return_tokens_as_token_ids", Kind.BOOLEAN, default=False, what="log-probabilities name `token_id:N`"),
    Parameter("add_special_tokens", Kind.BOOLEAN,
              what="BOS before the prompt; completions: true, chat: false, since the template writes it"),
    Parameter("response_format", Kind.ANY, endpoints=BOTH, tensor=_GUIDE,
              what="`text`, `json_object`, `json_schema`, `structural_tag`"),
    Parameter("structured_outputs", Kind.ANY, tensor=_GUIDE,
              what="`json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`"),
    Parameter("guided_json", Kind.ANY, tensor=_GUIDE),
    Parameter("guided_regex", Kind.ANY, tensor=_GUIDE),
    Parameter("guided_choice", Kind.ANY, tensor=_GUIDE),
    Parameter("guided_grammar", Kind.ANY, tensor=_GUIDE),
    Parameter("tools", Kind.ANY, endpoints=_C),
    Parameter("tool_choice", Kind.ANY, endpoints=_C, what="`none`, `auto`, `required`, a name or `allowed_tools`"),
    Parameter("parallel_tool_calls", Kind.BOOLEAN, endpoints=_C, default=True),
    Parameter("add_generation_prompt", Kind.BOOLEAN, endpoints=_C),
    Parameter("continue_final_message", Kind.BOOLEAN, endpoints=_C, default=False,
              what="goes on with the last message; not with `add_generation_prompt` true"),
    Parameter("documents", Kind.ANY, endpoints=_C, what="for templates that know them"),
    Parameter("chat_template_kwargs", Kind.OBJECT, endpoints=_C, what="variables of the template"),
    Parameter("reasoning_effort", Kind.TEXT, endpoints=_C, what="a variable of the template"),
    Parameter("include_reasoning", Kind.BOOLEAN, endpoints=_C, default=True, what="false: thoughts are left out"),
    Parameter("request_id", Kind.TEXT, what="as the header x-request-id"),
    *_inert("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
            "prompt_cache_options", "moderation", what="nothing is stored or moderated here"),
    *_inert("verbosity", endpoints=_C, what="a wish that no template knows"),
    *_inert("guided_decoding_backend", what="llguidance"),
    _refused("service_tier", "auto", "default", what="there is one tier"),
    _refused("best_of", 1, like="n", what="choose among `n` answers yourself", endpoints=_T),
    _refused("suffix", "", what="models that fill in the middle are not served", endpoints=_T),
    _refused("functions", [], what="use `tools`", endpoints=_C),
    _refused("function_call", "none", "auto", what="use `tool_choice`", endpoints=_C),
    _refused("audio", what="text only", endpoints=_C),
    _refused("modalities", ["text"], what="text only", endpoints=_C),
    _refused("prediction", what="guesses come from the prompt and the answer themselves", endpoints=_C),
    _refused("web_search_options", what="there is no search", endpoints=_C),
    _refused("chat_template", what="a template is code: the server has its own", endpoints=_C),
    _refused("mm_processor_kwargs", {}, what="text only", endpoints=_C),
    _refused("thinking_token_budget", what="thoughts have no limit of their own", endpoints=_C),
    _refused("use_beam_search", False, what=_NO_BEAMS),
    _refused("length_penalty", 1, what=_NO_BEAMS),
    _refused("include_stop_str_in_output", False, what="stop strings are never part of the answer"),
    _refused("spaces_between_special_tokens", True, what="the tokenizer decides"),
    _refused("truncate_prompt_tokens", what="shorten the prompt yourself"),
    _refused("truncation_side", what="shorten the prompt yourself"),
    _refused("prompt_logprobs", what="log-probabilities are of generated tokens"),
    _refused("logprob_token_ids", [], what="`top_logprobs` tells the most likely ones"),
    _refused("allowed_token_ids", what="ban tokens with `logit_bias`, or use `structured_outputs`"),
    _refused("guided_whitespace_pattern", what="set it in the schema"),
    _refused("priority", 0, what=_ONE_SCHEDULE),
    _refused("cache_salt", what="prompts of all clients share one cache"),
    _refused("kv_transfer_params", {}, what="there is no other engine to transfer from"),
    _refused("vllm_xargs", {}, what="they are vLLM's own"),
    _refused("stream_interval", 1, what="tokens are sent as they come"),
    _refused("repetition_detection", what="use a penalty"),
)  # fmt: skip

_BY_ENDPOINT: dict[str, dict[str, Parameter]] = {
    endpoint: {parameter.name: parameter for parameter in TABLE if endpoint in parameter.endpoints}
    for endpoint in BOTH
}


def parse(body: Any, endpoint: str, defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The honoured fields of a request, checked; a field that is null is one left out.

    Args:
        defaults: the model's own, before those of the table.

    Raises:
        ApiError: 400, names the field, what is wrong with it and what it must be.
    """
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    known = _BY_ENDPOINT[endpoint]
    values = {name: parameter.default for name, parameter in known.items() if parameter.rule is Rule.HONOURED}
    values.update(defaults)
    for name, value in body.items():
        parameter = known.get(name)
        if parameter is None:
            raise invalid(f"{name[:100]} is not a parameter of this endpoint: leave it out", name[:100])
        if value is None or parameter.rule is Rule.INERT:
            continue
        if parameter.rule is Rule.REFUSED:
            passing = (*parameter.neutral, body.get(parameter.like))
            if not any(_same(value, neutral) for neutral in passing):
                raise invalid(f"{name} is not supported: {parameter.what}", name, "unsupported_parameter")
            continue
        values[name] = _CHECKS[parameter.kind](parameter, value)
    return values


def names(body: Mapping[str, Any], endpoint: str) -> dict[str, str]:
    """Tensor -> the field of this request that it has its value from: what an error of Triton is about."""
    sent = (
        each
        for each in TABLE
        if endpoint in each.endpoints and each.tensor and body.get(each.name) is not None
    )
    return {tensor: parameter.name for parameter in sent for tensor in parameter.tensor.split(", ")}


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _wrong(parameter: Parameter, value: Any, wanted: str) -> ApiError:
    text = repr(value)
    return invalid(f"{parameter.name} is {text[:80]}: it must be {wanted}", parameter.name)


def _range(parameter: Parameter) -> str:
    if parameter.low is None and parameter.high is None:
        return ""
    return f" from {parameter.low} to {parameter.high}"


def _number(parameter: Parameter, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(parameter, value, "a number" + _range(parameter))
    return float(_bounded(parameter, value, "a number"))


def _integer(parameter: Parameter, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(parameter, value, "an integer" + _range(parameter))
    return _bounded(parameter, value, "an integer")


def _bounded(parameter: Parameter, value: Any, kind: str) -> Any:
    low, high = parameter.low, parameter.high
    if (low is not None and value < low) or (high is not None and value > high):
        raise _wrong(parameter, value, kind + _range(parameter))
    return value


def _boolean(parameter: Parameter, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(parameter, value, "true or false")
    return value


def _text(parameter: Parameter, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(parameter, value, "a string")
    return value


def _texts(parameter: Parameter, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    wanted = f"a string or a list of up to {parameter.high} strings, none of them empty"
    if not isinstance(texts, list) or len(texts) > (parameter.high or 0):
        raise _wrong(parameter, value, wanted)
    if not all(isinstance(text, str) and text for text in texts):
        raise _wrong(parameter, value, wanted)
    return texts


def _ids(parameter: Parameter, value: Any) -> list[int]:
    wanted = f"a list of up to {parameter.high} token ids"
    if not isinstance(value, list) or len(value) > (parameter.high or 0):
        raise _wrong(parameter, value, wanted)
    if not all(type(token) is int and 0 <= token <= INT32_MOST for token in value):
        raise _wrong(parameter, value, wanted)
    return value


def _bias(parameter: Parameter, value: Any) -> dict[int, float]:
    wanted = f"an object of up to {MOST_IDS} token ids, each with a number{_range(parameter)}"
    if not isinstance(value, dict) or len(value) > MOST_IDS:
        raise _wrong(parameter, value, wanted)
    made = {}
    for token, weight in value.items():
        if not (token.isascii() and token.isdigit() and int(token[:11]) <= INT32_MOST):
            raise _wrong(parameter, token, wanted)
        made[int(token)] = _number(parameter, weight)
    return made


def _object(parameter: Parameter, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(parameter, value, "an object")
    return value


_CHECKS = {
    Kind.NUMBER: _number,
    Kind.INTEGER: _integer,
    Kind.BOOLEAN: _boolean,
    Kind.TEXT: _text,
    Kind.TEXTS: _texts,
    Kind.IDS: _ids,
    Kind.BIAS: _bias,
    Kind.OBJECT: _object,
    Kind.ANY: lambda parameter, value: value,
}
