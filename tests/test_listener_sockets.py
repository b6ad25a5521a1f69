"""What tcpserver's -b, -d, -D, -o and -O do to sockets, as their owner sees them.

Nothing of it shows from outside, so a descriptor of the process is taken (pidfd_getfd(2)) and the
kernel is asked.  -b, -d and -D are compared with the real tcpserver.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import pytest
from conformance.client import Client
from conformance.stage import Stage
from e2e.programs import lack, need
from listener.listening import ADDRESS, PATIENCE, Listening, Tcp, children, eventually
from listener.mail import start_tls
from listener.peers import Tcpserver

pytest_plugins = ["listener.fixtures"]

PIDFD_GETFD = 438  # the number is the same on each machine
RECORD_ROUTE = b"\7\7\4\0\0\0\0\0"  # an IP option that does no harm (RFC 791)

Server = Union[Listening, Tcpserver]


def sockets(pid: int) -> Iterator[socket.socket]:
    """The TCP sockets of a process, each as one of ours for the same connection."""
    library = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
        except FileNotFoundError:  # a file that it had open for a moment
            continue
        taken = library.syscall(PIDFD_GETFD, process, int(entry.name), 0)
        if taken < 0:
            os.close(process)
            lack(f"no right to a descriptor of another: {os.strerror(ctypes.get_errno())}")
        with socket.socket(fileno=taken) as found:
            if found.family == socket.AF_INET:
                yield found
    os.close(process)


def option(server: Server, client: socket.socket, level: int, name: int, size: int = 0):
    """A socket option of the server's end of a connection."""
    for pid in children(server.pid):
        for found in sockets(pid):
            try:
                if found.getpeername() != client.getsockname():
                    continue
            except OSError:
                continue  # it listens
            return found.getsockopt(level, name, size) if size else found.getsockopt(level, name)
    raise AssertionError("nobody has the other end")


def greeted(server: Server, options: bytes = b"", header: bytes = b"") -> Client:
    """A client that was greeted, with IP options on its packets, and what a proxy says of it."""
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    if options:
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options)
    connection.connect((ADDRESS, server.port))
    connection.sendall(header)
    client = Client(Tcp(connection))
    assert (client.reply() or "").startswith("220 ")
    return client


def both(mx: Stage, *options: str) -> Iterator[Server]:
    """The real tcpserver and the listener, each with a greeting for its clients."""
    (sh,) = need("sh")
    with Tcpserver(mx.env, [sh, "-c", "echo '220 hello\r'; read line"], *options) as theirs:
        yield theirs
    with Listening(mx, *options) as ours:
        yield ours


@pytest.mark.parametrize("letter, expected", [("-d", 0), ("-D", 1)])
def test_no_delay(mx: Stage, letter: str, expected: int) -> None:
    for server in both(mx, letter):
        client = greeted(server)
        found = option(server, client.connection.end, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert bool(found) == bool(expected)
        client.connection.close()


@pytest.mark.tls
def test_no_delay_once_tls_is_on(mx: Stage) -> None:
    """Whatever -d says: each of TLS' small records would wait for the one before it."""
    with Listening(mx, "-d") as listener:
        client = greeted(listener)
        start_tls(client)
        end = client.connection.end
        assert option(listener, end, socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("letter, are_left", [("-o", True), ("-O", False)])
def test_ip_options(mx: Stage, letter: str, are_left: bool) -> None:
    """tcpserver asks for option 1, which is another one on Linux, so that they stay in any case."""
    with Listening(mx, letter) as listener:
        client = greeted(listener, RECORD_ROUTE)
        end = client.connection.end
        assert bool(option(listener, end, socket.IPPROTO_IP, socket.IP_OPTIONS, 40)) == are_left


def test_ip_options_behind_a_proxy(mx: Stage) -> None:
    """They are those of the connection, whatever family the proxy's client has."""
    with Listening(mx, f"--proxy-from={ADDRESS}") as listener:
        header = b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 25\r\n"
        end = greeted(listener, RECORD_ROUTE, header).connection.end
        assert not option(listener, end, socket.IPPROTO_IP, socket.IP_OPTIONS, 40)


def backlog(server: Server) -> int:
    """How many connections may wait in the socket that listens (tcpi_sacked of tcp(7))."""
    [facts] = [
        found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104) for found in sockets(server.pid)
    ]
    (most,) = struct.unpack_from("I", facts, 28)
    return most


def test_backlog(mx: Stage) -> None:
    assert [backlog(server) for server in both(mx, "-b", "7")] == [7, 7]
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    with Listening(mx) as ours:
        assert backlog(ours) == min(512, most)


def test_connections_wait_in_it(mx: Stage) -> None:
    """Those that -c leaves no place for are accepted in their turn."""
    with Listening(mx, "-c", "1", "-b", "20") as listener:
        first = greeted(listener)
        waiting = [listener.connect() for _ in range(10)]
        eventually(lambda: len(listener.workers) == 1, "there is one worker")
        first.connection.close()
        for client in waiting:
            assert client.reply() == "220 mx.example.org ESMTP"
            client.connection.close()
