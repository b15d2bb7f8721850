"""How a server that is stopping refuses new requests and waits for the running ones: a file that all its models share.

It has a length as soon as it is closed, and a shared lock of every process in which a request is running; the lock of
one that dies goes with it.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from flightline.torch_engine.core.request import Code, RequestError

VARIABLE = "FLIGHTLINE_GATE"
"""Tells Triton's stubs where the file is."""
STOPPING = "the server is stopping and takes no new requests: send it to another one, or again in a minute"


class Gate:
    """``Gate(path)``, or ``Gate.of_server()`` in a model; without a file it is always open."""

    def __init__(self, path: Path | None) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = None if path is None else os.open(path, flags, 0o600)
        self._lock = threading.Lock()
        self._inside = 0

    @classmethod
    def of_server(cls) -> Gate:
        """The gate of the server that this process is a model of."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path) if path else None)

    @property
    def closed(self) -> bool:
        return self._file is not None and os.fstat(self._file).st_size > 0

    # -- the models' side ----------------------------------------------------------------------------

    def check(self) -> None:
        """Raises RequestError: UNAVAILABLE, the gate is closed."""
        if self.closed:
            raise RequestError(Code.UNAVAILABLE, STOPPING)

    def enter(self) -> None:
        """A request begins to run."""
        with self._lock:
            self._inside += 1
            if self._inside == 1 and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_SH)

    def leave(self) -> None:
        """The last response of a request was sent."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    # -- the supervisor's side -----------------------------------------------------------------------

    def close(self) -> None:
        """From now on :meth:`check` raises."""
        assert self._file is not None
        os.pwrite(self._file, b"closed", 0)

    @property
    def empty(self) -> bool:
        """No request is running."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return True
