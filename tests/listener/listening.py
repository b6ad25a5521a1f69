"""A running qmail-smtpd-listen: its process, its workers, its log, and connections to it."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Callable

from conformance.client import Client
from conformance.program import ROOT
from conformance.stage import Stage
from conformance.transport import SocketConnection
from e2e.log import Log

PATIENCE = 20.0
"""Seconds to wait for whatever must come."""

ADDRESS = "127.0.0.1"

USUAL = ("-v", "-1", "-R", "-H", "-l", "mx.example.org")
"""Options: tell of everything, print the port, look nothing up."""


def program() -> list[str]:
    """The listener under test: the neighbour of QMAIL_SMTPD, or the one of this checkout."""
    chosen = os.environ.get("QMAIL_SMTPD")
    if not chosen:
        return [sys.executable, "-I", str(ROOT / "bin" / "qmail-smtpd-listen")]
    *words, path = shlex.split(chosen)
    return [*words, str(Path(path).with_name("qmail-smtpd-listen"))]


def without(closed: Iterable[int], *command: str) -> list[str]:
    """A command that is started with descriptors closed."""
    shut = " ".join(f"{number}<&-" for number in closed)
    return ["sh", "-c", f'exec "$@" {shut}', "sh", *command]


def free_port() -> int:
    """A port where nobody listens, for a listener that can not say which it has."""
    with socket.create_server((ADDRESS, 0)) as server:
        port: int = server.getsockname()[1]
    return port


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds that no descriptor tells of; fails when patience ends."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.01)


def wait_for_death(pid: int, patience: float = PATIENCE) -> None:
    """Wait until a process has ended, whoever its parent is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([descriptor], [], [], patience)
        assert ended, f"process {pid} is still there"
    finally:
        os.close(descriptor)


class Tcp(SocketConnection):
    """A connection that knows its own socket and port."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end)
        self.end = end
        self.local_port: int = end.getsockname()[1]


class Listening:
    """A listener on a stage; it is ended, with all that it started, at the end of a `with`.

    Its environment is the stage's and nothing else, and so are its arguments.  `options` are those
    of the command line behind the `usual` ones; `before` is a command that starts the listener,
    given as its last arguments, and `command` one that is started in its place; other keywords are
    Popen's.
    """

    port = 0

    def __init__(
        self,
        stage: Stage,
        *options: str,
        host: str = ADDRESS,
        port: int | str = 0,
        before: tuple[str, ...] = (),
        usual: tuple[str, ...] = USUAL,
        command: tuple[str, ...] = (),
        **popen: object,
    ) -> None:
        self.address = ADDRESS if host == "0" else host
        words = [*before, *(command or program()), *usual, *options, host, str(port), *stage.args]
        self._start(stage, words, popen)
        self.port = int(self._stdout())

    def _start(self, stage: Stage, words: list[str], popen: dict[str, object]) -> None:
        self._ended = 0
        self._known: set[str] = set()
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=octet_environment(stage),
            start_new_session=True,
            **popen,
        )
        assert self._process.stderr
        self.log = Log(self._process.stderr)

    def _stdout(self) -> bytes:
        """The line that it prints when it listens."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, f"it did not start:\n{self.log.text()}"
        return line

    # Its processes

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def workers(self) -> set[int]:
        """Its workers, those that have ended and were not waited for among them.

        While it rehearses it has other children: that is waited for.
        """
        while True:
            began = self._is_rehearsing
            there = children(self.pid)
            if not began and not self._is_rehearsing:
                return there
            time.sleep(0.005)

    @property
    def _is_rehearsing(self) -> bool:
        """Whether it has a port beside its own; the tables of all sockets are read only where it
        has a socket that is not known yet.
        """
        unknown = sockets(self.pid) - self._known
        if not unknown:
            return False
        listening = listening_sockets()
        self._known |= {inode for inode in unknown if listening.get(inode, ("", 0))[1] == self.port}
        return any(inode in listening for inode in unknown - self._known)

    def signal(self, number: int) -> None:
        """Send the parent a signal."""
        self._process.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for its end, and that of all that write to its log; its exit status."""
        status = self._process.wait(patience)
        assert self.log.wait_for_end(patience), f"processes of it are left:\n{self.log.text()}"
        return status

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    # Connections

    def socket(self, source: str | None = None) -> socket.socket:
        """A connection from an address."""
        chosen = (source, 0) if source else None
        return socket.create_connection((self.address, self.port), PATIENCE, chosen)

    def connect(self, source: str | None = None) -> Client:
        """A client, from an address."""
        return Client(Tcp(self.socket(source)))

    def greeted(self, source: str | None = None) -> Client:
        """The same, once it was greeted."""
        client = self.connect(source)
        greeting = client.reply()
        assert greeting and greeting.startswith("220 "), f"{greeting}\n{self.log.text()}"
        return client

    def ends(self, count: int = 1) -> list[tuple[int, int]]:
        """The next so many sessions to end: the worker of each, and its exit status."""
        self._ended += count
        found = self.log.wait_for(r": end (\d+) status (\d+)$", self._ended)[-count:]
        return [(int(end[1]), int(end[2]) >> 8) for end in found]

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End it at once; what it could not end itself is killed, which is a failure."""
        if self.is_running:
            self.signal(signal.SIGQUIT)
        try:
            ended = self._process.wait(PATIENCE) is not None and self.log.wait_for_end(PATIENCE)
        except subprocess.TimeoutExpired:
            ended = False
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # that is the aim
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream and (ended or stream is self._process.stdout):
                stream.close()
        if kind is None:
            assert ended, f"it did not end on SIGQUIT:\n{self.log.text()}"
            assert "Traceback" not in self.log.text()
            assert "internal error" not in self.log.text()


class Helping(Listening):
    """A listener that is the helper at a socket; `path` names it."""

    def __init__(
        self, stage: Stage, path: Path, *options: str, before: tuple[str, ...] = (), **popen: object
    ) -> None:
        self.path = path
        words = [*before, *program(), "-v", *options, f"--helper={path}"]
        self._start(stage, words, popen)
        self.log.wait_for(r"status: 0/")
        eventually(lambda: self.workers, "there are workers")  # programs do not wait for long


def octet_environment(stage: Stage) -> dict[bytes, bytes]:
    """The environment of a stage, with an octet for each character."""
    return {name.encode(): value.encode("latin-1") for name, value in stage.env.items()}


def children(pid: int) -> set[int]:
    """The children of a process, the dead that it has not waited for among them."""
    try:
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return set()


def oom_score(pid: int) -> int:
    """What makes the kernel kill a process before others (proc(5)); -1 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return -1


def opened(pid: int) -> set[str]:
    """What a process has open, as /proc has it."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # a file that it had open for a moment
                found.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def sockets(pid: int) -> set[str]:
    """The inodes of the sockets that a process has open."""
    return {name[8:-1] for name in opened(pid) if name.startswith("socket:[")}


def listening_sockets() -> dict[str, tuple[str, int]]:
    """Of each socket of this host that listens, by its inode: the address, and the port."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split(None, 10)
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                octets = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                found[fields[9]] = socket.inet_ntop(family, octets), int(port, 16)
    return found


def listening_on(pid: int) -> set[tuple[str, int]]:
    """The local addresses, and the ports, that a process listens on."""
    listening = listening_sockets()
    return {listening[inode] for inode in sockets(pid) if inode in listening}


def refusal(stage: Stage, *words: str, **popen: object) -> tuple[int, str]:
    """Start a listener that can not start: its exit status, and what it said."""
    ended = subprocess.run(
        [*program(), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=octet_environment(stage),
        timeout=5,
        check=False,
        **popen,
    )
    assert not ended.stdout
    text = ended.stderr.decode()
    assert "Traceback" not in text, text
    return ended.returncode, text
