"""The process of one rank but the first: ``ranks.py`` starts it, tells it each step, and ends it with the engine."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

import torch

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
    follower = Follower(assignment, line)
    try:
        _follow(assignment, follower)
    except EOFError:
        return 0
    except BaseException as error:
        try:
            follower.failed(error)
        except OSError:
            return 0
        return 1


@torch.inference_mode()
def _follow(assignment: Assignment, follower: Follower) -> None:
    follower.join()
    config = assignment.config
    checkpoint = assignment.checkpoint.part(Shard(assignment.rank, config.tensor_parallel_size))
    runner = load_runner(config, checkpoint, follower)
    while True:
        runner.follow(follower.next())


if __name__ == "__main__":
    sys.exit(main())
