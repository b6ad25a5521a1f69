"""A client that is typed into: each line when the reply to the one before is there."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time

import pytest

from .log import PATIENCE

_REPLY = re.compile(rb"^((?:\d{3}-.*\r?\n)*\d{3} .*\r?\n)", re.MULTILINE)


class Conversation:
    """A running client with its input and output in our hands; use it in a `with`.

    `printed` is all that it has printed so far, with the ends of lines as they came.  Most clients
    end with the connection only if nothing more can be typed; telnet ends where typing ends, too.
    """

    def __init__(self, command, ends_by_itself=False):
        self._ends_by_itself = ends_by_itself
        self._client = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self.printed = b""
        self._at = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.kill()
        self._client.wait()
        self._client.stdin.close()
        self._client.stdout.close()

    def say(self, line):
        """Type a line; the next reply."""
        self.type(line)
        return self.reply()

    def type(self, line):
        """Type a line, which may be octets."""
        octets = line if isinstance(line, bytes) else line.encode()
        self._client.stdin.write(octets + b"\n")

    def reply(self):
        """The next reply, its lines parted by line feeds; what is no reply is passed over."""
        return self.wait_for(_REPLY)[1].decode().replace("\r\n", "\n").rstrip("\n")

    def wait_for(self, pattern):
        """The next place where the pattern is found."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.compile(pattern).search(self.printed, self._at)):
            if not self._read(deadline):
                pytest.fail(f"the client ended, or hangs:\n{self.printed!r}", pytrace=False)
        self._at = found.end()
        return found

    def end(self):
        """Wait until the client ends; what it printed since the last reply."""
        if not self._ends_by_itself:
            self._client.stdin.close()
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        self._client.wait(max(0, deadline - time.monotonic()))
        return self.printed[self._at :]

    def _read(self, deadline):
        """Whether more came before its end."""
        output = self._client.stdout.fileno()
        ready, _, _ = select.select([output], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"the client hangs:\n{self.printed!r}"
        more = os.read(output, 65536)
        self.printed += more
        return bool(more)
