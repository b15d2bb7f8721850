"""What a client is told if the process that answers it is killed: a process's side of it.

A descriptor can be in two processes. As long as a request is worked on the supervisor has its connection, too, and the
bytes that would end the answer, its *last words*: some for an answer of which nothing is written yet, others for a
stream. Where a process ends without having let go, it writes those that fit (``supervisor/last_words.py``); the kernel
knows how much was written. Over TLS nobody else can speak: such a connection is not held, and breaks.

A message on the channel (a SOCK_SEQPACKET pair): the number of a hold, from how many written bytes of its connection on
the words fit (-1: it is let go), and the words. The first of a number brings the descriptor (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections import deque

HEAD = struct.Struct("<Qq")
CONNECTION = "flightline.connection"
"""Extension of an ASGI scope: {"socket": the connection's, None where nobody else can speak on it}."""
_SENT, _SENT_AGAIN, _NOT_SENT = 200, 208, 144
"""Offsets in ``struct tcp_info`` (linux/tcp.h) of tcpi_bytes_sent, tcpi_bytes_retrans and tcpi_notsent_bytes."""


def written(connection: socket.socket) -> int:
    """Bytes that a connection was given to send, by whichever process.

    Raises:
        OSError: it is no TCP connection, or the kernel is older than 4.19 and does not count them.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT_AGAIN + 8)
    if len(info) < _SENT_AGAIN + 8:
        raise OSError("the kernel does not count what was sent")
    sent, again = struct.unpack_from("<QQ", info, _SENT)
    (waiting,) = struct.unpack_from("<I", info, _NOT_SENT)
    return int(sent - again + waiting)


class Held:
    """A connection that the supervisor has, too."""

    def __init__(self, channel: Channel, number: int, before: int) -> None:
        """``before``: bytes that were written before the answer."""
        self._channel = channel
        self._number = number
        self._before = before
        self._held = True

    def say(self, words: bytes) -> None:
        """Last words as soon as anything of the answer is written; none: it is written whole."""
        if self._held:
            self._channel.send(HEAD.pack(self._number, self._before + 1) + words)

    def release(self) -> None:
        """In the event loop's next turn: by then all that was written is on its way. A second time is nothing."""
        if self._held:
            self._held = False
            asyncio.get_running_loop().call_soon(self._channel.send, HEAD.pack(self._number, -1))


class Channel:
    """To the supervisor; -1 = there is none, and nothing is held."""

    def __init__(self, fd: int = -1) -> None:
        self._socket = socket.socket(fileno=fd) if fd >= 0 else None
        self._numbers = itertools.count()
        self._late: deque[bytes] = deque()
        """What the supervisor has had no time for."""
        if self._socket is not None:
            self._socket.setblocking(False)

    def hold(self, connection: socket.socket | None, words: bytes) -> Held | None:
        """``words``: as long as nothing is written. None: it cannot be held, or the supervisor has no time."""
        if self._socket is None or connection is None:
            return None
        number = next(self._numbers)
        try:
            before = written(connection)
            message = HEAD.pack(number, before) + words
            socket.send_fds(self._socket, [message], [connection.fileno()])
        except OSError:
            return None
        return Held(self, number, before)

    def send(self, message: bytes) -> None:
        """In order; what does not go now goes with the next."""
        assert self._socket is not None
        self._late.append(message)
        try:
            while self._late:
                self._socket.send(self._late[0])
                self._late.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the supervisor has ended
            self._late.clear()
