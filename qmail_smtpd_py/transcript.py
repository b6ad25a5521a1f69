"""Where a watched session is written down: a file for each session, or the log.

    +0.000 note: 2026-11-25 03:15:45 UTC, 192.0.2.7
    +0.001 server: 220 mx.example.org ESMTP
    +0.083 client: EHLO client.example.net

The file is new, whatever is there, and readable by its owner alone.  Each octet that is not
printable ASCII, and each backslash, is \\xHH, so that no client can make a line of its own.
A transcript ends at LIMIT octets, and where it can not be written: the log is told once, and the
session goes on.
"""

from __future__ import annotations

import os
import time

from .log import escaped
from .watched import NOTE, Transcript

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LIMIT = 1 << 20
"""Octets in one transcript."""

TO_THE_LOG = b"=log"
"""The value of SMTPTRACE for that; anything else is a directory."""

_LONGEST_LINE = 1200
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC
_PLAIN = bytes(range(32, 127)).replace(b"\\", b"")
_IN_A_NAME = b"0123456789abcdefABCDEF.:"

_LEFT_OUT = b"the rest is left out"


def transcript(
    where: bytes, ip: bytes, log: Callable[[str, Mapping[str, object]], None]
) -> Transcript:
    """A transcript at the place that SMTPTRACE names, of a session with this client; `log` is
    Effects.log.
    """
    return LogTranscript(log) if where == TO_THE_LOG else FileTranscript(where, ip, log)


class LogTranscript(Transcript):
    """A transcript in the log, an event for each line."""

    def __init__(self, log: Callable[[str, Mapping[str, object]], None]) -> None:
        self._log = log
        self._room = LIMIT

    def write(self, who: str, text: bytes) -> None:
        if self._room <= 0:
            return
        self._room -= len(text) + 1
        self._log("trace", {"who": who, "text": text})
        if self._room <= 0:
            self._log("trace", {"who": NOTE, "text": _LEFT_OUT})

    def close(self) -> None:
        self._room = 0


class FileTranscript(Transcript):
    """A transcript in a file of its own."""

    def __init__(
        self, directory: bytes, ip: bytes, log: Callable[[str, Mapping[str, object]], None]
    ) -> None:
        self._log = log
        self._room = LIMIT
        self._begin = time.monotonic()
        now = time.time()
        self._descriptor: int | None = None
        address = bytes(octet if octet in _IN_A_NAME else ord("_") for octet in ip[:45])
        name = b"%.6f.%d.%s" % (now, os.getpid(), address)
        self._path = os.path.join(directory, name)
        try:
            self._descriptor = os.open(self._path, _FLAGS, 0o600)
        except OSError as error:
            self._give_up(error)
            return
        day = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)).encode()
        self.write(NOTE, b"%s, %s" % (day, ip))

    def write(self, who: str, text: bytes) -> None:
        if self._descriptor is None:
            return
        try:
            self._write(self._descriptor, who, text)
            if self._room <= 0:
                self._write(self._descriptor, NOTE, _LEFT_OUT)
                self.close()
        except OSError as error:
            self._give_up(error)

    def _write(self, descriptor: int, who: str, text: bytes) -> None:
        seconds = time.monotonic() - self._begin
        line = b"+%.3f %s: %s\n" % (seconds, who.encode(), escaped(text, _PLAIN, _LONGEST_LINE))
        self._room -= len(line)
        while line:
            line = line[os.write(descriptor, line) :]

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _give_up(self, error: OSError) -> None:
        self.close()
        path = os.fsdecode(self._path)
        why = f"cannot write the trace {path}: {error.strerror} (uid {os.geteuid()})"
        self._log("error", {"why": why})
