"""What a client is told if the process that answers it is killed: a process's side of it.

A descriptor can be in two processes. As long as a request is worked on the supervisor has its connection, too, and the
bytes that would end the answer, its *last words*: some for an answer of which nothing is written yet, others for a
stream. Where a process ends without having let go, it writes those that fit (``supervisor/last_words.py``); the kernel
knows how much was written. Over TLS nobody else can speak: such a connection is not held, and breaks.

A message on the channel (a SOCK_SEQPACKET pair) is a hold, with a descriptor (SCM_RIGHTS, unix(7)): ``HOLDS``, its
number, the bytes that its connection was given before the answer, the length of the words for one that has not begun,
these, and the others; or ``LETS_GO`` and the numbers of holds.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct

NUMBER = struct.Struct("<Q")
HOLD = struct.Struct("<QQI")
HOLDS, LETS_GO = b"h", b"g"
RETRY_S = 0.05
"""Where the supervisor has had no time to listen."""
MOST_NUMBERS = 512
"""In a message."""
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

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._held = True

    def release(self) -> None:
        """In the event loop's next turn: by then all that was written is on its way. A second time is nothing."""
        if self._held:
            self._held = False
            self._channel.release(self._number)


class Channel:
    """To the supervisor; -1 = there is none, and nothing is held."""

    def __init__(self, fd: int = -1) -> None:
        self._socket = socket.socket(fileno=fd) if fd >= 0 else None
        self._numbers = itertools.count()
        self._released: list[int] = []
        """What the supervisor was not told yet."""
        self._tells = False
        if self._socket is not None:
            self._socket.setblocking(False)

    def hold(self, connection: socket.socket | None, ahead: int, before: bytes, begun: bytes) -> Held | None:
        """
        Args:
            connection: None: nobody else can speak on it.
            ahead: bytes that will be written before the answer.
            before: last words of an answer of which nothing is written.
            begun: those of one that was begun.

        Returns:
            None: it is not held, or the supervisor has no time; it is answered all the same.
        """
        if self._socket is None or connection is None:
            return None
        number = next(self._numbers)
        try:
            head = HOLDS + HOLD.pack(number, written(connection) + ahead, len(before))
            socket.send_fds(self._socket, [head + before + begun], [connection.fileno()])
        except OSError:
            return None
        return Held(self, number)

    def release(self, number: int) -> None:
        """All of a turn in one message: each wakes the supervisor."""
        self._released.append(number)
        if not self._tells:
            self._tells = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        assert self._socket is not None
        self._tells = False
        try:
            while self._released:
                some = self._released[:MOST_NUMBERS]
                self._socket.send(LETS_GO + b"".join(map(NUMBER.pack, some)))
                del self._released[:MOST_NUMBERS]
        except BlockingIOError:  # the connections stay open as long as nobody is told
            self._tells = True
            asyncio.get_running_loop().call_later(RETRY_S, self._tell)
        except OSError:  # the supervisor has ended
            self._released.clear()
