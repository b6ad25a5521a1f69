"""What was delivered: the files of a Maildir as qmail-queue-maildir writes them."""

from __future__ import annotations

import re
from typing import NamedTuple

_FILE = re.compile(
    rb"Return-Path: <(?P<sender>.*)>\n"
    rb"(?P<recipients>(?:Envelope-To: .*\n)+)"
    rb"Received: \(qmail (?P<qp>\d+) invoked by uid (?P<uid>\d+)\); .*\n"
    rb"(?P<received>Received: from .*\n(?:  .*\n)+)"
)


class Delivery(NamedTuple):
    """A message with its envelope; `received` is qmail-smtpd's own field, `data` what was sent."""

    sender: str
    recipients: list[str]
    qp: int
    uid: int
    received: str
    data: bytes


def deliveries(maildir):
    """All that was delivered.  What is left in tmp was not, and must not be there."""
    assert not any((maildir / "tmp").glob("*"))
    return [_read(file.read_bytes()) for file in sorted((maildir / "new").glob("*"))]


def delivery(maildir):
    """The one message that was delivered."""
    (found,) = deliveries(maildir)
    return found


def _read(octets):
    head = _FILE.match(octets)
    assert head, octets[:1000]
    recipients = re.findall(r"Envelope-To: (.*)\n", head["recipients"].decode())
    received = " ".join(head["received"].decode().split())
    data = octets[head.end() :]
    return Delivery(
        head["sender"].decode(), recipients, int(head["qp"]), int(head["uid"]), received, data
    )
