"""The real tcpserver, and the programs that make and read its rules."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from e2e.log import Log
from e2e.programs import need

from .listening import ADDRESS, PATIENCE, USUAL


def compile_rules(path: Path, text: str) -> Path:
    """Have tcprules make a cdb."""
    (tcprules,) = need("tcprules")
    command = [tcprules, path, f"{path}.tmp"]
    subprocess.run(command, input=text.encode("latin-1"), check=True, timeout=PATIENCE)
    return path


class Tcpserver:
    """A running tcpserver with a program; `port` is where it listens, `log` what it says."""

    def __init__(
        self,
        env: dict[str, str],
        command: list[str],
        *options: str,
        host: str = ADDRESS,
        usual: tuple[str, ...] = USUAL,
    ) -> None:
        (tcpserver,) = need("tcpserver")
        self.address = ADDRESS if host == "0" else host
        self._process = subprocess.Popen(
            [tcpserver, *usual, *options, host, "0", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value.encode("latin-1") for name, value in env.items()},
            start_new_session=True,
        )
        assert self._process.stdout and self._process.stderr
        self.log = Log(self._process.stderr)
        line = self._process.stdout.readline()
        assert line, f"tcpserver did not start:\n{self.log.text()}"
        self.port = int(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    def socket(self, source: str | None = None) -> socket.socket:
        """A connection from an address."""
        chosen = (source, 0) if source else None
        return socket.create_connection((self.address, self.port), PATIENCE, chosen)

    def __enter__(self) -> Tcpserver:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                break
            has_ended = self.log.wait_for_end(PATIENCE)
        self._process.wait(PATIENCE)
        assert self._process.stdout and self._process.stderr
        self._process.stdout.close()
        if has_ended:  # if not, its reader has it, and to close it is to wait for that
            self._process.stderr.close()
