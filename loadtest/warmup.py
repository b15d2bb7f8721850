"""Bringing an endpoint to working temperature under the full load, and knowing when it is idle again."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from flightline.client import Client, ClientError, GenerateParams
from flightline.loadtest import openai_probe
from flightline.loadtest.options import Arm
from flightline.loadtest.plan import Pace
from flightline.loadtest.prompts import FIRST_OF_WARM_UP
from flightline.settings import SettingsError

WARMUP_S = 6.0
"""A wave that takes longer is cut off once it has shown its pace."""
ENOUGH_COMPLETIONS = 2
GONE_TRIES, GONE_PAUSE_S = 3, 0.5


def warm_up(
    arm: Arm, prompt: Callable[[int], str], concurrency: int, output_tokens: int, *, exact: bool = True
) -> Pace:
    """Sends one wave of requests and returns how fast it was answered.

    Raises:
        flightline.client.ClientError: a request failed.
    """
    wave = openai_probe.wave if arm.openai else _wave
    asked = [prompt(FIRST_OF_WARM_UP + i) for i in range(concurrency)]
    enough = min(ENOUGH_COMPLETIONS, concurrency)
    return Pace.of(sorted(wave(arm, asked, output_tokens, enough, WARMUP_S, exact)), concurrency)


def _wave(
    arm: Arm, prompts: Sequence[str], output_tokens: int, enough: int, cut_off_s: float, exact: bool
) -> list[float]:
    """Seconds until each of the requests was answered; see :func:`openai_probe.wave`."""
    results: queue.Queue[float | ClientError] = queue.Queue()
    params = GenerateParams(max_tokens=output_tokens, min_tokens=output_tokens if exact else None)
    cut_off = threading.Event()
    start = time.monotonic()

    def one(client: Client, prompt: str) -> None:
        try:
            for _ in client.generate_stream(prompt, params):
                if cut_off.is_set():
                    return
            results.put(time.monotonic() - start)
        except ClientError as error:
            results.put(error)

    with Client(arm.url, arm.endpoint) as client:
        threads = [threading.Thread(target=one, args=(client, prompt), daemon=True) for prompt in prompts]
        for thread in threads:
            thread.start()
        completions: list[float] = []
        while len(completions) < len(prompts):
            if len(completions) >= enough and time.monotonic() - start > cut_off_s:
                break
            try:
                result = results.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(result, ClientError):
                raise result
            completions.append(result)
        cut_off.set()
        deadline = time.monotonic() + 1.0
        for thread in threads:  # those that still wait for their first token end with the channel
            thread.join(max(0.0, deadline - time.monotonic()))
    return completions


def check_ready(arm: Arm) -> None:
    """Raises ClientError: a Triton endpoint is not there."""
    with Client(arm.url, arm.endpoint) as client:
        client.check_ready()


def require_new_prompts(arm: Arm, prompt: Callable[[int], str], seed: int, index: int = 0) -> None:
    """Asks for one token on a prompt of the warm-up, whose first one every run of this seed sends.

    A server that tells nothing of its prefix cache passes.

    Raises:
        SettingsError: the server has the prompt in its prefix cache, and so those of an earlier run with this seed.
        flightline.client.ClientError: no answer.
    """
    if _ask(arm, prompt(FIRST_OF_WARM_UP + index), 600.0):
        raise SettingsError(
            f"the server still has the prompts of an earlier run with SEED={seed} in its prefix cache and "
            f"would look too fast: set another, like SEED={seed + 1} (--seed {seed + 1}), or start the server again"
        )


def wait_until_idle(arm: Arm, timeout_s: float = 60.0) -> None:
    """Returns when a one-token request is answered: whatever was queued before it is gone.

    Raises:
        flightline.client.ClientError: no answer in time; it says so if there is no server any more.
    """
    try:
        _ask(arm, "Are you idle?", timeout_s)
    except ClientError as error:
        raise ClientError(told_plainly(arm, error)) from None


def told_plainly(arm: Arm, error: ClientError) -> str:
    """``error``, or that there is no server any more.

    gRPC words the end of a server in many ways, by what reached the client first: a call cancelled, a connection reset
    or refused. What counts is whether anybody answers now.
    """
    for _ in range(GONE_TRIES):
        try:
            if arm.openai:
                openai_probe.ask(arm, "Are you there?", 10.0)
            else:
                check_ready(arm)
        except ClientError:
            return f"the server died: no server at {arm.url} answers any more ({error})"
        time.sleep(GONE_PAUSE_S)  # it may be closing
    return str(error)


def _ask(arm: Arm, prompt: str, timeout_s: float) -> bool:
    """Asks for one token; whether a part of the prompt was in the prefix cache."""
    if arm.openai:
        return bool(openai_probe.ask(arm, prompt, timeout_s).cached_tokens)
    with Client(arm.url, arm.endpoint, timeout_s=timeout_s) as client:
        metrics = client.generate(prompt, max_tokens=1).perf_metrics
    return metrics is not None and bool(metrics.kv_cache_reused_blocks)
