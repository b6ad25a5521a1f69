"""The wires of a worker, which waits long, often, and for strangers.

A `WatchfulWire` looks up from its wait for a client every few seconds, as the listener may be gone
in the middle of a session.  A `SocketWire` is that for a TCP connection, and seldom needs a poll(2)
before it reads: most clients answer soon, and until then the read itself waits, no longer than
the socket's SO_RCVTIMEO says (socket(7)).
"""

from __future__ import annotations

import os
import socket
import struct
import time

from .wire import PIECE, Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable

LOOK_SECONDS = 5
"""How long a wait lasts before the worker looks up."""

_DONT_WAIT = int(socket.MSG_DONTWAIT)


def timeval(seconds: int, microseconds: int = 0) -> bytes:
    """A struct timeval for setsockopt(2), of which machines of 32 bits have two: the kernel says
    which goes with the number that the interpreter has for SO_RCVTIMEO.
    """
    with socket.socket(socket.AF_UNIX) as asked:
        size = len(asked.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
    return struct.pack("@qq" if size == 16 else "@ll", seconds, microseconds)


_TIMEVAL = timeval(LOOK_SECONDS)


def limit_reads(end: Socket) -> None:
    """Let no read wait for longer than LOOK_SECONDS: of a connection, or of all those that come to
    a listening socket from now on.

    It is asked first: of a connection it is most often so, and asking takes the interpreter a fifth
    of the time.
    """
    if end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, len(_TIMEVAL)) != _TIMEVAL:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)


class WatchfulWire(Wire):
    """A wire that calls `look` now and then while it waits."""

    def __init__(
        self, read_fd: int, write_fd: int, timeout: float, look: Callable[[], object]
    ) -> None:
        self._look = look
        self._look_at = time.monotonic() + LOOK_SECONDS
        super().__init__(read_fd, write_fd, timeout)

    def _read_piece(self, seconds: float) -> bytes:
        self._look_if_due()
        return super()._read_piece(seconds)

    def _look_if_due(self) -> None:
        """Look up between two reads, where the client never lets it wait for so long."""
        if self._read_since > self._look_at:
            self._look_at = self._read_since + LOOK_SECONDS
            self._look()

    def _waits(self, descriptor: int, event: int, seconds: float) -> bool:
        while seconds > LOOK_SECONDS:
            if super()._waits(descriptor, event, LOOK_SECONDS):
                return True
            seconds -= LOOK_SECONDS
            self._look()
        return super()._waits(descriptor, event, seconds)


class SocketWire(WatchfulWire):
    """The same, for a socket in blocking mode, which it stays in."""

    def __init__(self, connection: Socket, timeout: float, look: Callable[[], object]) -> None:
        self._connection = connection
        limit_reads(connection)
        super().__init__(connection.fileno(), connection.fileno(), timeout, look)

    def _use(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd

    def _restore(self) -> None:
        """There is nothing to restore."""

    def _no_delay(self) -> None:
        try:
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # whoever hung up will be noticed

    def _read_piece(self, seconds: float) -> bytes:
        self._look_if_due()
        if seconds > LOOK_SECONDS:
            try:
                return os.read(self._read_fd, PIECE)
            except BlockingIOError:
                seconds -= LOOK_SECONDS
                self._look()
        return super()._read_piece(seconds)

    def _write_piece(self, data: bytes) -> int:
        return self._connection.send(data, _DONT_WAIT)
