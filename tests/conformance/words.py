"""What varies from run to run, checked and replaced by a word, so that all else can be compared.

    TIME, PID      in `250 ok TIME qp PID`: a time of the run, and the process id of a qmail-queue
    DATE           of the Received field: a time of the run, as RFC 5322 section 3.3 has it, in UTC
    CIPHER         in the Received field: the one in use
    <CHALLENGE@..> a CRAM-MD5 challenge with the local host's name
    <DIGEST>       the response to one
    REASON         words of OpenSSL or of the operating system
    HELP           the text of 214

What fails its check is left as it is, and so shows as a difference.
"""

from __future__ import annotations

import binascii
import calendar
import hmac
import re
import time
from collections.abc import Collection
from typing import Callable

SLACK = 2
"""Seconds by which two looks at the clock may differ."""

_RECEIVED = re.compile(r"(Received: from [^;]*; )([^\n]*)(\n)")
_DATE = re.compile(r"([1-9]|[12]\d|3[01]) [A-Z][a-z][a-z] \d{4} \d\d:\d\d:\d\d -0000")


class Words:
    """The words of one dialogue.

    `local` is the local host as the program knows it, `began` when the dialogue did; `queued_by`
    tells the process ids that qmail-queue had so far.
    """

    def __init__(
        self, env: dict[str, str], began: float, queued_by: Callable[[], Collection[int]]
    ) -> None:
        self._local = env.get("TCPLOCALHOST", env.get("TCPLOCALIP", "unknown"))
        self._began = began
        self._queued_by = queued_by
        self._challenges: list[bytes] = []
        self._digests: list[bytes] = []

    def in_reply(self, reply: str) -> str:
        """A reply, with words in it."""
        accepted = re.fullmatch(r"250 ok (\d+) qp (\d+)", reply)
        if accepted and self._is_now(int(accepted[1])) and int(accepted[2]) in self._queued_by():
            return "250 ok TIME qp PID"
        challenge = self._challenge_in(reply)
        if challenge:
            self._challenges.append(challenge)
            return f"334 {self._challenge_word}"
        reply = re.sub(r"^(454 TLS [^:]+: ).+( \(#4\.3\.0\))$", r"\1REASON\2", reply)
        reply = re.sub(r"(; no valid cert for gatewaying): .+( \(#5\.7\.1\))$", r"\1\2", reply)
        return re.sub(r"^214 .+", "214 HELP", reply)

    def in_message(self, message: bytes, cipher: str | None) -> bytes:
        """A message, with words in the Received field at its head."""
        text = message.decode("latin-1")
        received = _RECEIVED.match(text)
        if not received:
            return message
        head, date, end = received.groups()
        if self._is_date(date):
            date = "DATE"
        if cipher:
            head = head.replace(f"({cipher} encrypted", "(CIPHER encrypted")
        return (head + date + end + text[received.end() :]).encode("latin-1")

    def in_credentials(self, fd3: bytes) -> bytes:
        """What checkpassword was given, with words in it."""
        for challenge in self._challenges:
            fd3 = fd3.replace(challenge, self._challenge_word.encode())
        for digest in self._digests:
            fd3 = fd3.replace(digest, b"<DIGEST>")
        return fd3

    def answer(self, user: str, password: str) -> bytes:
        """The line that answers the last CRAM-MD5 challenge (RFC 2195)."""
        digest = hmac.new(password.encode("latin-1"), self._challenges[-1], "md5").hexdigest()
        self._digests.append(digest.encode())
        return binascii.b2a_base64(f"{user} {digest}".encode("latin-1"), newline=False) + b"\r\n"

    @property
    def _challenge_word(self) -> str:
        return f"<CHALLENGE@{self._local}>"

    def _challenge_in(self, reply: str) -> bytes | None:
        if not reply.startswith("334 "):
            return None
        try:
            challenge = binascii.a2b_base64(reply[4:])
        except binascii.Error:
            return None
        host = re.escape(self._local.encode("latin-1"))
        return challenge if re.fullmatch(rb"<[^\s<>@]+@" + host + rb">", challenge) else None

    def _is_date(self, text: str) -> bool:
        if not _DATE.fullmatch(text):
            return False
        return self._is_now(calendar.timegm(time.strptime(text, "%d %b %Y %H:%M:%S -0000")))

    def _is_now(self, stamp: float) -> bool:
        return self._began - SLACK <= stamp <= time.time() + SLACK
