"""A worker: accepts a connection, finds out whose it is, and serves it as the program would.

The same `serve` runs here as in the one-shot program, with an environment made anew for each
connection.  Nothing else of a connection lives on: its session, descriptors and TLS state go with
it, and what is kept (control files, TLS contexts, rules) comes from files that no client writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from _socket import socket as Socket  # what socket.socket is made of

from . import handover, log
from .handover import HandoverError
from .proxyprotocol import Addresses, ProxyError, read_header
from .qmail_queue import reap
from .settings import TIMEOUT
from .smtpd import serve
from .tcpenviron import bare_ip, environment
from .tcprules import RulesError
from .wire import ConnectionLost, TimedOut
from .workerwire import SocketWire, WatchfulWire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from .board import Place
    from .service import Service

IDLE_SECONDS = 5.0
"""How long a worker waits for a connection before it looks whether it is still wanted."""

PROXY_SECONDS = 10.0
"""How long a load balancer may take to send its PROXY header."""

_STREAM = int(socket.SOCK_STREAM)

# Interpreters that were built for an older kernel do not have its name (epoll_ctl(2)).
_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 1 << 28)

_LONGEST_OPTIONS = 40  # octets (ip(7))

_DENIED, _DROPPED = 100, 111  # the exit statuses of tcpserver's children


class Worker:
    """The life of a worker: it ends after `most` connections or `oldest` seconds, or when it is not
    wanted any more.

    It waits by epoll(7), not in accept(2): there the kernel wakes whoever waits longest, here the
    same one whenever it waits, so that few workers do most of the work and stay warm.  As the
    kernel wakes nobody else for that connection, it is accepted even by a worker that is told to
    end in the same moment.
    """

    def __init__(
        self, service: Service, listener: socket.socket, place: Place, most: int, oldest: float
    ) -> None:
        self._service = service
        self._listener = listener
        self._family = int(listener.family)
        self._place = place
        self._most = most
        self._until = time.monotonic() + oldest
        self._pid = 0  # as long as it does not run

    def run(self) -> None:
        """Serve connections until it is time to end."""
        served, place = 0, self._place
        self._pid = os.getpid()
        with select.epoll() as incoming:
            incoming.register(self._listener, select.EPOLLIN | _EXCLUSIVE)
            incoming.register(place.lifeline, select.EPOLLHUP)
            while served < self._most and place.is_wanted() and time.monotonic() < self._until:
                reap(self._service.resources.left_children)
                woken = incoming.poll(IDLE_SECONDS, 2)
                if not woken and place.leave_if_spare():
                    return
                if len(woken) == 1 and woken[0][0] == place.lifeline:
                    return
                try:
                    connection, remote = self._accept()
                except BlockingIOError:  # nobody came, or another worker was faster
                    continue
                except OSError as error:
                    if error.errno in (errno.EINVAL, errno.EBADF):  # shut down, or given up
                        return
                    self._service.complain(f"warning: cannot accept: {error.strerror}")
                    time.sleep(0.1)
                    continue
                served += 1
                place.begin()
                status = self._take(connection, remote)
                place.end()  # not if that failed: the parent is to see what it died of
                if self._service.is_verbose:
                    self._service.complain(f"end {self._pid} status {status << 8}")
                    self._tell_status()

    def _accept(self) -> tuple[Socket, Any]:
        """As socket.accept does, but without its wrapping of descriptors, which takes longer than
        the system call.
        """
        descriptor, remote = self._listener._accept()  # type: ignore[attr-defined]
        return Socket(self._family, _STREAM, 0, descriptor), remote

    def _look(self) -> None:
        """Close the listening socket if the parent is gone, in the middle of a session: whoever
        takes its place needs the port.
        """
        if self._place.is_orphan():
            self._listener.close()

    def _tell_status(self) -> None:
        self._service.complain(f"status: {self._place.board.busy}/{self._service.limit}")

    def _take(self, connection: Socket, remote: Any) -> int:
        """Serve an accepted connection from `remote`, an address as its family has it; the exit
        status that tcpserver's child would have.
        """
        service = self._service
        try:
            try:
                ends = self._ends(connection, remote)
                if service.is_verbose:
                    self._tell_status()
                    service.complain(f"pid {self._pid} from {ends.remote_ip}")
                environ = self._admit(connection, ends)
            except (OSError, ProxyError, RulesError) as error:
                why = log.words_of(error)
                service.complain(f"drop {self._pid} from {bare_ip(remote[0])}: {why}")
                return _DROPPED
            return _DENIED if environ is None else self._serve(connection, environ)
        finally:
            connection.close()

    def _serve(self, connection: Socket, environ: Mapping[bytes, bytes]) -> int:
        service = self._service
        service.resources.files.refresh()
        wire = SocketWire(connection, TIMEOUT, self._look)
        try:
            return serve(wire, environ, service.arguments, service.resources)
        except (ConnectionLost, TimedOut):
            return 1

    def _ends(self, connection: Socket, remote: Any) -> Addresses:
        """Who is at the two ends; raises OSError, or ProxyError where a proxy does not say."""
        remote_ip, remote_port = remote[:2]
        local_ip, local_port = connection.getsockname()[:2]
        ends = Addresses(bare_ip(remote_ip), remote_port, bare_ip(local_ip), local_port)
        if not self._service.keep_ip_options and ":" not in ends.local_ip:
            _drop_ip_options(connection)
        if self._service.proxies is not None and ends.remote_ip in self._service.proxies:
            return read_header(connection, PROXY_SECONDS) or ends
        return ends

    def _admit(self, connection: Socket, ends: Addresses) -> dict[bytes, bytes] | None:
        """The environment for the connection, or None if the rules turn it away."""
        service = self._service
        if service.banner:
            connection.send(service.banner)
        look_ups = service.look_ups
        local_host = look_ups.local_name(ends.local_ip)
        host = look_ups.remote_host(ends.remote_ip)
        info = look_ups.remote_info(ends)
        environ = environment(service.environ, ends, local_host, host, info)
        rules = service.rules
        variables = rules.find(ends.remote_ip.encode(), host, info) if rules else {}
        if service.is_verbose:
            verdict = "deny" if variables is None else "ok"
            local = f"{_text(local_host)}:{ends.local_ip}:{ends.local_port}"
            remote = f"{_text(host)}:{ends.remote_ip}:{_text(info)}:{ends.remote_port}"
            service.complain(f"{verdict} {self._pid} {local} {remote}")
        if variables is None:
            return None
        environ.update(variables)
        return environ


class Helper(Worker):
    """A worker whose connections come from programs under tcpserver, handed over for TLS."""

    def _take(self, connection: Socket, remote: Any) -> int:
        service = self._service
        if service.is_verbose:
            self._tell_status()
        service.resources.files.refresh()
        try:
            status = self._serve_offered(connection, *handover.take(connection))
            try:
                connection.sendall(bytes([status]))
            except OSError:
                pass  # the program was killed; the session is over all the same
        except HandoverError as error:
            service.complain(f"drop {self._pid}: {error}")
            return _DROPPED
        finally:
            connection.close()
        return status

    def _serve_offered(
        self, program: Socket, arguments: Sequence[bytes], environ: Mapping[bytes, bytes]
    ) -> int:
        """Serve the session that a program offers; its log lines go where the program's go."""
        wire = WatchfulWire(-1, -1, TIMEOUT, self._look)  # until there are descriptors
        with contextlib.ExitStack() as given:

            def begin() -> bool:
                descriptors = handover.begin(program)
                if not descriptors:
                    return False
                for descriptor in descriptors:
                    given.callback(os.close, descriptor)
                read_fd, write_fd, log_fd = descriptors
                given.enter_context(logging_to(log_fd, self._service.resources.log))
                wire.move(read_fd, write_fd)
                return True

            try:
                return serve(wire, environ, arguments, self._service.resources, begin)
            except (ConnectionLost, TimedOut):
                return 1


@contextlib.contextmanager
def logging_to(descriptor: int, its_log: log.Log) -> Iterator[None]:
    """Have what this process logs go to another descriptor; `its_log` is what writes it."""
    ours = os.dup(log.DESCRIPTOR)
    os.dup2(descriptor, log.DESCRIPTOR)
    its_log.start_over()
    try:
        yield
    finally:
        os.dup2(ours, log.DESCRIPTOR)
        its_log.start_over()
        os.close(ours)


def _drop_ip_options(connection: Socket) -> None:
    """Send packets of this connection by no route that the client chose; most choose none, and
    there are systems that know no such option (qemu-user).
    """
    try:
        options = connection.getsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, _LONGEST_OPTIONS)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return
        raise
    if options:
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"")


def _text(name: bytes | None) -> str:
    """A name from outside for the log, where colons part fields; as tcpserver shows it."""
    text = (name or b"").translate(_SHOWN).decode("ascii")
    return text if len(text) < 100 else text[:100] + "..."


_SHOWN = bytes(octet if 33 <= octet <= 126 and octet not in b"%:" else 63 for octet in range(256))
