"""Answers that keep to a schema: whether they do, and what it costs. The engine alone, on a CPU or a GPU.

    python3 benchmarks/guided.py --pairs 1000

asks for as many generated schemas (``benchmarks/schemas.py``), drawn with temperature 1, and judges every answer that
has ended by itself with jsonschema; one that is wrong ends the command with status 1. It also says how many tokens of
the right answers could only be what they were: so many steps could be saved by jumping over them.

    python3 benchmarks/guided.py --cost --rows 16

compares, in turns, output tokens/s of so many plain requests with as many guided ones, and of twice as many plain ones
with half of them guided: what plain streams lose beside guided ones. (``benchmarks/gpu.py --parts guided`` does the
same on a GPU, with an 8B model's shape and 128,256 tokens.) All are drawn in the same way and have the same numbers of
tokens; only the ratios of one run mean anything on a machine that others use. On a CPU, where a forward pass is the
same for all and differs more from round to round than guides cost, a second ratio is of the time outside of it: as if
each pass had taken the median of both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cpu import deployment, load_engine, rendered, texts, turned
from benchmarks.schemas import Pair, pairs
from flightline.torch_engine.core.request import FinishReason, GenerationRequest, Guide, SamplingParams

if TYPE_CHECKING:
    from flightline.torch_engine.engine import Engine

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["small", "large", "unknown"]},
        "price": {"type": "number", "minimum": 0, "maximum": 1000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "owner": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
    },
    "required": ["name", "kind", "price", "tags", "owner"],
    "additionalProperties": False,
}
RECORDS = Guide("lark", f'start: record+\nrecord: %json {json.dumps(RECORD)} "\\n"')
"""Goes on for ever, so that an answer has as many tokens as it may."""


def tokenised(options: argparse.Namespace, prompts: list[str]) -> list[list[int]]:
    from flightline.model_repository.shared.vocabulary import Vocabulary

    model_dir = deployment(options.build_dir)["model_dir"]
    vocabulary = Vocabulary(model_dir)
    return [vocabulary.encode_prompt(text) for text in rendered(prompts, model_dir, options.chat)]


def judge(options: argparse.Namespace) -> int:
    """Runs the pairs; how many answers were wrong."""
    engine, made = load_engine(options), list(pairs(options.pairs, options.seed))
    prompts = tokenised(options, [pair.prompt for pair in made])
    counts: Counter[str] = Counter()
    grammars, jumps = engine.guided.grammars, Jumps()
    start = time.monotonic()
    waiting = list(zip(made, prompts, strict=True))[::-1]
    running: dict[int, tuple[Pair, list[str], list[int]]] = {}
    while waiting or engine.busy:
        while waiting and len(running) < options.rows:
            pair, prompt = waiting.pop()
            sampling = SamplingParams(1.0, top_p=1.0, seed=len(waiting))
            guide = Guide("json_schema", json.dumps(pair.schema))
            engine.add(len(waiting), GenerationRequest(prompt, options.tokens, sampling, guide=guide))
            running[len(waiting)] = pair, [], []
        for key, output in engine.step():
            pair, parts, tokens = running[key]
            parts.append(output.text)
            tokens += output.token_ids
            if output.finish_reason is not None:
                del running[key]
                verdict = judged(pair, output.finish_reason, "".join(parts), str(output.error or ""))
                counts[verdict] += 1
                if verdict == "right":
                    matcher = grammars.compile(Guide("json_schema", json.dumps(pair.schema)))
                    jumps.note(matcher, [len(engine.tokens[token]) for token in tokens], tokens)
    print(json.dumps({**counts, "pairs": len(made), "seconds": round(time.monotonic() - start, 1)}))
    print(jumps)
    return counts["wrong"] + counts["error"]


class Jumps:
    """How far answers were forced, and what it takes to find out."""

    def __init__(self) -> None:
        self.tokens = self.forced = self.runs = 0
        self.seconds = 0.0
        """Spent asking what is forced, once a step."""

    def note(self, matcher: Any, sizes: list[int], tokens: list[int]) -> None:
        """``tokens`` of ``sizes`` bytes, from the beginning of the grammar on."""
        self.tokens += len(tokens)
        place = 0
        while place < len(tokens):
            began = time.perf_counter()
            left = len(matcher.compute_ff_bytes())
            self.seconds += time.perf_counter() - began
            run = place
            while run < len(tokens) and sizes[run] <= left:
                left -= sizes[run]
                run += 1
            self.forced += run - place
            self.runs += run > place
            matcher.consume_tokens(tokens[place : max(run, place + 1)])
            place = max(run, place + 1)

    def __str__(self) -> str:
        asked = self.tokens - self.forced + self.runs
        return json.dumps(
            {
                "tokens": self.tokens,
                "forced": round(self.forced / max(1, self.tokens), 4),
                "tokens_a_jump": round(self.forced / max(1, self.runs), 2),
                "us_to_ask": round(self.seconds / max(1, asked) * 1e6, 1),
            }
        )


def judged(pair: Pair, reason: FinishReason, text: str, error: str) -> str:
    import jsonschema

    if reason is FinishReason.LENGTH:
        return "cut"
    if reason is not FinishReason.END_ID:
        print(f"{pair.name}: {reason}: {error} {text[:200]!r} {json.dumps(pair.schema)}", file=sys.stderr)
        return "error"
    try:
        jsonschema.Draft202012Validator(pair.schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as problem:
        print(f"{pair.name}: {str(problem)[:200]} {text!r} {json.dumps(pair.schema)}", file=sys.stderr)
        return "wrong"
    return "right"


SIDES = {"plain": (1, 0), "guided": (0, 1), "twice plain": (2, 0), "both": (1, 1)}
"""Plain and guided requests of each side, in times of ``--rows``."""


def cost(options: argparse.Namespace) -> None:
    engine = load_engine(options, enable_kv_cache_reuse=False)
    compare(engine, tokenised(options, texts(2 * options.rows)), options)


def compare(engine: Engine, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Rates of all sides in turns, in output tokens/s, and two lines of ratios.

    Args:
        prompts: twice ``options.rows``.
        options: ``rows``, ``rounds``, ``tokens`` and ``greedy`` of the command line.
    """
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    passes: dict[str, list[float]] = {name: [] for name in SIDES}
    forward = Forward(engine)
    for name in SIDES:
        rate(engine, prompts, options, name, 4)  # compiles the grammar and warms up
    for number in range(options.rounds):
        for name in turned(list(SIDES), number):
            forward.seconds = 0.0
            rates[name].append(rate(engine, prompts, options, name, options.tokens))
            passes[name].append(forward.seconds)
            print(
                json.dumps({"round": number, "side": name, "output_tokens_per_s": round(rates[name][-1], 1)})
            )
    for first, second, what in (
        ("plain", "guided", f"{options.rows} guided"),
        ("twice plain", "both", f"{options.rows} plain beside as many guided"),
    ):
        ratios = sorted(b / a for a, b in zip(rates[first], rates[second], strict=True))
        print(
            f"{what}: {statistics.median(ratios):.3f} of the rate without guides "
            f"({ratios[0]:.3f}-{ratios[-1]:.3f}); {statistics.median(rates[first]):.0f} tokens/s without"
        )
        if not engine.runner.lags:
            made = options.tokens * options.rows * sum(SIDES[first])
            passing = statistics.median(passes[first] + passes[second])
            without, beside = (
                statistics.median(
                    made / fast - passed for fast, passed in zip(rates[side], passes[side], strict=True)
                )
                for side in (first, second)
            )
            print(
                f"{what}, by the time outside of forward passes: {(passing + without) / (passing + beside):.3f} "
                f"({passing:.2f} s in them, {without:.3f} and {beside:.3f} s outside)"
            )
    forward.restore()
    return rates


class Forward:
    """Seconds in an engine's forward passes, where the host waits for them."""

    def __init__(self, engine: Engine) -> None:
        self._model, self._real, self.seconds = engine.model, engine.model.forward, 0.0
        self._model.forward = self._timed  # type: ignore[method-assign]

    def _timed(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._real(*arguments)
        finally:
            self.seconds += time.perf_counter() - began

    def restore(self) -> None:
        del self._model.forward  # type: ignore[method-assign]


def rate(
    engine: Engine, prompts: list[list[int]], options: argparse.Namespace, side: str, tokens: int
) -> float:
    """Output tokens/s of one side."""
    plain, guided = (share * options.rows for share in SIDES[side])
    fields: list[dict[str, Any]] = [{}] * plain + [{"guide": RECORDS}] * guided
    greedy = options.greedy
    requests = [
        GenerationRequest(
            prompt,
            tokens,
            SamplingParams() if greedy else SamplingParams(0.8, top_p=0.95, seed=number),
            end_id=-1,
            **field,
        )
        for number, (prompt, field) in enumerate(zip(prompts, fields, strict=False))
    ]
    start = time.perf_counter()
    outputs = engine.generate(requests)
    seconds = time.perf_counter() - start
    count = sum(len(output.token_ids) for output in outputs)
    assert count == tokens * len(requests), "every side has the same number of tokens"
    return count / seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--pairs", type=int, metavar="COUNT", help="schemas and prompts to judge answers of")
    parser.add_argument("--seed", type=int, default=0, help="of the schemas")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="requests in flight")
    parser.add_argument(
        "--tokens", type=int, default=0, help="most of an answer (384; with --cost all have 64)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--greedy", action="store_true", help="no sampling, with --cost")
    parser.add_argument("--chat", action="store_true", help="put the chat template around the prompts")
    options = parser.parse_args()
    options.build_dir = options.build_dir.absolute()
    options.tokens = options.tokens or (64 if options.cost else 384)
    if options.cost:
        cost(options)
        return 0
    if not options.pairs:
        parser.error("give --pairs COUNT or --cost")
    return min(judge(options), 1)


if __name__ == "__main__":
    sys.exit(main())
