"""What clients of a gateway process are told when it has been killed (the other side: ``gateway/last_words.py``)."""

from __future__ import annotations

import resource
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

from flightline.gateway.last_words import HOLD, HOLDS, NUMBER, written

_MOST_BYTES = 1 << 16
_OWN_FILES = 1024


@dataclass
class _Held:
    connection: socket.socket
    given: int
    """Bytes that it was given to send before this answer."""
    before: bytes
    begun: bytes

    def speak(self) -> None:
        """To a client that takes it now; what it has sent meanwhile is read, else the kernel would take it back."""
        with self.connection as connection, suppress(OSError):
            connection.setblocking(False)
            connection.send(self.begun if written(connection) > self.given else self.before)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(_MOST_BYTES):
                pass


class LastWords:
    """Has the connections that one process answers on; says its last words there when the process has ended."""

    def __init__(self) -> None:
        self._ours, self.channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._held: dict[int, _Held] = {}
        self._thread = threading.Thread(target=self._keep, name="last-words", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Connections on which answers are awaited."""
        return len(self._held)

    def given(self) -> None:
        """The process has ``channel``: from now on its end is heard."""
        self.channel.close()

    def join(self, patience_s: float) -> None:
        """Returns when they are said; the process has ended."""
        self._thread.join(patience_s)

    def _keep(self) -> None:
        with self._ours:
            while message := self._next():
                self._note(*message)
        for held in self._held.values():
            held.speak()
        self._held.clear()

    def _next(self) -> tuple[bytes, list[int]] | None:
        with suppress(OSError):
            data, files, _, _ = socket.recv_fds(self._ours, _MOST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            return (data, files) if data else None
        return None

    def _note(self, data: bytes, files: list[int]) -> None:
        kind, data = data[:1], data[1:]
        if kind == HOLDS:
            number, given, length = HOLD.unpack_from(data)
            words = data[HOLD.size :]
            if files:  # else the supervisor has as many open files as it may
                connection = socket.socket(fileno=files[0])
                self._held[number] = _Held(connection, given, words[:length], words[length:])
            return
        for (number,) in NUMBER.iter_unpack(data):
            if (held := self._held.pop(number, None)) is not None:
                held.connection.close()


def allow_connections(count: int) -> None:
    """So many more open files, as far as the hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, count + _OWN_FILES)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )
