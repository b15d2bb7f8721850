"""What one request asks of Triton: from OpenAI's fields to tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flightline.client.params import DECLARED
from flightline.gateway import params
from flightline.gateway.chat.grammars import in_final_channel
from flightline.gateway.chat.guides import Guide, Reasoning, response_format
from flightline.gateway.chat.messages import parse_messages
from flightline.gateway.chat.tools import ToolPlan, parse_tools
from flightline.gateway.errors import invalid
from flightline.gateway.params import CHAT, COMPLETIONS, MOST_CHOICES, OFFERED, parse
from flightline.gateway.served import ServedModel
from flightline.gateway.upstream import bias_tensors, infer_request

COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that does not say."""
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")

Tensors = list[tuple[str, str, Sequence[Any]]]


@dataclass
class Job:
    """A request, checked and tokenised."""

    model: str
    """Name to echo."""
    prompts: list[list[int]]
    requests: list[bytes]
    """ModelInferRequests, one for each prompt."""
    n: int
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    top_logprobs: int | None = None
    """Alternatives to each token's log-probability; None: none are wanted at all."""
    ids_as_tokens: bool = False
    return_token_ids: bool = False
    echoed: list[str] = field(default_factory=list)
    """Texts that come before the answers; one for each prompt, or none."""
    echoes_only: bool = False
    """No token is asked for. One is generated, since no step ends without; nobody is told."""
    plan: ToolPlan | None = None
    reasoning: Reasoning = Reasoning.NONE
    include_reasoning: bool = True
    skips_special_tokens: bool = True
    """The text does not spell them."""
    names: dict[str, str] = field(default_factory=dict)
    """Tensors, and the fields of the request that they have their values from."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def of_completions(body: Any, model: ServedModel, request_id: str) -> Job:
    """Raises ApiError or RequestError; called off the event loop."""
    values = parse(body, COMPLETIONS, model.defaults)
    name = model.check_name(values["model"])
    n, special = values["n"], values["add_special_tokens"]
    given = _prompts(values["prompt"], n)
    prompts = [
        model.encode(prompt, special is not False, "prompt")
        if isinstance(prompt, str)
        else model.check_ids(prompt, "prompt")
        for prompt in given
    ]
    most = values["max_tokens"]
    if most == 0 and not values["echo"]:
        raise invalid("max_tokens is 0: it must be at least 1, or echo must be true", "max_tokens")
    values["top_logprobs"] = values["logprobs"]
    values["max_tokens"] = COMPLETION_TOKENS if most is None else max(most, 1)
    guide = response_format(body)
    if values["echo"] and values["logprobs"] is not None and most == 1 and guide is None:
        values["ignore_eos"] = True  # harnesses take the last token for the generated one: there must be one
    names = params.names(body, COMPLETIONS) | {"input_ids": "prompt"}
    job = _job(name, prompts, values, model, guide, names, request_id)
    if values["echo"]:
        job.echoed = [
            prompt if isinstance(prompt, str) else model.vocabulary.bytes.decode(prompt) for prompt in given
        ]
        job.echoes_only = most == 0
    return job


def of_chat(body: Any, model: ServedModel, request_id: str) -> Job:
    """As ``of_completions``."""
    values = parse(body, CHAT, model.defaults)
    name = model.check_name(values["model"])
    prompt, plan, reasoning = render(body, values, model)
    guide = _chat_guide(body, plan, reasoning, model)
    if values["top_logprobs"] and not values["logprobs"]:
        raise invalid("top_logprobs needs logprobs: set logprobs to true", "top_logprobs")
    values["top_logprobs"] = (values["top_logprobs"] or 0) if values["logprobs"] else None
    values["max_tokens"] = values["max_completion_tokens"] or values["max_tokens"]
    if plan.keep_special_tokens or reasoning is Reasoning.CHANNELS:
        values["skip_special_tokens"] = False
    values["stop_token_ids"] = list(dict.fromkeys([*(values["stop_token_ids"] or ()), *model.template.ends]))
    ids = model.encode(prompt, bool(values["add_special_tokens"]), "messages")
    names = params.names(body, CHAT) | {"input_ids": "messages"}
    if plan.guide is not None:
        names |= dict.fromkeys(("guided_decoding_guide", "guided_decoding_guide_type"), "tools")
    values["thinks"] = reasoning is not Reasoning.NONE
    job = _job(name, [ids], values, model, guide, names, request_id)
    job.plan, job.reasoning, job.include_reasoning = plan, reasoning, values["include_reasoning"]
    return job


def _chat_guide(body: Any, plan: ToolPlan, reasoning: Reasoning, model: ServedModel) -> Guide | None:
    """What the answer is kept to; calls that may come only as far as this backend can."""
    guide = plan.guide or response_format(body)
    if guide is None:
        return None
    if reasoning is Reasoning.CHANNELS and plan.guide is None:
        guide = in_final_channel(guide, model.template.special_ids)
    guide = guide.beside(reasoning)
    if not plan.optional:
        if plan.calls is not None and model.why_not(guide):
            plan.refuse_by_name(model.why_not)
        return guide
    if model.can_enforce(guide):
        return guide
    looser = plan.loosened(model.can_enforce)
    if looser is None or not model.can_enforce(looser := looser.beside(reasoning)):
        return None
    return looser


def render(body: Any, values: dict[str, Any], model: ServedModel) -> tuple[str, ToolPlan, Reasoning]:
    """The prompt of a chat, and how its answer is to be read."""
    template = model.template
    messages = parse_messages(values["messages"])
    plan = parse_tools(body, template)
    goes_on, begins = values["continue_final_message"], values["add_generation_prompt"]
    if goes_on and begins:
        raise invalid(
            "continue_final_message and add_generation_prompt are both true: it must be one of the two",
            "continue_final_message",
        )
    variables = dict(values["chat_template_kwargs"] or {})
    if values["reasoning_effort"] is not None:
        variables.setdefault("reasoning_effort", values["reasoning_effort"])
    prompt = template.render(
        messages,
        tools=plan.tools,
        documents=values["documents"],
        add_generation_prompt=not goes_on if begins is None else begins,
        continue_final_message=goes_on,
        kwargs=variables,
    )
    return prompt, plan, template.reasoning(prompt)


def _prompts(prompt: Any, n: int) -> list[str | list[int]]:
    """Each prompt of a completion."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt:
        prompts = prompt
    else:
        raise invalid("prompt is missing or empty: it must be text, token ids, or a list of either", "prompt")
    if len(prompts) * n > MOST_CHOICES:
        raise invalid(
            f"prompt has {len(prompts)} prompts and n is {n}: together they must be at most {MOST_CHOICES} answers",
            "prompt",
        )
    for one in prompts:
        if not one or not isinstance(one, str | list):
            raise invalid("prompt holds an empty prompt: each must be text or token ids", "prompt")
    return prompts


def _job(
    name: str,
    prompts: list[list[int]],
    values: dict[str, Any],
    model: ServedModel,
    guide: Guide | None,
    names: dict[str, str],
    request_id: str,
) -> Job:
    tensors = [*_tensors(values, model), *_guide(guide)]
    requests = []
    for number, ids in enumerate(prompts):
        max_tokens = model.room(len(ids), values["max_tokens"], names)
        if (least := values["min_tokens"]) is not None and least > max_tokens:
            raise invalid(f"min_tokens is {least}: it must be at most max_tokens={max_tokens}", "min_tokens")
        own = [("input_ids", "INT32", ids), ("max_tokens", "INT32", [max_tokens])]
        part = f"{request_id}-{number}" if len(prompts) > 1 else request_id
        requests.append(infer_request(part, [*own, *tensors]))
    options = _stream_options(values)
    return Job(
        model=name,
        prompts=prompts,
        requests=requests,
        n=values["n"],
        stream=values["stream"],
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        top_logprobs=values["top_logprobs"],
        ids_as_tokens=values["return_tokens_as_token_ids"],
        return_token_ids=values["return_token_ids"],
        skips_special_tokens=values["skip_special_tokens"],
        names=names,
    )


def _stream_options(values: dict[str, Any]) -> dict[str, Any]:
    options = values["stream_options"] or {}
    if options and not values["stream"]:
        raise invalid("stream_options needs stream: set stream to true, or leave it out", "stream_options")
    for name, value in options.items():
        if name not in _STREAM_OPTIONS:
            raise invalid(f"stream_options.{name[:80]} is not known: leave it out", "stream_options")
        if value is not None and not isinstance(value, bool):
            raise invalid(f"stream_options.{name} must be true or false", "stream_options")
    if options.get("include_obfuscation"):
        raise invalid("stream_options.include_obfuscation is not supported: leave it out", "stream_options")
    return options


def _tensors(values: dict[str, Any], model: ServedModel) -> Tensors:
    """All but the prompt, ``max_tokens`` and the guide."""
    made: Tensors = [
        *_sampling(values),
        *_offered(values, model),
        ("stream", "BOOL", [values["stream"]]),
        ("return_num_output_tokens", "BOOL", [True]),
        ("return_finish_reason", "BOOL", [True]),
    ]
    if model.tells_cached_tokens:
        made.append(("return_num_cached_tokens", "BOOL", [True]))
    if model.counts_at_end and not (values["stream_options"] or {}).get("continuous_usage_stats"):
        made.append(("counts_at_end", "BOOL", [True]))
    if values["logit_bias"]:
        model.check_ids(values["logit_bias"], "logit_bias")
        made += bias_tensors(values["logit_bias"])
    if values["top_logprobs"] is not None:
        made.append(("return_log_probs", "BOOL", [True]))
        if values.get("echo"):
            made.append(("return_prompt_log_probs", "BOOL", [True]))
    if values["top_logprobs"]:
        made.append(("top_logprobs", "INT32", [values["top_logprobs"]]))
    if values["top_logprobs"] is not None or values["return_token_ids"] or values.get("thinks"):
        made.append(("return_token_ids", "BOOL", [True]))
    return made


_OTHERWISE = ("max_tokens", "temperature", "top_p", "top_k")
"""Fields that do not become their tensor as they are."""


def _offered(values: dict[str, Any], model: ServedModel) -> Tensors:
    """Fields that are the server's own parameters and ask for something."""
    made: Tensors = []
    for field_, name in OFFERED.items():
        declared, value = DECLARED[name], values[field_]
        assert declared.openai is not None
        if field_ in _OTHERWISE or value is None or value in ([], declared.openai.default):
            continue
        if declared.wire_type == "BYTES":
            value = json.dumps(value)  # a text that happens to look like a JSON list would be taken for one
        elif declared.wire_type == "UINT64":
            value %= 2**64
        elif declared.many:
            model.check_ids(value, field_)
        made.append((name, declared.wire_type, value if isinstance(value, list) else [value]))
    return made


def _sampling(values: dict[str, Any]) -> Tensors:
    """NVIDIA's contract is greedy unless top-k or top-p asks for sampling; OpenAI's samples unless told."""
    if values["temperature"] == 0 or values["top_p"] == 0:
        return [("top_k", "INT32", [1])]
    made: Tensors = [("temperature", "FP32", [values["temperature"]]), ("top_p", "FP32", [values["top_p"]])]
    return [*made, ("top_k", "INT32", [values["top_k"]])] if values["top_k"] > 0 else made


def _guide(guide: Guide | None) -> Tensors:
    """Whether it can be enforced ``text_generation`` says, before it generates anything."""
    if guide is None:
        return []
    return [
        ("guided_decoding_guide_type", "BYTES", [guide.type]),
        ("guided_decoding_guide", "BYTES", [guide.text]),
    ]
