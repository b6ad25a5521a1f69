"""A run of the program on a stage: its process, our connection to it, and its log."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from .client import PATIENCE, Client
from .stage import Stage
from .transport import Transport, socketpair

ROOT = Path(__file__).resolve().parents[2]


def under_test() -> list[str]:
    """The program under test: that of QMAIL_SMTPD, or the one of this checkout."""
    ours = [sys.executable, "-I", str(ROOT / "bin" / "qmail-smtpd")]
    return shlex.split(os.environ.get("QMAIL_SMTPD", "")) or ours


def page_faults(pid: int) -> int:
    """How many pages of memory a process had to be given so far (proc(5), minflt)."""
    return int(_stat(pid)[7])


def _stat(pid: int) -> list[str]:
    """What proc(5) says of a process in its stat, from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Program:
    """One run, from the start of the process to the end of it and of all that it started.

    It gets the connection as descriptors 0 and 1, as from tcpserver, and the stage's environment
    and nothing else.  `log` has what went to descriptor 2, whole once `wait` has returned.
    `command` starts something else than the program under test; other keywords are Popen's.
    """

    def __init__(
        self,
        stage: Stage,
        transport: Transport = socketpair,
        command: list[str] | None = None,
        **popen: object,
    ) -> None:
        connection, read_fd, write_fd = transport()
        self.client = Client(connection)
        self.log = b""
        env = {name.encode(): value.encode("latin-1") for name, value in stage.env.items()}
        try:
            self._process = subprocess.Popen(
                [*(command or under_test()), *stage.args],
                stdin=read_fd,
                stdout=write_fd,
                stderr=subprocess.PIPE,
                env=env,
                **popen,
            )
        finally:
            for descriptor in {read_fd, write_fd}:
                os.close(descriptor)
        # Whatever it starts has its descriptor 2, so that the end of that is the end of all.
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self._process.stderr
        with self._process.stderr as pipe:
            while piece := pipe.read1(1 << 16):
                self.log += piece

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def memory(self) -> int:
        """The most memory that it had so far, in octets."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    @property
    def page_faults(self) -> int:
        """How many pages of memory it had to be given so far."""
        return page_faults(self.pid)

    @property
    def cpu(self) -> float:
        """Seconds of processor time that it used so far."""
        fields = _stat(self.pid)
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def children(self) -> list[int]:
        """Its children, the dead that nobody asked for among them."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for the program and all it started; its exit status, negative for a signal."""
        deadline = time.monotonic() + patience
        status = self._process.wait(patience)
        self._reader.join(max(0, deadline - time.monotonic()))
        assert not self._reader.is_alive(), "something it started is still running"
        return status

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the program alone."""
        self._process.send_signal(number)

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up, and see that it ends; after an error, do not wait for it."""
        if not self.client.ended:
            self.client.connection.close()
        if error:
            self._process.kill()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
        self._reader.join(PATIENCE)
