"""Connections between a client and the program: a socketpair, two pipes, TCP.

A transport is a function that makes a connection and returns both ends: ours as a Connection, and
the program's as the descriptors it reads from and writes to.  `connect` makes ours alone, to a
server that is running already.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import struct
import termios
import time
from typing import Callable


class Connection:
    """Our end: two descriptors that never block."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    def read(self, deadline: float) -> bytes:
        """What comes next, empty at the end of the stream; raises TimeoutError at the deadline."""
        while True:
            try:
                return os.read(self._read_fd, 1 << 16)
            except BlockingIOError:
                if not _wait(deadline, {self._read_fd: select.POLLIN}):
                    raise TimeoutError from None
            except ConnectionError:  # it closed while something of ours was unread: an end as well
                return b""

    def write(self, data: bytes) -> int:
        """Write what goes without waiting; how much.  What nobody reads any more is gone too."""
        try:
            return os.write(self._write_fd, data)
        except BlockingIOError:
            return 0
        except ConnectionError:
            return len(data)

    def wait(self, deadline: float, reading: bool, writing: bool) -> None:
        """Wait until one of the two goes, or the deadline; raises TimeoutError."""
        events: dict[int, int] = {}
        if reading:
            events[self._read_fd] = select.POLLIN
        if writing:
            events[self._write_fd] = events.get(self._write_fd, 0) | select.POLLOUT
        if not _wait(deadline, events):
            raise TimeoutError

    def unread(self) -> int:
        """How many octets of ours the peer has not read (TCP: has not acknowledged)."""
        raise NotImplementedError

    def end_writing(self) -> None:
        """End our stream; the peer's goes on."""
        raise NotImplementedError

    def close(self) -> None:
        """Close both ways."""
        raise NotImplementedError


class SocketConnection(Connection):
    """A connection that is one socket."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end.fileno(), end.fileno())
        self._socket = end

    def unread(self) -> int:
        return _ask(self._write_fd, termios.TIOCOUTQ)

    def end_writing(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer has closed it

    def close(self) -> None:
        self._socket.close()

    def reset(self) -> None:
        """Close by a reset: what the peer writes from now on is an error to it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


class PipeConnection(Connection):
    """A connection that is two pipes."""

    def unread(self) -> int:
        return _ask(self._write_fd, termios.FIONREAD)

    def end_writing(self) -> None:
        os.close(self._write_fd)
        self._write_fd = -1

    def close(self) -> None:
        os.close(self._read_fd)
        if self._write_fd >= 0:
            self.end_writing()


Ends = tuple  # (ours: Connection, read_fd: int, write_fd: int)
Transport = Callable[[], Ends]


def socketpair() -> Ends:
    """Two sockets that are connected."""
    ours, theirs = socket.socketpair()
    descriptor = theirs.detach()
    return SocketConnection(ours), descriptor, descriptor


def pipes() -> Ends:
    """A pipe each way."""
    read_fd, their_write_fd = os.pipe()
    their_read_fd, write_fd = os.pipe()
    return PipeConnection(read_fd, write_fd), their_read_fd, their_write_fd


def tcp() -> Ends:
    """A connection over the loopback interface, as tcpserver hands it over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = connect(listener.getsockname())
        theirs, _ = listener.accept()
    descriptor = theirs.detach()
    return ours, descriptor, descriptor


def connect(address: tuple[str, int]) -> SocketConnection:
    """A connection to the server at an address."""
    return SocketConnection(socket.create_connection(address))


TRANSPORTS: dict[str, Transport] = {"socketpair": socketpair, "pipes": pipes, "tcp": tcp}


def _wait(deadline: float, events: dict[int, int]) -> bool:
    poll = select.poll()
    for descriptor, mask in events.items():
        poll.register(descriptor, mask)
    return bool(poll.poll(max(0, deadline - time.monotonic()) * 1000))


def _ask(descriptor: int, request: int) -> int:
    answer = array.array("i", [0])
    fcntl.ioctl(descriptor, request, answer)
    return answer[0]
