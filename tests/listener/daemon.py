"""A listener in the background, found again by its pid file."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from conformance.client import Client
from conformance.stage import Stage
from conformance.transport import connect

from .listening import (
    ADDRESS,
    PATIENCE,
    USUAL,
    eventually,
    free_port,
    octet_environment,
    program,
    wait_for_death,
    without,
)


class Daemon:
    """A listener in the background; it is ended at the end of a `with`.

    `closed` are descriptors that it is not started with.
    """

    def __init__(
        self, stage: Stage, directory: Path, *options: str, closed: Iterable[int] = ()
    ) -> None:
        self.pid_file = directory / "pid"
        self.log_file = directory / "log"
        self._before = self._pid_text()
        port = free_port() if 1 in closed else 0
        arguments = [*USUAL, *self.options, *options, ADDRESS, str(port), *stage.args]
        started = subprocess.run(
            without(closed, *program(), *arguments),
            cwd=directory,
            env=octet_environment(stage),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (started.returncode, started.stderr) == (0, b"")
        self.port = port or int(started.stdout)
        eventually(self._has_pid, "there is a pid file")
        self.pid = int(self.pid_file.read_text())

    def _has_pid(self) -> bool:
        return self._pid_text() != self._before and self._pid_text().endswith("\n")

    def _pid_text(self) -> str:
        return self.pid_file.read_text() if self.pid_file.exists() else ""

    @property
    def options(self) -> list[str]:
        return ["--daemon", f"--pid-file={self.pid_file}", f"--log-file={self.log_file}"]

    def greeted(self) -> Client:
        client = Client(connect((ADDRESS, self.port)))
        assert client.reply() == "220 mx.example.org ESMTP"
        return client

    def says(self, text: str, count: int = 1) -> None:
        """Wait until the log has a text."""
        eventually(lambda: self.log_file.read_text().count(text) >= count, text)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        wait_for_death(self.pid)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.kill(self.pid, signal.SIGQUIT)
        except ProcessLookupError:
            pass
        wait_for_death(self.pid)
        assert "Traceback" not in self.log_file.read_text()
