"""The official SDK against the gateway and a real Triton with a tiny random model."""

from __future__ import annotations

import asyncio
import functools
import re
from typing import Any, Literal

import openai
import pydantic
import pytest

from flightline.client import Client
from flightline.supervisor.server import Server
from tests.gateway.agreement import disagreements
from tests.model_repository.endpoints import idle, wait_until
from tests.serving import CONTEXT

pytestmark = pytest.mark.slow

PROMPT = "the quick brown fox"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
HELLO = [{"role": "user", "content": "the dog says: ✓ 你好 🙂"}]


@pytest.fixture(scope="module")
def model(llm: openai.OpenAI) -> str:
    (card,) = llm.models.list().data
    return card.id


def totals(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_models(llm: openai.OpenAI, model: str) -> None:
    card = llm.models.retrieve(model)
    assert (card.id, card.object, card.max_model_len) == (model, "model", CONTEXT)
    with pytest.raises(openai.NotFoundError) as missing:
        llm.models.retrieve("somebody/else")
    assert missing.value.code == "model_not_found" and "somebody/else" in missing.value.message


def test_a_completion_is_what_triton_says(llm: openai.OpenAI, model: str, served: Server) -> None:
    with Client(served.settings.grpc_url) as client:
        own = client.generate(PROMPT, max_tokens=24, return_finish_reason=True)
    whole = llm.completions.create(model=model, prompt=PROMPT, **GREEDY)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == (own.text, own.finish_reason)
    assert whole.usage is not None
    counts = totals(whole.usage)
    assert counts == (
        own.num_input_tokens,
        own.num_output_tokens,
        own.num_input_tokens + own.num_output_tokens,
    )
    chunks = list(
        llm.completions.create(
            model=model, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == own.text
    # Where the machine is busy, tokens travel together, all of them at worst.
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [own.finish_reason]
    assert (chunks[-1].choices, totals(chunks[-1].usage)) == ([], counts)
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "text_completion")
    }
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_chat_whole_and_streamed(llm: openai.OpenAI, model: str, served: Server) -> None:
    """The template writes BOS, and nobody else does: the same ids as a prompt give the same answer."""
    ids = llm.post("/../tokenize", body={"messages": HELLO}, cast_to=object)["tokens"]
    assert ids.count(0) == 1 and ids[0] == 0
    prompted = llm.completions.create(model=model, prompt=ids, **GREEDY)
    whole = llm.chat.completions.create(model=model, messages=HELLO, **GREEDY)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", prompted.choices[0].text)
    assert choice.finish_reason == prompted.choices[0].finish_reason
    assert totals(whole.usage) == totals(prompted.usage) and whole.usage.prompt_tokens == len(ids)
    asked: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "stream_options": {"include_usage": True},
        **GREEDY,
    }
    chunks = list(llm.chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == [
        "assistant",
        *[None] * (len(chunks) - 2),
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, choice.finish_reason]
    assert totals(chunks[-1].usage) == totals(whole.usage)
    stop = word_of(choice.message.content)
    with llm.chat.completions.stream(stop=stop, **asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert events.count("content.done") == 1
    assert final.choices[0].message.content == choice.message.content.split(stop)[0]
    assert final.choices[0].finish_reason == "stop"


def test_chat_says_what_triton_says(served: Server) -> None:
    """Two hundred prompts are a command: ``python -m tests.gateway.agreement``."""
    found, with_stops = disagreements(served.settings.http_url, served.settings.grpc_url, 12)
    assert not found and with_stops > 6


def word_of(text: str) -> str:
    """Some letters in the middle of an answer, which is bytes at random."""
    return re.findall(r"[a-z]{2,}", text)[-1][:2]


def test_stops_and_limits(llm: openai.OpenAI, model: str) -> None:
    whole = llm.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text
    stop = word_of(whole)
    cut = llm.completions.create(model=model, prompt=PROMPT, stop=["never seen", stop], **GREEDY)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    with pytest.raises(openai.BadRequestError) as late:
        llm.chat.completions.create(model=model, messages=HELLO, max_tokens=CONTEXT)
    assert late.value.code == "context_length_exceeded" and "maximum context length" in late.value.message


def test_a_stop_text_that_looks_like_a_list(llm: openai.OpenAI, model: str) -> None:
    whole = llm.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text
    listed = llm.completions.create(model=model, prompt=PROMPT, stop=[f'["{word_of(whole)}"]'], **GREEDY)
    assert listed.choices[0].text == whole


def test_several_choices_of_several_prompts(llm: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "prompt": [PROMPT, "a token"],
        "n": 2,
        "seed": 5,
        "max_tokens": 8,
    }
    whole = llm.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4
    again: dict[int, str] = dict.fromkeys(range(4), "")
    usage = None
    for chunk in llm.completions.create(stream=True, stream_options={"include_usage": True}, **asked):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            again[choice.index] += choice.text
    assert list(again.values()) == texts
    assert totals(usage) == totals(whole.usage)
    assert usage.completion_tokens == sum(
        8 if choice.finish_reason == "length" else 0 for choice in whole.choices
    )
    alone = llm.completions.create(model=model, prompt="a token", seed=6, max_tokens=8)
    assert alone.choices[0].text == texts[3]  # choice i has the seed + i


def test_tokens_from_the_prefix_cache(llm: openai.OpenAI, model: str) -> None:
    """Whole blocks of the prompt, once for each prompt."""
    asked: dict[str, Any] = {
        "model": model,
        "prompt": "never asked before: " + "a b c d " * 40,
        "max_tokens": 2,
    }
    first, again = (llm.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    cached = again.prompt_tokens_details.cached_tokens
    assert first.prompt_tokens // 2 < cached < first.prompt_tokens
    twice = llm.completions.create(**asked | {"prompt": [asked["prompt"]] * 2, "n": 2}).usage
    assert twice.prompt_tokens_details.cached_tokens == 2 * cached
    responded = llm.responses.create(model=model, input=asked["prompt"], max_output_tokens=16).usage
    assert responded.input_tokens_details.cached_tokens == 0  # the chat template's text comes first


def test_logprobs(llm: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = llm.chat.completions.create(**asked)
    choice = whole.choices[0]
    entries = choice.logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert (
        b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace") == choice.message.content
    )
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    streamed = [
        entry
        for chunk in llm.chat.completions.create(stream=True, **asked)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    plain = llm.completions.create(model=model, prompt=PROMPT, logprobs=2, **GREEDY).choices[0]
    found = plain.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)


def test_token_ids_echo_and_biases(llm: openai.OpenAI, model: str) -> None:
    extra = {"return_token_ids": True}
    plain = llm.completions.create(model=model, prompt=PROMPT, echo=True, extra_body=extra, **GREEDY)
    first = plain.choices[0].token_ids[0]
    assert (
        plain.choices[0].text.startswith(PROMPT) and len(plain.prompt_token_ids) == plain.usage.prompt_tokens
    )
    banned = llm.completions.create(
        model=model, prompt=PROMPT, logit_bias={str(first): -100}, extra_body=extra, **GREEDY
    )
    assert first not in banned.choices[0].token_ids
    forced = llm.completions.create(
        model=model, prompt=PROMPT, logit_bias={str(first): 100}, extra_body=extra, **GREEDY
    )
    assert set(forced.choices[0].token_ids) == {first}
    ended = llm.completions.create(
        model=model, prompt=PROMPT, extra_body={"stop_token_ids": [first], "min_p": 0.5, "top_k": 9}, **GREEDY
    )
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_echoed_with_its_log_probabilities(llm: openai.OpenAI, model: str, most: int) -> None:
    """As evaluation harnesses ask: what was said is as likely in the prompt as it was when it was generated."""
    extra = {"return_token_ids": True}
    said = llm.completions.create(model=model, prompt=PROMPT, logprobs=2, extra_body=extra, **GREEDY)
    ids = [*said.prompt_token_ids, *said.choices[0].token_ids]
    asked: dict[str, Any] = {"model": model, "prompt": ids, "echo": True, "logprobs": 2, "temperature": 0}
    answer = llm.completions.create(max_tokens=most, **asked)
    (choice,) = answer.choices
    found, before = choice.logprobs, len(said.prompt_token_ids)
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + most
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert answer.usage.completion_tokens == most and answer.usage.prompt_tokens == len(ids)
    assert choice.finish_reason in ("length", "stop") and (most or choice.finish_reason == "length")
    assert found.token_logprobs[before : len(ids)] == pytest.approx(
        said.choices[0].logprobs.token_logprobs, abs=0.01
    )
    assert found.text_offset == sorted(found.text_offset)
    chunks = list(llm.completions.create(max_tokens=most, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert parts[0].token_logprobs[1:] == pytest.approx(found.token_logprobs[1 : len(ids)], abs=0.01)


def test_an_end_is_a_token_behind_an_echoed_prompt(llm: openai.OpenAI, model: str) -> None:
    """Harnesses leave out the last token, which they take for the one that they had to ask for."""
    ids, end = [5, 6, 7], 1
    asked: dict[str, Any] = {"prompt": ids, "logprobs": 1, "max_tokens": 1, "logit_bias": {str(end): 100}}
    (choice,) = llm.completions.create(model=model, echo=True, temperature=0, **asked).choices
    assert choice.logprobs.tokens[len(ids) :] == ["</s>"]
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs) == len(ids) + 1
    (plain,) = llm.completions.create(model=model, temperature=0, **asked).choices
    assert plain.finish_reason == "stop" and not plain.logprobs.tokens


def test_an_echo_alone(llm: openai.OpenAI, model: str) -> None:
    for stream in (False, True):
        told = llm.completions.create(model=model, prompt=PROMPT, echo=True, max_tokens=0, stream=stream)
        choices = [each.choices[0] for each in (told if stream else [told])]
        assert "".join(choice.text for choice in choices) == PROMPT and choices[-1].finish_reason == "length"


def test_continuing_the_last_message(llm: openai.OpenAI, model: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "the fox"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    answer = llm.chat.completions.create(model=model, messages=messages, extra_body=goes_on, **GREEDY)
    assert answer.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError) as both:
        llm.chat.completions.create(
            model=model, messages=messages, extra_body=goes_on | {"add_generation_prompt": True}, **GREEDY
        )
    assert both.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"10000000": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"nonsense": 1}, "nonsense"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_values_are_400_and_named(llm: openai.OpenAI, model: str, change: dict, param: str) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4} | change
    for stream in (False, True):
        if stream and "stream_options" in change:
            continue
        with pytest.raises(openai.BadRequestError) as refused:
            llm.post("/completions", body=body | {"stream": stream}, cast_to=object)
        assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
        assert param in refused.value.message and refused.value.request_id


def test_values_that_ask_for_nothing_pass(llm: openai.OpenAI, model: str) -> None:
    """What SDKs and load generators send along."""
    extra = {
        "best_of": 1,
        "use_beam_search": False,
        "repetition_penalty": 1.0,
        "top_k": -1,
        "length_penalty": 1.0,
    }
    answer = llm.completions.create(
        model=model, prompt=PROMPT, max_tokens=2, logit_bias={}, stop=None, user="me", extra_body=extra
    )
    assert answer.usage.completion_tokens <= 2


def test_whoever_leaves_frees_its_blocks(served: Server, model: str) -> None:
    """Streaming or not, with several choices."""

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.settings.http_url}/v1", api_key="none") as client:
            long = {
                "model": model,
                "prompt": PROMPT,
                "max_tokens": CONTEXT - 100,
                "n": 2,
                "extra_body": {"ignore_eos": True},
            }
            whole = asyncio.create_task(client.completions.create(**long))
            stream = await client.completions.create(stream=True, **long)
            await anext(aiter(stream))
            await asyncio.to_thread(wait_until, lambda: served.engine.stats.active_requests == 4)
            await stream.close()
            whole.cancel()
            await asyncio.gather(whole, return_exceptions=True)

    wait_until(lambda: idle(served))
    asyncio.run(leave())
    wait_until(lambda: idle(served))


def test_responses(llm: openai.OpenAI, model: str) -> None:
    """The same answer as a chat's, and the events that the SDK's own helper expects."""
    asked: dict[str, Any] = {"model": model, "input": HELLO[0]["content"], "temperature": 0}
    text = llm.chat.completions.create(model=model, messages=HELLO, **GREEDY).choices[0].message.content
    cut = llm.responses.create(max_output_tokens=24, **asked)
    assert (cut.output_text, cut.status) == (text, "incomplete")
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert (cut.usage.output_tokens, cut.store) == (24, False)
    events = list(llm.responses.create(max_output_tokens=24, stream=True, **asked))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    with llm.responses.stream(max_output_tokens=24, **asked) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"
    with pytest.raises(openai.BadRequestError) as refused:
        llm.responses.create(previous_response_id="resp_1", **asked)
    assert "previous_response_id" in refused.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        llm.responses.create(stream=True, **asked | {"temperature": 9})
    assert bad.value.param == "temperature"


class Answer(pydantic.BaseModel):
    """What the SDK makes a JSON schema of."""

    animal: Literal["dog", "fox"]
    quick: bool


def test_answers_that_keep_to_a_schema(llm: openai.OpenAI, model: str) -> None:
    """A model of random weights knows no JSON: whatever comes, the grammar made it."""
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 200}
    parsed = llm.chat.completions.parse(response_format=Answer, seed=1, **asked).choices[0]
    assert isinstance(parsed.message.parsed, Answer) and parsed.finish_reason == "stop"
    with llm.chat.completions.stream(response_format=Answer, seed=2, **asked) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Answer)
    responded = llm.responses.parse(model=model, input="the dog", text_format=Answer, max_output_tokens=200)
    assert isinstance(responded.output_parsed, Answer)
    chosen = llm.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=50,
        extra_body={"structured_outputs": {"choice": ["fox", "dog"]}},
    )
    assert chosen.choices[0].text in ("fox", "dog")
    expression = llm.chat.completions.create(extra_body={"guided_regex": "[0-9]{3}"}, **asked)
    assert re.fullmatch("[0-9]{3}", expression.choices[0].message.content)


@pytest.mark.parametrize(
    "schema", [{"type": "array", "uniqueItems": True}, {"type": "nonsense"}, {"$ref": "http://example.org/x"}]
)
def test_a_schema_that_cannot_be_enforced_is_400(llm: openai.OpenAI, model: str, schema: dict) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            llm.chat.completions.create(model=model, messages=HELLO, response_format=wanted, stream=stream)
        assert (refused.value.param, refused.value.type) == ("response_format", "invalid_request_error")


UNENFORCEABLE = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/completions", {"prompt": "a", "guided_json": UNENFORCEABLE}, "guided_json"),
        (
            "/chat/completions",
            {"messages": HELLO, "structured_outputs": {"regex": "(?=a)b"}},
            "structured_outputs",
        ),
        ("/chat/completions", {"messages": HELLO, "max_completion_tokens": CONTEXT}, "max_completion_tokens"),
        ("/responses", {"input": "a", "max_output_tokens": CONTEXT}, "max_output_tokens"),
        ("/responses", {"input": "a", "text": {"format": {"type": "grammar"}}}, "text.format"),
        (
            "/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": UNENFORCEABLE}}},
            "text.format",
        ),
        ("/responses", {"input": [{"role": "nobody", "content": "a"}]}, "input"),
        ("/responses", {"input": "a", "n": 2}, "n"),
        ("/responses", {"input": "a", "instructions": 5}, "instructions"),
    ],
)
def test_an_error_is_about_what_was_sent(llm: openai.OpenAI, path: str, body: dict, param: str) -> None:
    """In the words of the endpoint, whoever on the way has found it."""
    with pytest.raises(openai.BadRequestError) as refused:
        llm.post(path, body=body, cast_to=object)
    too_long = refused.value.code == "context_length_exceeded"  # then it is about the prompt, too
    assert too_long or refused.value.param.startswith(param)
    assert param in refused.value.message and "guided_decoding" not in refused.value.message


def test_bans_that_leave_a_guide_no_token_are_400(llm: openai.OpenAI, model: str) -> None:
    """It shows while the answer is generated; then the stream says it, or the status, if no token has gone before."""
    contradiction = {"structured_outputs": {"choice": ["yes"]}, "bad_words": ["s"]}
    ask = functools.partial(
        llm.chat.completions.create, model=model, messages=HELLO, extra_body=contradiction
    )
    with pytest.raises(
        openai.BadRequestError, match="bad_words and structured_outputs leave no token"
    ) as refused:
        ask()
    assert refused.value.param == "bad_words"
    with (
        pytest.raises(openai.APIError, match="bad_words and structured_outputs leave"),
        ask(stream=True) as stream,
    ):
        assert "s" not in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
