"""A rank that can say what its GPU does: ``gpu_tp.py`` starts it instead of ``process/rank.py``.

SIGUSR1 starts the profiler and then makes the file that ``PROFILED`` names, with the rank's process id for ``{}``;
SIGUSR2 stops it and writes the microseconds of a step into that file. Both come while the engine has nothing to do,
when the main thread waits for its next step, and the second only after the file of the first: the profiler's first
start takes more than a second, and a signal's handler would begin inside of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kernel_groups import kernels_of, spent  # noqa: E402
from flightline.torch_engine.process import rank  # noqa: E402

_running: list[Any] = []


def _start(*_: Any) -> None:
    torch.cuda.synchronize()
    _running.append(profile(activities=[ProfilerActivity.CUDA]))
    _running[0].start()
    _tell("")


def _stop(*_: Any) -> None:
    torch.cuda.synchronize()
    seen = _running.pop()
    seen.stop()
    _tell(json.dumps(spent(kernels_of(seen))))


def _tell(text: str) -> None:
    target = Path(os.environ["PROFILED"].format(os.getpid()))
    target.with_suffix(".part").write_text(text)
    target.with_suffix(".part").replace(target)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _start)
    signal.signal(signal.SIGUSR2, _stop)
    sys.exit(rank.main())
