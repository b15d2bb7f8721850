"""The process of one rank but the first: ``ranks.py`` starts it, tells it each step, and ends it with the engine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from flightline.torch_engine.engine import freeze_garbage_collector
from flightline.torch_engine.loading import load_runner
from flightline.torch_engine.model.shard import Shard
from flightline.torch_engine.parallel.ranks import Assignment, Follower


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to the engine, which ends its ranks
        signal.signal(number, signal.SIG_IGN)
    line = Connection(int(sys.argv[1]))
    try:
        assignment: Assignment = line.recv()
    except EOFError:
        return 0
    follower, status = Follower(assignment, line), 0
    try:
        _follow(assignment, follower)
    except EOFError:
        pass
    except BaseException as error:
        status = 1
        with contextlib.suppress(OSError):
            follower.failed(error)
    os._exit(status)  # the libraries' own end would wait for the other ranks


@torch.inference_mode()
def _follow(assignment: Assignment, follower: Follower) -> NoReturn:
    follower.join()
    config = assignment.config
    checkpoint = assignment.checkpoint.part(Shard(assignment.rank, config.tensor_parallel_size))
    runner = load_runner(config, checkpoint, follower)
    freeze_garbage_collector()  # else all ranks wait for one that collects
    while True:
        runner.follow(follower.next())


if __name__ == "__main__":
    sys.exit(main())
