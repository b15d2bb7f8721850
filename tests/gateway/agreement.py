"""Chat says what ``text_generation`` says to the same tokens: ``python -m tests.gateway.agreement --prompts 200``.

Asks a running server (``--url``, ``--grpc``; not one on a GPU, where equal tokens are not promised) through NVIDIA's
client and through the gateway, whole and streamed: the texts, the counts of tokens and the reasons of the ends must be
equal. Prompts in several scripts, with emoji; greedy and drawn from a seed; once as it comes, once with stop words cut
from the middle of the answer, which span tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.model_repository.endpoints import Call

TOKENS = 32
AT_ONCE = 4
PARTS = (
    *(
        "Write a poem",
        "the quick brown fox",
        "Wie heißt du? Größe!",
        "你好，世界。请继续：",
        "日本語で答えて",
    ),
    *("🙂🚀👩\u200d👩\u200d👧\u200d👦 🇪🇺", "Привет, мир", "مرحبا بالعالم", "ñandú", '{"a": [1, 2]}'),
    *("```python\nprint(1)", "e\u0301 é", "1, 2, 3,", "\n\n\t"),
)


@dataclass(frozen=True)
class Said:
    """One answer, from whichever side."""

    text: str
    reason: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Case:
    messages: list[dict[str, str]]
    seed: int | None
    """None: greedy."""


def cases(count: int, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for number in range(count):
        content = " ".join(rng.choices(PARTS, k=rng.randint(1, 4))) + f" {number}"
        yield Case([{"role": "user", "content": content}], rng.randrange(2**31) if number % 2 else None)


class Both:
    """The two ways into one server."""

    def __init__(self, url: str, grpc_url: str) -> None:
        self._url = url
        self._server: Any = SimpleNamespace(settings=SimpleNamespace(grpc_url=grpc_url))

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def tokens(self, case: Case) -> list[int]:
        return json.loads(self._post("/tokenize", {"messages": case.messages}))["tokens"]

    def triton(self, ids: list[int], case: Case, stop: list[str]) -> Said:
        drawn = {"temperature": 1.0, "top_p": 1.0, "seed": case.seed}
        asked: dict[str, Any] = {"input_ids": ids, "max_tokens": TOKENS, "stream": True}
        asked |= {"top_k": 1} if case.seed is None else drawn
        asked |= {"stop_words": json.dumps(stop)} if stop else {}
        asked |= dict.fromkeys(
            ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"), True
        )
        answer = Call(self._server, "text_generation", asked).read()
        reason = {b"length": "length", b"end_id": "stop", b"stop_words": "stop"}
        found = answer.column("finish_reason")[-1].ravel()[0]
        counts = answer.column("num_input_tokens")[-1].item(), answer.column("num_output_tokens")[-1].item()
        return Said(answer.text, reason[found], *counts)

    def chat(self, case: Case, stop: list[str], stream: bool) -> Said:
        body: dict[str, Any] = {
            "messages": case.messages,
            "max_tokens": TOKENS,
            "stop": stop,
            "stream": stream,
        }
        body |= {"temperature": 0} if case.seed is None else {"seed": case.seed}
        if not stream:
            whole = json.loads(self._post("/v1/chat/completions", body))
            (choice,), usage = whole["choices"], whole["usage"]
            text, reasons = choice["message"]["content"], [choice["finish_reason"]]
        else:
            data = self._post("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
            *events, done = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
            assert done == b"[DONE]"
            *chunks, last = map(json.loads, events)
            choices = [chunk["choices"][0] for chunk in chunks]
            text = "".join(choice["delta"].get("content") or "" for choice in choices)
            reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
            usage = last["usage"]
        (reason,) = reasons
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        return Said(text, reason, usage["prompt_tokens"], usage["completion_tokens"])

    def differences(self, case: Case) -> tuple[list[str], int]:
        """(what differs, answers with a stop word)."""
        ids = self.tokens(case)
        free = self.triton(ids, case, [])
        found, stops = self._compare(case, free, []), 0
        if stop := stop_in(free.text):
            cut, stops = self.triton(ids, case, [stop]), 1
            if (cut.text, cut.reason) != (free.text[: free.text.index(stop)], "stop"):
                found.append(f"{case}: Triton with the stop word {stop!r} said {cut}, and without it {free}")
            found += self._compare(case, cut, [stop])
        return found, stops

    def _compare(self, case: Case, own: Said, stop: list[str]) -> list[str]:
        said = [self.chat(case, stop, stream) for stream in (False, True)]
        return [f"{case}, stop {stop}: Triton {own}, chat {other}" for other in said if other != own]


def stop_in(text: str) -> str:
    """Some characters from the middle of a text that are nowhere before; "" where there are none."""
    for length in (5, 4, 3, 2):
        for start in range(len(text) // 3, len(text) - length):
            stop = text[start : start + length]
            if "\ufffd" not in stop and text.index(stop) == start:
                return stop
    return ""


def disagreements(url: str, grpc_url: str, count: int, seed: int = 1) -> tuple[list[str], int]:
    """(what differs, answers with a stop word)."""
    both = Both(url, grpc_url)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(both.differences, cases(count, seed)))
    return [line for found, _ in results for line in found], sum(stops for _, stops in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--grpc", default="127.0.0.1:8001")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found, stops = disagreements(options.url, options.grpc, options.prompts, options.seed)
    print("\n".join(found[:20]))
    print(f"{options.prompts} prompts, {stops} of them with a stop word too: {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
