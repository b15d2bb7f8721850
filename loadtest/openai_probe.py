"""Requests to an OpenAI server outside of measured load: is it there, what does it know, how fast is it, is it idle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from flightline.client.errors import ClientError, InvalidRequest
from flightline.loadtest.http_client import HttpFailure
from flightline.loadtest.openai_api import OPENAI, OpenAiSettings, OpenAiTransport
from flightline.loadtest.options import Arm
from flightline.loadtest.records import RequestRecord
from flightline.loadtest.transport import Load

PROBE = "Are you there?"
PROBE_S = 60.0


def settings_of(arm: Arm) -> OpenAiSettings:
    return OpenAiSettings(arm.endpoint, arm.api, arm.token_ids)


def check_ready(arm: Arm, *, exact: bool, token_ids: bool, say: Callable[[str], None]) -> Arm:
    """The contestant with what its server can do.

    Args:
        exact: Answers will have to be of exact length.
        token_ids: Wanted, if the server sends them.

    Raises:
        ClientError: no server, another model, or one that refuses what is needed.
    """
    if token_ids:
        asked = replace(arm, token_ids=True)
        record = _ask(asked, PROBE, 2, PROBE_S, exact=exact)
        if record.complete and record.counted_tokens is not None:
            say(f"{arm.label}: tokens are counted by the ids that the server sends")
            return asked
    record = _ask(arm, PROBE, 2, PROBE_S, exact=exact)
    if record.error is not None:
        refused = exact and record.error.startswith("HTTP 4")
        remedy = " (NATURAL_LENGTH=1 does without min_tokens and ignore_eos)" if refused else ""
        raise InvalidRequest(f"{arm.label}: {record.error}{remedy}{_other_models(arm)}")
    say(f"{arm.label}: the server sends no token ids: its usage is held against the pieces of text alone")
    return arm


def _other_models(arm: Arm) -> str:
    """What the server has, if it tells, and the model is not among it. Some have more than they tell."""
    try:
        models = asyncio.run(OpenAiTransport(arm.url, settings_of(arm)).models())
    except (HttpFailure, TimeoutError):  # the other error tells enough
        return ""
    return "" if arm.endpoint in models else f"; its models are {', '.join(models) or 'none'}"


def ask(arm: Arm, prompt: str, timeout_s: float) -> RequestRecord:
    """One token.

    Raises:
        ClientError: no answer.
    """
    record = _ask(arm, prompt, 1, timeout_s, exact=False)
    if record.error is not None:
        raise ClientError(record.error)
    return record


def _ask(arm: Arm, prompt: str, tokens: int, timeout_s: float, *, exact: bool) -> RequestRecord:
    async def one() -> RequestRecord:
        transport = OpenAiTransport(arm.url, settings_of(arm))
        try:
            return await _measured(transport, Load(OPENAI, prompt, 0, tokens, exact=exact), timeout_s)
        finally:
            await transport.close()

    return asyncio.run(one())


async def _measured(transport: OpenAiTransport, load: Load, timeout_s: float | None) -> RequestRecord:
    request = transport.prepare(load)
    now_ns = time.monotonic_ns()
    record = RequestRecord(
        request.id,
        OPENAI,
        "",
        load.prompt_index,
        load.output_tokens,
        now_ns,
        time.time_ns(),
        exact=load.exact,
    )
    await transport.exchange(request, record, timeout_s)
    return record


def wave(
    arm: Arm, prompts: Sequence[str], output_tokens: int, enough: int, cut_off_s: float, exact: bool
) -> list[float]:
    """Seconds until each of the requests, sent at once, was answered; cut off after ``cut_off_s`` if ``enough`` were.

    Raises:
        ClientError: a request failed.
    """

    async def all_of_them() -> list[float]:
        transport = OpenAiTransport(arm.url, settings_of(arm))
        start = time.monotonic()
        done: list[float] = []
        loads = [Load(OPENAI, prompt, 0, output_tokens, exact=exact) for prompt in prompts]
        tasks = {asyncio.create_task(_measured(transport, load, None)) for load in loads}
        try:
            while tasks and (len(done) < enough or time.monotonic() - start < cut_off_s):
                ended, tasks = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    if error := task.result().error:
                        raise ClientError(f"{arm.label}: {error}")
                    done.append(time.monotonic() - start)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await transport.close()
        return done

    return asyncio.run(all_of_them())
