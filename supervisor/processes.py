"""Child processes that end when told, with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil


class Child:
    """A process in a session of its own, its output in a log file."""

    def __init__(
        self, name: str, command: list[str], env: dict[str, str], log: Path, files: Sequence[int] = ()
    ) -> None:
        """``files``: open ones that it gets under the same numbers."""
        self.name = name
        self.log = log
        with log.open("ab") as sink:
            self._start = sink.tell()
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                pass_fds=files,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that ended it, or its exit status."""
        return self._process.poll()

    def how_it_ended(self) -> str:
        code = self.exit_code
        if code is None:
            return "is running"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def tail(self, lines: int = 15) -> str:
        """The last lines of this run's output."""
        with self.log.open("rb") as source:
            source.seek(self._start)
            text = source.read().decode("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def cpu_seconds(self) -> float:
        """Processor time that it and all that it started have used."""
        used = 0.0
        try:
            root = psutil.Process(self.pid)
            for process in (root, *root.children(recursive=True)):
                times = process.cpu_times()
                used += times.user + times.system
        except psutil.Error:
            pass  # one has just ended
        return used

    def zombies(self) -> list[int]:
        """Children of this process that have died and that it has not noticed: Triton's stubs."""
        try:
            children = psutil.Process(self.pid).children()
            return [child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: signal.Signals) -> None:
        """To the process alone; nothing if it has ended."""
        self._process.send_signal(number)

    def stop(self, patience_s: float, hurry: threading.Event | None = None) -> bool:
        """SIGTERM, then after ``patience_s`` (or as soon as ``hurry`` is set) SIGKILL to all of the session.

        Returns True if it ended by itself.
        """
        members = self._members()
        if self.exit_code is None:
            self._process.terminate()
        willing = self._wait(patience_s, hurry or threading.Event())
        # Whoever is left belongs to a stub that lost its server.
        for process in {*members, *self._members()}:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self._process.wait()
        _await_end(members, patience_s=5)
        return willing

    def _wait(self, patience_s: float, hurry: threading.Event) -> bool:
        waited = 0.0
        while self.exit_code is None:
            if waited >= patience_s or hurry.wait(0.05):
                return False
            waited += 0.05
        return True

    def _members(self) -> set[psutil.Process]:
        """This process, its descendants, and orphans of its session."""
        members = set()
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    members.add(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return members


def _await_end(processes: Iterable[psutil.Process], patience_s: float) -> None:
    """Returns when they have ended; an orphan may stay a zombie for ever where process 1 collects none."""
    deadline = time.monotonic() + patience_s
    while any(_runs(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def holder_of_port(port: int) -> str:
    """Who listens on a port, as far as we may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another process"
