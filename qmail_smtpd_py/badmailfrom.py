"""badmailfrom: senders that nothing is taken from, `user@host` or `@host` (qmail-smtpd(8))."""

from __future__ import annotations

from .control import read_list
from .path import domain_of


class BadMailFrom:
    """The list as it is when the session starts."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries = {entry.lower() for entry in read_list("badmailfrom") or ()}

    def blocks(self, sender: bytes) -> bool:
        """Whether the sender or its host is listed; case does not count, the empty sender never."""
        domain = domain_of(sender)
        host = b"" if domain is None else b"@" + domain.lower()
        return sender.lower() in self._entries or host in self._entries
