"""Messages to send, and who sends them."""

from __future__ import annotations

import os
from typing import NamedTuple

HELO = "client.example.net"
SENDER = "sender@example.net"
RECIPIENT = "friend@example.org"

USER = "alice@example.org"
PASSWORD = 'wr3n "and" 100% =owl'
NO_CRAM_USER = "bob"
"""A user for whom no CRAM-MD5 secret is kept; the password is the same."""

OCTETS = bytes(octet for octet in range(256) if octet not in b"\r\n")


class Letter(NamedTuple):
    """A message: the file that a client reads, and what it reads there, with CR LF at line ends."""

    path: os.PathLike
    sent: bytes

    @property
    def delivered(self):
        """What qmail-queue has to get."""
        return self.sent.replace(b"\r\n", b"\n")


def write_letter(path, text):
    """A message in a file."""
    path.write_bytes(text)
    return Letter(path, text)


def odd_letter(path):
    """One with every octet, dots in the first column, and a line that is longer than most.

    Its header is complete, or msmtp would add to it.
    """
    lines = [
        b"From: <sender@example.net>",
        b"Date: Thu, 01 Jan 2026 00:00:00 +0000",
        b"Message-ID: <1@example.net>",
        b"Subject: every octet",
        b"",
        b".",
        b"..two",
        b".one and " + OCTETS,
        b"long " + b"x" * 70000,
        b"",
        b".",
    ]
    return write_letter(path, b"\r\n".join(lines) + b"\r\n")
