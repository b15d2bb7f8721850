"""What Triton and our client cost an engine that makes tokens by the clock: ``benchmarks/clocked.py BUILD_DIR``.

BUILD_DIR is a build of backend torch (``make build-engines``), of which this takes all but the engine. Instead of that
runs one that gives every request a token each ``--step`` milliseconds and does nothing else. ``text_generation`` gets
the closed loop of ``gpu_served.py``, whole answers and streams in turns. Told is the share of the clock's tokens that
users got, and when; where the machine has few cores, that is what queues cost once it is busy. A line of JSON a load.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_served import Clients, say  # noqa: E402
from benchmarks.stub_batching import free_ports  # noqa: E402
from flightline.supervisor import server  # noqa: E402
from flightline.supervisor.serve import Server, ServeSettings  # noqa: E402
from flightline.torch_engine.core.config import EngineConfig  # noqa: E402
from flightline.torch_engine.core.request import (  # noqa: E402
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    RequestOutput,
)
from flightline.torch_engine.process.server import run  # noqa: E402

STEP_MS = "CLOCKED_STEP_MS"
WAVES = 4
"""Requests of each user."""


class Clocked:
    """As ``process.interface.ServedEngine``."""

    failed_steps = 0
    config = SimpleNamespace(abandon_after_s=30.0)
    stats = EngineStats()

    def __init__(self, engine_dir: str) -> None:
        self.info = ModelInfo(
            vocab_size=1000,
            max_seq_len=4096,
            end_ids=(2,),
            model_dir=str(EngineConfig.load(engine_dir).model_dir),
            description="a clock",
        )
        self.sequences: dict[Any, SimpleNamespace] = {}
        self._period_s = float(os.environ[STEP_MS]) / 1e3
        self._due = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.sequences)

    def add(self, key: Any, request: GenerationRequest, arrival_ns: int) -> None:
        self.sequences[key] = SimpleNamespace(request=request, made=0)

    def cancel(self, key: Any) -> RequestOutput | None:
        gone = self.sequences.pop(key, None)
        return None if gone is None else RequestOutput(finish_reason=FinishReason.CANCELLED)

    def step(self) -> list[tuple[Any, RequestOutput]]:
        """A token each; late steps are not made up for."""
        self._due = max(self._due + self._period_s, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))
        outputs = []
        for key, sequence in list(self.sequences.items()):
            sequence.made += 1
            output = RequestOutput(token_ids=[260], text=" the", num_output_tokens=sequence.made)
            if sequence.made == sequence.request.max_tokens:
                output.finish_reason = FinishReason.LENGTH
                del self.sequences[key]
            outputs.append((key, output))
        return outputs

    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build_dir", type=Path)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--step", type=float, default=30, help="milliseconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1, help="processes")
    options = parser.parse_args()
    os.environ[STEP_MS] = str(options.step)
    os.environ["PYTHONPATH"] = str(ROOT)
    server.ENGINE_PROCESS["torch"] = "benchmarks.clocked"
    http, grpc, metrics = free_ports(3)
    settings = ServeSettings(
        options.build_dir, http_port=http, grpc_port=grpc, metrics_port=metrics, baseline=False
    )
    ideal = options.users / options.step * 1e3
    prompts = [f"the dog {number} " * 20 for number in range(WAVES * options.users)]
    with Server(settings):
        clients = Clients(settings.grpc_url, options.clients)
        for number in range(options.rounds + 1):
            for stream in (False, True):
                found = clients.load("text_generation", prompts, options.users, stream)
                if number:  # the first warms up
                    say({"stream": stream, "of_the_clock": round(found["tok_s"] / ideal, 4)} | found)


if __name__ == "__main__":
    if "--socket" in sys.argv:
        sys.exit(run("clocked", "engine.json", Clocked, (OSError,)))
    main()
