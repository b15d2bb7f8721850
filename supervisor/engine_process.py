"""One of the engine processes behind a server, which can be started again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flightline.supervisor import probe
from flightline.supervisor.errors import ServeError
from flightline.supervisor.processes import Child
from flightline.torch_engine.process.client import EngineClient

_IDLE_SHARE = 0.01
"""Of a processor: whoever uses less does not compute."""
_LONGEST_STEP = 10
"""Times the patience of a probe that a step may take, even if it computes."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """Of the machine."""

    env: Mapping[str, str]
    cores: frozenset[int] = frozenset()
    """Empty = all."""


@dataclass(frozen=True)
class _Silence:
    """What there was when an engine was asked that has not answered since."""

    since: float
    """Monotonic seconds."""
    steps: int
    cpu_s: float


class EngineProcess:
    """Its command, its socket, its log, and the client that knows when it is there."""

    def __init__(
        self, name: str, module: str, engine_dir: Path, log: Path, client: EngineClient, share: Share
    ) -> None:
        """``name`` is what a user reads about it."""
        self.name = name
        self.log = log
        self.client = client
        self.child: Child | None = None
        self.stuck = False
        """It runs, and neither answers nor computes."""
        self._silence: _Silence | None = None
        self._share = share
        options = ["--engine-dir", str(engine_dir), "--socket", client.path]
        self._command = [sys.executable, "-m", module, *options]

    def start(self) -> Child:
        """Returns at once; ``client.connected`` tells when it is ready."""
        Path(self.client.path).unlink(missing_ok=True)
        self.stuck, self._silence = False, None
        self.child = Child(self.name, self._command, dict(self._share.env), self.log)
        if self._share.cores:
            os.sched_setaffinity(self.child.pid, self._share.cores)  # before it has looked how many there are
        return self.child

    def answers(self, timeout_s: float) -> bool:
        """Asks it for a token. One that does not answer in time is slow, or ``stuck`` from then on.

        A step may take longer than anybody's patience: a step that uses the processor is taken for work, though not
        for ever.
        """
        child = self.child
        assert child is not None, "start() first"
        before = _Silence(time.monotonic(), self.client.stats.iterations, child.cpu_seconds())
        if probe.engine_answers(self.client, timeout_s):
            self._silence = None
            return True
        if not self.client.connected or self.client.stats.iterations != before.steps:
            self._silence = None
            return False
        self._silence = self._silence or before
        now, used = time.monotonic(), child.cpu_seconds() - before.cpu_s
        computes = used >= _IDLE_SHARE * (now - before.since)
        self.stuck = not computes or now - self._silence.since > _LONGEST_STEP * timeout_s
        return False

    def problem(self) -> str:
        """Why it must be started again; empty if it need not."""
        if self.child is not None and self.child.exit_code is not None:
            return f"{self.name} {self.child.how_it_ended()}"
        return f"{self.name} has stopped answering" if self.stuck else ""


def share(number: int, count: int, device: str, gpus: int = 1) -> Share:
    """What engine ``number`` of ``count`` gets: ``gpus`` of several, or its part of the CPU's cores.

    Raises:
        ServeError: fewer GPUs are visible than there are engines.
    """
    env = dict(os.environ)
    if count == 1:
        return Share(env)
    if device == "cuda":
        wanted = count * gpus
        visible = env[VISIBLE].split(",") if env.get(VISIBLE) else [str(index) for index in range(wanted)]
        if len(visible) < wanted:
            each = f" of {gpus} GPUs each (TP={gpus})" if gpus > 1 else ""
            raise ServeError(
                f"{VISIBLE}={env[VISIBLE]} shows {len(visible)} GPU(s), and {count} engines were built (DP={count})"
                f"{each}: show more, or build again with a lower DP"
            )
        return Share(env | {VISIBLE: ",".join(visible[number * gpus : (number + 1) * gpus])})
    cores = sorted(os.sched_getaffinity(0))
    begin, end = (len(cores) * index // count for index in (number, number + 1))
    return Share(env, frozenset(cores[begin:end]))
