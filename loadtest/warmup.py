"""Bringing an endpoint to working temperature under the full load, and knowing when it is idle again."""

from __future__ import annotations

import queue
import threading
import time

from client import Client, ClientError, GenerateParams
from loadtest.plan import Pace
from loadtest.prompts import FIRST_OF_WARM_UP, Prompts

WARMUP_S = 6.0
"""A wave that takes longer is cut off once it has shown its pace."""
ENOUGH_COMPLETIONS = 2


def warm_up(url: str, endpoint: str, prompts: Prompts, concurrency: int, output_tokens: int) -> Pace:
    """Sends one wave of requests and returns how fast it was answered.

    Raises:
        client.ClientError: a request failed.
    """
    results: queue.Queue[float | ClientError] = queue.Queue()
    params = GenerateParams(max_tokens=output_tokens, min_tokens=output_tokens)
    cut_off = threading.Event()
    start = time.monotonic()

    def one(client: Client, index: int) -> None:
        try:
            for _ in client.generate_stream(prompts[index], params):
                if cut_off.is_set():
                    return
            results.put(time.monotonic() - start)
        except ClientError as error:
            results.put(error)

    with Client(url, endpoint) as client:
        threads = [
            threading.Thread(target=one, args=(client, FIRST_OF_WARM_UP + i), daemon=True)
            for i in range(concurrency)
        ]
        for thread in threads:
            thread.start()
        completions: list[float] = []
        enough = min(ENOUGH_COMPLETIONS, concurrency)
        while len(completions) < concurrency:
            if len(completions) >= enough and time.monotonic() - start > WARMUP_S:
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
    return Pace.of(sorted(completions), concurrency)


def wait_until_idle(url: str, endpoint: str, timeout_s: float = 60.0) -> None:
    """Returns when a one-token request is answered: whatever was queued before it is gone.

    Raises:
        client.ClientError: no answer in time.
    """
    with Client(url, endpoint, timeout_s=timeout_s) as client:
        client.generate("Are you idle?", max_tokens=1)
