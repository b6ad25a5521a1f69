"""The connection: timed reads and writes on two descriptors, in clear or through TLS.

The descriptors may be a socket, two pipes or files.  TLS runs on octets in memory, so that it can
use any of them, and what encrypts is handed in: this module knows nothing of certificates.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .channel import Channel

PIECE = 65536
"""Octets that are read at most at a time."""


HUNG_UP = "hung up"


class TimedOut(Exception):
    """The client was silent, or took nothing, for longer than timeoutsmtpd, or the time for the
    whole connection is over.
    """


class ConnectionLost(Exception):
    """Nothing more can come from the client; the text says why."""


class HandedOver(Exception):
    """Another process has served the rest of the session, and this is the exit status."""

    def __init__(self, exit_status: int) -> None:
        super().__init__()
        self.exit_status = exit_status


class Wire:
    """The two directions of a connection; `timeout` is in seconds, for each read or write."""

    def __init__(self, read_fd: int, write_fd: int, timeout: float) -> None:
        self._timeout = timeout
        self._until = float("inf")
        self._read_since = 0.0
        self._tls: Channel | None = None
        self._use(read_fd, write_fd)

    def _use(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._was_blocking = False
        # Or a write could wait for a client that reads nothing.
        try:
            if os.get_blocking(write_fd):
                os.set_blocking(write_fd, False)
                self._was_blocking = True
        except OSError:
            pass  # it is closed, as the first write will tell

    def move(self, read_fd: int, write_fd: int) -> None:
        """Go on with other descriptors, and leave those so far as they were."""
        self._restore()
        self._use(read_fd, write_fd)

    def limit(self, timeout: float, total: float) -> None:
        """Set the seconds for each read or write, and for all from now on, 0 for no limit."""
        self._timeout = timeout
        if total:
            self._until = time.monotonic() + total

    @property
    def patience(self) -> float:
        """Seconds that the client may take now."""
        return max(0.0, min(self._timeout, self._until - time.monotonic()))

    @property
    def is_over(self) -> bool:
        """Whether the time for the connection is over."""
        return time.monotonic() >= self._until

    def read(self) -> bytes:
        """The next octets, at least one; raises TimedOut or ConnectionLost."""
        begin = self._read_since = time.monotonic()
        seconds = min(self._timeout, self._until - begin)
        if self._tls is None:
            return self._receive(seconds)
        deadline = begin + seconds
        while not (data := self._tls.read()):
            if self._tls.ended:
                raise ConnectionLost(self._tls.ended)
            # There may be an answer, such as the alert that refuses to renegotiate.
            self._send(self._tls.pending())
            self._tls.feed(self._receive(deadline - time.monotonic()))
        return data

    def check(self) -> None:
        """See that the client is still there, if only to be told something, and has time left;
        raises TimedOut or ConnectionLost.
        """
        if self.is_over:
            raise TimedOut
        poll = select.poll()
        poll.register(self._write_fd, 0)  # POLLHUP and POLLERR come unasked
        if poll.poll(0):
            raise ConnectionLost(HUNG_UP)

    def waited(self) -> float:
        """Seconds since the last read began."""
        return time.monotonic() - self._read_since

    def read_early(self, seconds: float) -> bytes:
        """What comes within so many seconds, or nothing; raises ConnectionLost."""
        timeout, self._timeout = self._timeout, seconds
        try:
            return self.read()
        except TimedOut:
            return b""
        finally:
            self._timeout = timeout

    def write(self, data: bytes) -> None:
        """Send the octets; raises TimedOut or ConnectionLost."""
        if data:
            self._send(self._tls.write(data) if self._tls else data)

    def start_tls(self, channel: Channel) -> None:
        """Make the handshake; raises TimedOut, ConnectionLost or what the channel raises.

        From here on nothing leaves in clear, whether it succeeds or not.
        """
        self._tls = channel
        deadline = self._deadline()
        self._no_delay()
        while True:
            done = channel.handshake()  # where it fails, `close` sends the alert
            self._send(channel.pending())
            if done:
                return
            channel.feed(self._receive(deadline - time.monotonic()))

    def close(self) -> None:
        """End TLS, if it is on, with a close_notify, or the alert of a handshake that failed; leave
        the descriptors as they were.
        """
        if self._tls is not None:
            try:
                self._write_piece(self._tls.close())
            except OSError:
                pass  # a client that is gone, or takes nothing, is not waited for
        self._restore()

    def _restore(self) -> None:
        if self._was_blocking:
            os.set_blocking(self._write_fd, True)

    def _deadline(self) -> float:
        return min(time.monotonic() + self._timeout, self._until)

    def _receive(self, seconds: float) -> bytes:
        """What comes within so many seconds."""
        try:
            data = self._read_piece(seconds)
        except OSError as error:
            raise ConnectionLost(error.strerror) from None
        if not data:
            raise ConnectionLost(HUNG_UP)
        return data

    def _read_piece(self, seconds: float) -> bytes:
        """What comes within so many seconds, empty at the end; raises TimedOut or OSError."""
        deadline = time.monotonic() + seconds
        while self._waits(self._read_fd, select.POLLIN, seconds):
            try:
                return os.read(self._read_fd, PIECE)
            except BlockingIOError:  # nothing was there after all
                seconds = deadline - time.monotonic()
        raise TimedOut

    def _send(self, data: bytes) -> None:
        """Write all of it; without a wait where the client reads what it is sent."""
        deadline = None
        while data:
            try:
                data = data[self._write_piece(data) :]
            except BlockingIOError:
                deadline = deadline or self._deadline()
                if not self._waits(self._write_fd, select.POLLOUT, deadline - time.monotonic()):
                    raise TimedOut from None
            except BrokenPipeError:
                raise ConnectionLost(HUNG_UP) from None
            except OSError as error:
                raise ConnectionLost(error.strerror) from None

    def _write_piece(self, data: bytes) -> int:
        """Write what goes without a wait, and say how much that was; raises OSError."""
        return os.write(self._write_fd, data)

    def _waits(self, descriptor: int, event: int, seconds: float) -> bool:
        """Wait for poll(2)'s event; whether it came within so many seconds."""
        poll = select.poll()
        poll.register(descriptor, event)
        return seconds >= 0 and bool(poll.poll(seconds * 1000))

    def _no_delay(self) -> None:
        """Let TLS records leave at once; without it each exchange stalls for 40 ms (tcp(7))."""
        import socket

        try:
            connection = socket.socket(fileno=self._write_fd)
        except OSError:
            return  # no socket
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # not TCP
        finally:
            connection.detach()
