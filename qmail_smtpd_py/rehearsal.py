"""A rehearsal: sessions with ourselves before workers are forked, so that they find all warm.

What the first sessions of a process write to memory is there for good: code that the interpreter
specialises (PEP 659), its caches of attributes, what OpenSSL sets up.  Written before the fork, it
is shared by all workers; written after it, each worker has to copy the pages that it stands in.

A rehearsal is a real session, by `serve`, over a pair of sockets, with a client that speaks
whenever the server would wait for it.  It delivers nothing, asks no check program and logs nothing.
"""

from __future__ import annotations

import os
import socket

from . import log
from .certificates import TlsError
from .channel import ClientChannel
from .qmail_queue import QueueDelivery
from .smtpd import Server, serve_on
from .wire import ConnectionLost, TimedOut, Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .effects import Delivery, Identity
    from .smtpd import Resources

TIMES = 16
"""The interpreter specialises code that has run some eight times."""

_SECONDS = 10.0  # for a session that takes some milliseconds

_KEPT = (b"QMAILHOME", b"SMTPAUTH", b"TLSCIPHERS")

_ENVIRON = {
    b"TCPREMOTEIP": b"127.0.0.1",
    b"TCPREMOTEHOST": b"localhost",
    b"TCPLOCALIP": b"127.0.0.1",
    b"TCPLOCALHOST": b"localhost",
    b"TCPLOCALPORT": b"25",
    b"FORCETLS": b"0",
    b"SMTPD_GREETDELAY": b"0",
}

_HELLO = b"EHLO localhost\r\n"
_MESSAGE = b"Subject: a rehearsal\r\n\r\n..\r\n.\r\n"


def rehearse(
    environ: Mapping[bytes, bytes], arguments: Sequence[bytes], resources: Resources
) -> None:
    """Hold some sessions with ourselves, in a qmail home.  What goes wrong in one will do so with
    real clients, and be told to them and the log: here it does not matter.
    """
    kept = {name: environ[name] for name in _KEPT if name in environ}
    ours, nowhere = os.dup(log.DESCRIPTOR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, log.DESCRIPTOR)
    try:
        for _ in range(TIMES):
            _hold_session({**kept, **_ENVIRON}, arguments, resources)
    except (ConnectionLost, TimedOut):
        pass
    finally:
        os.dup2(ours, log.DESCRIPTOR)
        os.close(ours)
        os.close(nowhere)


def _hold_session(
    environ: Mapping[bytes, bytes], arguments: Sequence[bytes], resources: Resources
) -> None:
    server, client = socket.socketpair()
    with server, client:
        client.setblocking(False)
        wire = _RehearsedWire(server.fileno(), _Client(client))
        serve_on(wire, environ, arguments, resources, kind=_Server)


class _Server(Server):
    """A server that starts no program."""

    def open_delivery(self, identity: Identity) -> Delivery:
        message, envelope = (os.open(os.devnull, os.O_WRONLY) for _ in range(2))
        return QueueDelivery(0, message, envelope, OSError("a rehearsal"))


class _RehearsedWire(Wire):
    """A wire whose other end is there to answer: nobody ever waits."""

    def __init__(self, descriptor: int, client: _Client) -> None:
        super().__init__(descriptor, descriptor, _SECONDS)
        self._client = client

    def _receive(self, seconds: float) -> bytes:
        self._client.speak()
        return super()._receive(min(seconds, _SECONDS))


class _Client:
    """Our own client: it says a line each time it is asked to, in clear or through TLS."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._tls: ClientChannel | None = None
        self._is_up = False
        self._heard = b""
        self._lines = self._dialogue()

    def speak(self) -> None:
        """Hear what was said, and answer; hang up where there is nothing more to say."""
        try:
            self._hear()
            answer = self._go_on_with_handshake() if self._tls and not self._is_up else b""
            if self._is_up or not answer:
                line = next(self._lines)
                answer += self._tls.write(line) if self._tls and self._is_up else line
            self._connection.sendall(answer)
        except (OSError, StopIteration, TlsError):
            self._connection.close()

    def _go_on_with_handshake(self) -> bytes:
        assert self._tls
        self._is_up = self._tls.handshake()
        return self._tls.pending()

    def _hear(self) -> None:
        try:
            self._heard = self._connection.recv(65536)
        except BlockingIOError:
            self._heard = b""
        if self._tls:
            self._tls.feed(self._heard)
            if self._is_up:
                self._heard = self._tls.read()

    def _dialogue(self) -> Iterator[bytes]:
        yield _HELLO
        if b"STARTTLS" in self._heard:
            yield b"STARTTLS\r\n"
            if self._heard.startswith(b"220"):
                self._tls = ClientChannel()
                yield self._go_on_with_handshake()
                yield _HELLO
        if b"PLAIN" in self._heard:
            yield b"AUTH PLAIN\r\n"
            if self._heard.startswith(b"334"):
                yield b"*\r\n"
        yield b"MAIL FROM:<>\r\n"
        yield b"RCPT TO:<postmaster>\r\n"
        yield b"DATA\r\n"
        if self._heard.startswith(b"354"):
            yield _MESSAGE
        yield b"QUIT\r\n"
