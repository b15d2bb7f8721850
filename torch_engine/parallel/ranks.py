"""The processes that share a model: rank 0, which has the scheduler, and the others, which do as it says.

Rank 0 tells the others each step before it computes its own part (:meth:`Ranks.tell`). A rank that dies, hangs or fails
leaves the others waiting for its part for ever, some of them in a kernel that nothing interrupts. So rank 0 watches all
of them from a thread of its own: what goes wrong anywhere ends the engine, with one line that names the rank and the
cause. There is nothing to save: a rank's KV cache is lost with it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import torch

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.parallel.group import Alone, Group, PeerLost, join, meeting_place

RANK_PROCESS = "flightline.torch_engine.process.rank"
BEAT_S = 0.5
SILENT_S = 6.0
"""A rank that has not given a sign of life for so long is taken for hung, once it has loaded."""
SILENT_LOADING_S = 120.0
"""Loading holds the interpreter for longer."""
STILL_S = 8.0
"""A step in which no rank has come any further for so long will never end."""
SETTLE_S = 0.4
"""When one rank ends, others fail because of it: so long is waited to hear from all, and then the first cause told."""
LEAVE_S = 2.0
"""How long rank 0 has to notice by itself, before its process is ended where it stands."""
CLOSE_S = 5.0


class RankLost(Exception):
    """One of the ranks has ended or hangs, and the engine with it; the message names it and the cause."""


class Ranks(Protocol):
    """What the runner of one rank knows of the others."""

    group: Group
    ends_process: bool
    """Whether the loss of a rank ends this process also while it has nothing to do."""

    def meet(self, facts: dict[str, Any]) -> None:
        """Waits until all ranks are as far.

        Raises:
            ConfigError: one of ``facts`` differs between them.
            RankLost: one of them failed.
        """

    def tell(self, step: Any) -> None:
        """Tells the other ranks what is computed next; ``step`` is picklable. On them: nothing.

        Raises:
            RankLost
        """

    def done(self) -> None:
        """The oldest of the steps that have not ended has."""

    def lost(self, error: Exception) -> None:
        """``error`` happened in a step, and the ranks are no longer at the same place.

        Raises:
            RankLost: always, unless the rank is alone.
        """

    def close(self) -> None:
        """Ends the other ranks."""


class Single:
    """One rank has the whole model."""

    group: Group = Alone()
    ends_process = False

    def meet(self, facts: dict[str, Any]) -> None: ...

    def tell(self, step: Any) -> None: ...

    def done(self) -> None: ...

    def lost(self, error: Exception) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Assignment:
    """What a rank's process is told first."""

    config: EngineConfig
    rank: int
    port: int
    """Where rank 0 waits."""
    checkpoint: Any
    """The whole one, unopened."""


def cause_of(error: BaseException) -> str:
    """One line for the user."""
    text = " ".join(str(error).split())
    memory = ("out of memory", "not enough memory", "allocate memory")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        word in text.lower() for word in memory
    ):
        return f"is out of memory: {text[:300]}"
    return f"failed: {type(error).__name__}: {text[:300]}"


def _joined(config: EngineConfig, rank: int, port: int, store: Any = None) -> Group:
    """One rank among the others, when all have come: each of them links up as ``config`` says."""
    device = torch.device("cpu" if config.device == "cpu" else f"cuda:{rank}")
    return join(rank, config.tensor_parallel_size, device, port, store, config.all_reduce != "nccl")


@dataclass
class _Other:
    """Another rank, as rank 0 sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    line: Connection
    heard: float = field(default_factory=time.monotonic)
    """When it last gave a sign of life."""
    progress: tuple[int, float] = (0, 0.0)
    """Steps and operations with others begun, and seconds of processor time."""
    met: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    """What it said itself."""
    blames_others: bool = False

    def ended(self) -> str:
        """How its process ended; empty if it lives."""
        code = self.process.poll()
        if code is None:
            return ""
        if code >= 0:
            return f"ended with status {code}"
        reason = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{reason}"


class Leader:
    """Rank 0: starts the others, tells them each step, and watches them."""

    def __init__(self, config: EngineConfig, checkpoint: Any) -> None:
        """Returns when all ranks have found each other.

        Raises:
            ConfigError: there are fewer GPUs than ranks.
            RankLost: one of them could not start.
        """
        self._size = config.tensor_parallel_size
        self.ends_process = False
        self._on_cpu = config.device == "cpu"
        if not self._on_cpu:
            _check_gpus(self._size)
        store, port = meeting_place()
        self._lock = threading.Condition()
        self._closing = False
        self._ending = False
        self._verdict = ""
        """Why the engine has ended: set when no other rank runs any more."""
        self._noticed = threading.Event()
        self._told = self._fetched = 0
        self._loading = True
        self._others = [
            self._start(Assignment(config, rank, port, checkpoint)) for rank in range(1, self._size)
        ]
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        self.group: Group = Alone()
        self._await(lambda other: bool(other.met))  # each has come up, and will join now
        self.group = _joined(config, 0, port, store)

    @staticmethod
    def _start(assignment: Assignment) -> _Other:
        ours, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", RANK_PROCESS, str(theirs.fileno()), f"rank-{assignment.rank}"]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        with contextlib.suppress(OSError):  # it has ended already, and the watch sees that
            ours.send(assignment)
        return _Other(assignment.rank, process, ours)

    @property
    def pids(self) -> list[int]:
        """Of ranks 1 and up."""
        return [other.process.pid for other in self._others]

    # What the runner calls -----------------------------------------------------------------------

    def meet(self, facts: dict[str, Any]) -> None:
        for other in self._others:
            other.line.send_bytes(pickle.dumps(None))
        self._await(lambda other: len(other.met) > 1)
        for other in self._others:
            theirs = other.met.pop()
            for name, value in facts.items():
                if theirs[name] != value:
                    raise ConfigError(
                        f"tensor_parallel_size={self._size}: rank {other.rank} has {name} {theirs[name]!r} and rank 0 "
                        f"{value!r}: give all ranks the same (CUDA_VISIBLE_DEVICES chooses the GPUs)"
                    )
        self._loading = not self._on_cpu  # until the first step GPUs compile and capture, together

    def _await(self, reached: Any) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._verdict or all(map(reached, self._others)))
        self._raise_if_lost()

    def tell(self, step: Any) -> None:
        self._raise_if_lost()
        self._loading = False
        message = pickle.dumps(step, pickle.HIGHEST_PROTOCOL)
        self._told += 1
        try:
            for other in self._others:
                other.line.send_bytes(message)
        except OSError as error:
            self.lost(error)

    def done(self) -> None:
        self._fetched += 1

    def lost(self, error: Exception) -> NoReturn:
        if not isinstance(error, PeerLost | OSError):
            self._end(f"rank 0 of {self._size} {cause_of(error)}")
        with self._lock:
            self._lock.wait_for(lambda: self._verdict, SILENT_S + STILL_S)
        if not self._verdict:
            self._end(f"rank 0 of {self._size} {cause_of(error)}")
        self._raise_if_lost()
        raise AssertionError("unreachable")

    def _raise_if_lost(self) -> None:
        if self._verdict:
            self._noticed.set()
            raise RankLost(self._verdict)

    def close(self) -> None:
        self._closing = True
        for other in self._others:
            other.line.close()
        self.group.leave()
        deadline = time.monotonic() + CLOSE_S
        for other in self._others:
            try:
                other.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                other.process.kill()
                other.process.wait()

    # The watch -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        still_since, before = time.monotonic(), None
        while not self._closing and not self._verdict:
            self._listen(0.2)
            now, progress = time.monotonic(), self._progress()
            if progress != before or self._told == self._fetched:
                still_since, before = now, progress
            problem = self._failure() or self._silence(now)
            if not problem and now - still_since > STILL_S:
                problem = self._stillness()
            if problem and not self._closing:
                self._end(problem)

    def _listen(self, for_s: float) -> None:
        """Hears what the ranks say within that time."""
        lines = {other.line: other for other in self._others if not other.line.closed and not other.failure}
        try:
            ready = connection.wait(list(lines), for_s)
        except OSError:
            return  # closed meanwhile
        for line in ready:
            assert isinstance(line, Connection)
            other = lines[line]
            try:
                kind, *body = line.recv()
            except (EOFError, OSError):
                time.sleep(0.05)  # its process is about to end, or to be closed
                continue
            other.heard = time.monotonic()
            with self._lock:
                if kind == "alive":
                    other.progress = (body[0], round(body[1], 1) if self._on_cpu else 0.0)
                elif kind == "met":
                    other.met.append(body[0])
                elif kind == "failed":
                    other.failure, other.blames_others = body
                self._lock.notify_all()

    def _progress(self) -> tuple[Any, ...]:
        return self._told, self._fetched, self._begun(), *(other.progress for other in self._others)

    def _begun(self) -> int:
        """As a rank counts what it has begun."""
        return int(getattr(self.group, "begun", 0)) + self._told

    def _failure(self) -> str:
        if not any(other.failure or other.ended() for other in self._others):
            return ""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            self._listen(0.05)
        found = []
        for other in self._others:
            if other.failure:
                found.append((3 if other.blames_others else 0, other, other.failure))
            elif how := other.ended():
                found.append((1, other, how))
        _, other, what = min(found, key=lambda each: each[0])
        return self._name(other, what)

    def _name(self, other: _Other, what: str) -> str:
        return f"rank {other.rank} of {self._size} (pid {other.process.pid}) {what}"

    def _silence(self, now: float) -> str:
        patience = SILENT_LOADING_S if self._loading else SILENT_S
        for other in self._others:
            if now - other.heard > patience:
                return self._name(other, f"hangs: no sign of life for {patience:.0f} s")
        return ""

    def _stillness(self) -> str:
        counts = [self._begun(), *(other.progress[0] for other in self._others)]
        slowest = counts.index(min(counts))
        if min(counts) == max(counts):
            return f"step {self._told} has not ended for {STILL_S:.0f} s on any of {self._size} ranks"
        if slowest == 0:
            return f"rank 0 of {self._size} hangs: no progress in step {self._told} for {STILL_S:.0f} s"
        return self._name(
            self._others[slowest - 1], f"hangs: no progress in step {self._told} for {STILL_S:.0f} s"
        )

    def _end(self, problem: str) -> None:
        with self._lock:
            if self._ending:
                return
            self._ending = True
        logging.getLogger("engine").critical("%s: the engine ends", problem)
        for other in self._others:
            other.process.kill()
        for other in self._others:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its GPU has not let it go yet
                other.process.wait(LEAVE_S)
        with self._lock:
            self._verdict = problem
            self._lock.notify_all()
        if threading.current_thread().name != "ranks":
            return
        stuck = self._loading or self._told != self._fetched
        if not self._noticed.wait(LEAVE_S) and (stuck or self.ends_process):
            os._exit(1)


def _check_gpus(wanted: int) -> None:
    there = torch.cuda.device_count()
    if there < wanted:
        raise ConfigError(
            f"tensor_parallel_size={wanted} needs as many GPUs, and {there} are visible: show more with "
            "CUDA_VISIBLE_DEVICES, or build with a lower TP"
        )


class Follower:
    """A rank that does what rank 0 says."""

    def __init__(self, assignment: Assignment, line: Connection) -> None:
        self._line = line
        self._sending = threading.Lock()
        self._assignment = assignment
        self.group: Group = Alone()
        self.ends_process = True
        self._steps = 0
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def join(self) -> None:
        """Finds the others."""
        self._say("met", {})
        self.group = _joined(self._assignment.config, self._assignment.rank, self._assignment.port)

    def meet(self, facts: dict[str, Any]) -> None:
        self._say("met", facts)
        self._line.recv_bytes()

    def next(self) -> Any:
        """What rank 0 tells next. Raises EOFError when it has closed the line or has ended."""
        step = pickle.loads(self._line.recv_bytes())
        self._steps += 1
        return step

    def tell(self, step: Any) -> None: ...

    def done(self) -> None: ...

    def lost(self, error: Exception) -> None:
        raise error

    def close(self) -> None: ...

    def failed(self, error: BaseException) -> None:
        """Says why this rank ends."""
        self._say("failed", cause_of(error), isinstance(error, PeerLost))

    def _beat(self) -> None:
        """Ends the process with rank 0's: whatever this one's other threads are waiting for will never come."""
        while True:
            try:
                done = int(getattr(self.group, "begun", 0)) + self._steps
                self._say("alive", done, time.process_time())
            except OSError:
                os._exit(0)
            time.sleep(BEAT_S)

    def _say(self, *message: Any) -> None:
        with self._sending:
            self._line.send(message)
