"""badmailfrom: senders that nothing is taken from, `user@host` or `@host` (qmail-smtpd(8))."""

from __future__ import annotations

from .control import entries
from .path import domain_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .control import ControlFiles


class BadMailFrom:
    """The list as it is when the session starts."""

    __slots__ = ("_entries",)

    def __init__(self, files: ControlFiles) -> None:
        self._entries = files.load("badmailfrom", _senders)

    def blocks(self, sender: bytes) -> bool:
        """Whether the sender or its host is listed; case does not count, the empty sender never."""
        domain = domain_of(sender)
        host = b"" if domain is None else b"@" + domain.lower()
        return sender.lower() in self._entries or host in self._entries


def _senders(text: bytes | None) -> frozenset[bytes]:
    return frozenset(sender.lower() for sender in entries(text) or ())
