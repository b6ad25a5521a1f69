"""A rehearsal: sessions with ourselves before workers are forked, so that they find all warm.

What the first sessions of a process write to memory is there for good: code that the interpreter
specialises (PEP 659), functions that the linker looks up, what OpenSSL sets up.  Written before the
fork, it is shared by all workers; written after it, each worker has to copy the pages that it
stands in.

So it is no use to rehearse with a stand-in: code is specialised for the types that it has met.  The
process that is going to fork serves some real connections on a port of its own, as the Worker that
its children will be.  Their client is a child too.  No message is delivered and nobody can
authenticate, as there is neither queue nor check program, and the log goes nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time

from .board import Board, Place
from .certificates import TlsError
from .channel import ClientChannel
from .tcpenviron import LookUps
from .tcprules import RulesError
from .worker import Worker, logging_to

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

    from .service import Service
    from .tcprules import Rules

TIMES = 16
"""The interpreter specialises code that has run some eight times."""

_SECONDS = 5  # for sessions that take some milliseconds each
_SESSION_SECONDS = 2  # for one
_CONNECT_SECONDS = 1.0
_BACKLOG = 4096  # whoever finds the port should not fill it

_KEPT = (b"QMAILHOME", b"SMTPAUTH", b"TLSCIPHERS", b"TLSTICKETS")

_NO_PROGRAM = os.fsencode(os.devnull)

_ENVIRON = {
    b"FORCETLS": b"0",
    b"QMAILQUEUE": _NO_PROGRAM,
    b"SMTPD_GREETDELAY": b"0",
    b"TIMEOUTSESSION": b"%d" % _SESSION_SECONDS,
}

_HELLO = b"EHLO localhost\r\n"
_MESSAGE = b"Subject: a rehearsal\r\n\r\n..\r\n.\r\n"


def rehearse(service: Service) -> None:
    """Hold some sessions with ourselves, in a qmail home; raises OSError where there is no loopback
    interface, or they take too long: nobody is served meanwhile, and no signal heeded.

    What goes wrong in a session will do so with real clients, and be told to them and the log: here
    it does not matter.
    """
    server = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
    with server as listener, open(os.devnull, "r+b", 0) as sink:
        listener.setblocking(False)
        nowhere = sink.fileno()
        # Now: whoever finds the port, and connects, is hardly among the first in the queue, and is
        # served no longer than one of ours may be.
        address = listener.getsockname()
        connections = [socket.create_connection(address, _CONNECT_SECONDS) for _ in range(TIMES)]
        with _client_of(connections) as lifeline, logging_to(nowhere, service.resources.log):
            stage = _stage(service)
            until = time.monotonic() + _SECONDS
            for _ in range(TIMES):
                if time.monotonic() > until:
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                _look_up(service.rules)
                Worker(stage, listener, _place(nowhere, lifeline), 1, _SECONDS).run()


def _place(nowhere: int, lifeline: int) -> Place:
    """A worker's place, in a pool of its own that nobody looks after."""
    return Place(
        Board(1),
        0,
        parent=os.getppid(),
        notify=nowhere,
        lifeline=lifeline,
        least_idle=0,
        most_idle=1,
    )


@contextlib.contextmanager
def _client_of(connections: Sequence[socket.socket]) -> Iterator[int]:
    """A child that is the client of connections, and the end of a pipe that hangs up when it has
    ended.
    """
    lifeline, held = os.pipe()
    with open(lifeline, "rb", 0), open(held, "wb", 0) as its_own:
        try:
            client = os.fork()
            if not client:
                _play_client(connections)
        finally:
            for connection in connections:
                connection.close()
        its_own.close()
        try:
            yield lifeline
        finally:
            os.kill(client, signal.SIGKILL)
            os.waitpid(client, 0)


def _stage(service: Service) -> Service:
    """The service as it would be, but that nobody who found its port could get in or send mail."""
    kept = {name: service.environ[name] for name in _KEPT if name in service.environ}
    arguments = [_NO_PROGRAM] if service.arguments else []
    look_ups = LookUps()
    look_ups.host = look_ups.ident = False
    look_ups.local_host = b"localhost"
    return service._replace(
        environ={**kept, **_ENVIRON},
        arguments=arguments,
        look_ups=look_ups,
        rules=None,
        proxies=None,
        banner=b"",
        keep_ip_options=False,
        limit=1,
    )


def _look_up(rules: Rules | None) -> None:
    """Ask the rules for a client; not for ours, which they might turn away."""
    try:
        if rules:
            rules.find(b"192.0.2.1", None, None)
    except RulesError:
        pass  # the log tells of it when somebody connects


def _play_client(connections: Sequence[socket.socket]) -> NoReturn:
    """Be the client of so many sessions, one after the other."""
    try:
        signal.set_wakeup_fd(-1)  # the parent's
        for connection in connections:
            with connection:
                _Client(connection).converse()
    finally:
        os._exit(0)


class _Client:
    """Our own client: it says a line whenever it was told something, in clear or through TLS."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._tls: ClientChannel | None = None
        self._heard = b""

    def converse(self) -> None:
        """Play the dialogue to its end, or until the other end hangs up."""
        try:
            for line in self._dialogue():
                self._connection.sendall(self._tls.write(line) if self._tls else line)
                self._hear()
        except (OSError, TlsError):
            pass

    def _hear(self) -> None:
        """Wait for a reply."""
        self._heard = b""
        while not self._heard.endswith(b"\n"):
            octets = self._connection.recv(65536)
            if not octets:
                raise OSError
            if self._tls:
                self._tls.feed(octets)
                octets = self._tls.read()
            self._heard += octets

    def _start_tls(self) -> None:
        channel = ClientChannel()
        while not channel.handshake():
            self._connection.sendall(channel.pending())
            channel.feed(self._connection.recv(65536))
        self._connection.sendall(channel.pending())
        self._tls = channel

    def _dialogue(self) -> Iterator[bytes]:
        self._hear()
        yield _HELLO
        if b"STARTTLS" in self._heard:
            yield b"STARTTLS\r\n"
            if self._heard.startswith(b"220"):
                self._start_tls()
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
