"""The log of a service: lines as they come, and the grammar that each of our own has to obey."""

from __future__ import annotations

import re
import threading
import time
from typing import NamedTuple

import pytest

PATIENCE = 30
"""Seconds until something that has to happen counts as something that did not."""

EVENTS = ("connect", "tls", "auth", "mail", "limit", "trace", "error", "disconnect")

_HEAD = re.compile(r"qmail-smtpd\[(\d+)\]: ([a-z]+)")
_QUOTED = r'"(?:[ !#-\[\]-~]|\\x[0-9a-f]{2})*"'
_PLAIN = r"[\w.@%+/=:<>\[\],!#&*~?-]*"
_CUT = r"\.\.\.\(\d+ octets\)"
_FIELD = re.compile(rf" ([a-z]+)=({_QUOTED}|{_PLAIN}?)({_CUT})?(?= |$)", re.ASCII)


class Event(NamedTuple):
    """A line of ours: the process, what happened, and the fields with their escapes undone."""

    pid: int
    name: str
    fields: dict[str, str]

    def __getitem__(self, key):
        return self.fields[key]


def parse(line):
    """The event in a line, or None if the line is not ours; a line that is ours has to be right."""
    head = _HEAD.match(line)
    if not head:
        assert "qmail-smtpd[" not in line, f"not at the start of a line: {line!r}"
        return None
    assert head[2] in EVENTS, line
    fields, at = {}, head.end()
    while at < len(line):
        field = _FIELD.match(line, at)
        assert field, f"no field at {line[at:]!r} in {line!r}"
        assert field[1] not in fields, f"{field[1]} is there twice in {line!r}"
        fields[field[1]] = _unescape(field[2])
        at = field.end()
    return Event(int(head[1]), head[2], fields)


def _unescape(value):
    if not value.startswith('"'):
        return value
    return re.sub(r"\\x(..)", lambda escape: chr(int(escape[1], 16)), value[1:-1])


class Log:
    """Reads a descriptor to its end; it ends when the last process that could write to it has."""

    def __init__(self, stream):
        self._stream = stream
        self._lines = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._stream:
            with self._news:
                self._lines.append(line.rstrip(b"\n").decode("latin-1"))
                self._news.notify_all()

    def lines(self):
        """What there is by now."""
        with self._news:
            return list(self._lines)

    def text(self):
        """The same in one piece."""
        return "\n".join(self.lines())

    def wait_for(self, pattern, count=1):
        """The first `count` lines in which the pattern is found, as matches."""
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while len(found := self._search(pattern)) < count:
                if not self._news.wait(deadline - time.monotonic()):
                    break
        if len(found) < count:
            pytest.fail(f"{count} of {pattern!r} did not come, but:\n{self.text()}", pytrace=False)
        return found[:count]

    def _search(self, pattern):
        return [match for match in (re.search(pattern, line) for line in self._lines) if match]

    def wait_for_end(self, seconds):
        """Whether the end came."""
        self._reader.join(max(0, seconds))
        return not self._reader.is_alive()
