"""What a session costs: a program is started as tcpserver starts it, and asked for its CPU time.

CPU time is user and system time of the process from its start to its end.  The kernel tells it in
two ways: wait4(2) for the process with all children that it waited for, and /proc/PID/schedstat,
read while the process is a zombie, for the process alone.  Memory is VmHWM, the largest resident
set that the process ever had (proc(5)); it includes what is shared with other processes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Cost(NamedTuple):
    """CPU time in seconds, memory in MiB, and the waits that a client saw, in seconds."""

    own: float
    children: float
    memory: float = 0.0
    waits: Mapping[str, float] = {}

    @property
    def cpu(self) -> float:
        """CPU time of the process and its children."""
        return self.own + self.children


class Process:
    """A process that was started; `cost` waits for its end."""

    def __init__(
        self, command: list[str], environ: Mapping[str, str], descriptors: Mapping[int, int]
    ) -> None:
        """Start it; `descriptors` maps each that it gets to the one of ours that it is."""
        actions = [(os.POSIX_SPAWN_DUP2, ours, its) for its, ours in descriptors.items()]
        self.pid = os.posix_spawn(command[0], command, environ, file_actions=actions)

    def memory(self) -> float:
        """The largest resident set so far, in MiB."""
        with open(f"/proc/{self.pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) / 1024

    def cost(self, expected_status: int = 0) -> Cost:
        """Wait for the end; raises RuntimeError if the exit status is another."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with open(f"/proc/{self.pid}/schedstat") as file:
            own = int(file.read().split()[0]) / 1e9
        _, status, usage = os.wait4(self.pid, 0)
        if os.waitstatus_to_exitcode(status) != expected_status:
            raise RuntimeError(f"exit status {os.waitstatus_to_exitcode(status)}")
        return Cost(own, max(0.0, usage.ru_utime + usage.ru_stime - own))


@contextlib.contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection on loopback, (client, server), Nagle's algorithm off on both ends.

    tcpserver -D turns it off for the program; without that, a program that does not do it itself
    stalls for 40 ms in each TLS session, which says nothing of its speed.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=60)
        server, _ = listener.accept()
    with client, server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client, server
