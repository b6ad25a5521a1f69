"""Log lines, read back: `qmail-smtpd[PID]: EVENT key=value key="quoted" ...`; see docs/log.md.

A value that is not plain stands in quotation marks, with `\\xHH` for what is not printable; a
line that is too long ends in `..."`.  What does not read back is an error: something of it could
have been put there by a client.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"qmail-smtpd\[(\d+)\]: ([a-z]+)")
_PLAIN = r"[a-zA-Z0-9.@%+/=:_\-<>\[\],!#&*~?]+"
_QUOTED = r'"(?:[ !#-\[\]-~]|\\x[0-9a-f]{2})*"'
_FIELD = re.compile(rf" ([a-z_]+)=({_PLAIN}|{_QUOTED})(?= |$)")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")
_CUT_OFF = '..."'
_LONGEST = 4000


class Line(NamedTuple):
    """One event: who wrote it, what it is, and its fields, an octet for each character."""

    pid: int
    event: str
    fields: dict[str, str]


def read(octets: bytes) -> Line:
    """A line without its line feed; raises ValueError where it is none."""
    text = octets.decode("ascii")
    head = _HEAD.match(text)
    if not head:
        raise ValueError(f"no log line: {text!r}")
    fields: dict[str, str] = {}
    at = head.end()
    while field := _FIELD.match(text, at):
        key, value = field.groups()
        if key in fields:
            raise ValueError(f"{key} stands there twice: {text!r}")
        fields[key] = _unquoted(value)
        at = field.end()
    if at < len(text) and not (len(text) > _LONGEST and text.endswith(_CUT_OFF)):
        raise ValueError(f"no field: {text[at:]!r}")
    return Line(int(head[1]), head[2], fields)


def read_all(octets: bytes) -> list[Line]:
    """All lines of a log."""
    if octets and not octets.endswith(b"\n"):
        raise ValueError(f"no end of the last line: {octets[-80:]!r}")
    return [read(line) for line in octets.split(b"\n")[:-1]]


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    return _ESCAPE.sub(lambda code: chr(int(code[1], 16)), value[1:-1])


@contextlib.contextmanager
def nobody_reads() -> Iterator[int]:
    """The descriptor of a log whose reader is stuck: a pipe that takes no more."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, bytes(4096)):
                pass
        os.set_blocking(writer, True)
        yield writer
