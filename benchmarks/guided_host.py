"""What grammars cost a GPU's host in each step. No GPU and no model: the rest of a step is left out.

    TRITON_INTERPRET=1 python3 benchmarks/guided_host.py --rows 64

runs the engine's own step with ``--rows`` guided requests over a vocabulary of 128,256, as ``cuda_runner.py`` does it:
tokens fetched, grammars and texts brought up to date, masks made and put where they are copied from. Where the copy,
the forward pass and the choice would be, each row is given a random token of those that its mask allows, which takes no
part of the time. ``--plain`` adds as many requests without a guide. Told are CPU microseconds a step, which a busy
machine distorts less than times: those of the engine's own thread, and those of all threads, with the ones that make
masks; and, for a machine that does nothing else, the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.guided import RECORDS
from benchmarks.random_checkpoint import LLAMA_8B, RandomCheckpoint
from benchmarks.words import pieces
from flightline.torch_engine import cuda_runner
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest, RequestOutput, SamplingParams
from flightline.torch_engine.engine import Engine, freeze_garbage_collector
from flightline.torch_engine.text.stream import TokenBytes

SPEC = dataclasses.replace(
    LLAMA_8B, hidden_size=32, intermediate_size=32, num_heads=1, num_kv_heads=1, head_dim=32,
    layers=LLAMA_8B.layers[:1], quantization=None,
)  # fmt: skip


NOTHING = np.zeros(3)


def clock() -> Any:
    """CPU seconds of this thread and of all, and the wall's."""
    return np.array([time.thread_time(), time.process_time(), time.perf_counter()])


class HostOnly(cuda_runner.CudaRunner):
    """Everything that the host does in a step but queueing kernels."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.elsewhere = NOTHING
        """Spent on what the device would do."""
        self._chance = np.random.default_rng(0)

    def _carry_out(self, order: cuda_runner.Order, staging: cuda_runner.Staging) -> Callable[[bool], None]:
        self._upload(staging, order.parts, [])
        return self._pick

    def _pick(self, searches: bool) -> None:
        began = clock()
        self.tokens[:] = 300
        masks = self.sampling._masks[0]
        rows = masks.parts(len(self.guided))[1]
        for mask, slot in zip(rows, self.guided, strict=True):
            word = int(self._chance.choice(np.flatnonzero(mask)))
            bits = np.flatnonzero(np.unpackbits(mask[word : word + 1].view(np.uint8), bitorder="little"))
            self.tokens[self.row_of[slot]] = 32 * word + int(self._chance.choice(bits))
        self.elsewhere = self.elsewhere + clock() - began

    def launch(self, chunks: list[Any], sampling: list[Any]) -> Any:
        ticket = super().launch(chunks, sampling)
        self.row_of = {self._slots[sequence]: row for row, sequence in enumerate(sampling)}
        return ticket

    def _mask(self) -> None:
        self.guided: list[int] = []
        super()._mask()


def copies_left_out(runner: HostOnly) -> None:
    """A GPU's copies run beside the host."""
    allow = runner.sampling.allow

    def left_out(slots: list[int]) -> None:
        began = clock()
        runner.guided = slots
        allow(slots)
        runner.elsewhere = runner.elsewhere + clock() - began

    runner.sampling.allow = left_out  # type: ignore[method-assign]


def load(rows: int) -> Engine:
    config = EngineConfig(
        model_dir="random", device="cpu", kernels="cuda", compute_dtype="float32", num_kv_blocks=rows * 32,
        max_batch_size=rows, max_num_tokens=8192, max_seq_len=512, max_queue_size=0, enable_kv_cache_reuse=False,
    )  # fmt: skip
    checkpoint = RandomCheckpoint(SPEC, "bf16", device="cpu")
    engine = Engine(config, checkpoint, TokenBytes(pieces(SPEC.vocab_size)))
    freeze_garbage_collector()  # as the engine's server does
    return engine


def timed(runner: HostOnly, owner: Any, name: str, spent: dict[str, list[Any]]) -> None:
    """Notes what each call takes."""
    real = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        began = clock() - runner.elsewhere
        try:
            return real(*arguments)
        finally:
            spent[name].append(clock() - runner.elsewhere - began)

    setattr(owner, name, call)


def fail_on_errors(outputs: list[tuple[Any, RequestOutput]]) -> None:
    """Steps of requests that failed take no time."""
    for _, output in outputs:
        if output.error is not None:
            raise output.error


def measure(engine: Engine, rows: int, plain: int, steps: int) -> dict[str, Any]:
    """Microseconds: of the first steps together, and of each of those after them.

    Args:
        rows: guided requests.
        plain: requests beside them.
    """
    runner: Any = engine.runner
    chance, spent = np.random.default_rng(1), []
    for number in range(rows + plain):
        prompt = [int(token) for token in chance.integers(300, 100_000, 64)]
        guide = RECORDS if number < rows else None
        sampling = SamplingParams(0.8, top_p=0.95, seed=number)
        engine.add(number, GenerationRequest(prompt, steps + 100, sampling, end_id=-1, guide=guide))
    while len(engine.guided) or any(sequence.num_generated < 2 for sequence in engine.sequences.values()):
        fail_on_errors(engine.step())
    for _ in range(steps):
        began = clock() - runner.elsewhere
        outputs = engine.step()
        spent.append(clock() - runner.elsewhere - began)
        fail_on_errors(outputs)
    for key in list(engine.sequences):
        engine.cancel(key)
    return summary(spent)


def summary(spent: list[Any]) -> dict[str, int]:
    own, every, wall = (1e6 * np.array(spent)).T
    return {
        "own": round(float(own.mean())),
        "own median": round(float(np.median(own))),
        "all": round(float(every.mean())),
        "all median": round(float(np.median(every))),
        "wall median": round(float(np.median(wall))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64, help="guided requests")
    parser.add_argument("--plain", type=int, default=0, help="requests without a guide beside them")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cuda_runner.CudaRunner = HostOnly  # type: ignore[misc, assignment]
    engine = load(options.rows + options.plain)
    parts: dict[str, list[Any]] = defaultdict(list)
    runner: Any = engine.runner
    copies_left_out(runner)
    for owner, name in ((engine, "_fetch"), (runner, "_mask")):
        timed(runner, owner, name, parts)
    measure(engine, options.rows, options.plain, 4)  # compiles the grammar and warms up
    for number in range(options.rounds):
        for each in parts.values():
            each.clear()
        told = measure(engine, options.rows, options.plain, options.steps)
        inside = {name.strip("_"): summary(each) for name, each in parts.items()}
        without = measure(engine, 0, options.rows + options.plain, options.steps)
        print(json.dumps({"round": number, "us": told, **inside, "without guides": without}), flush=True)


if __name__ == "__main__":
    main()
