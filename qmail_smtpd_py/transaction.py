"""The mail transaction: an envelope as it grows, and the message that follows it."""

from __future__ import annotations

from . import maildata  # not a name of it: see Program.late in launcher.py

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .effects import Delivery
    from .reply import Reply

MAX_HOPS = 100
"""Received and Delivered lines from which on a message is looping, as in qmail-smtpd."""

RECIPIENTS_LIMIT = 1 << 20
"""Octets that the recipients of a message may take in its envelope, two of them for each beside its
address: an empty one counts too.
"""


class Transaction:
    """A mail transaction (RFC 5321 section 3.3) up to DATA.

    `blocked` tells that badmailfrom has the sender; qmail lets it pass MAIL and refuses each RCPT.
    `most` is how many recipients there may be, 0 for no limit; `count` is how many there are.  They
    are kept as octets of the envelope: an object for each would be many times larger than a short
    address.
    """

    __slots__ = ("_most", "_recipients", "blocked", "count", "sender")

    def __init__(self, sender: bytes, blocked: bool, most: int = 0) -> None:
        self.sender = sender
        self.blocked = blocked
        self.count = 0
        self._most = most
        self._recipients = bytearray()

    def add(self, recipient: bytes) -> bool:
        """Add a recipient; False if they are too many."""
        entry = b"T%s\0" % recipient
        if len(self._recipients) + len(entry) > RECIPIENTS_LIMIT or 0 < self._most <= self.count:
            return False
        self._recipients += entry
        self.count += 1
        return True

    @property
    def recipients(self) -> bytes:
        """The recipients, parted by commas."""
        return bytes(self._recipients[1:-1].replace(b"\0T", b","))

    def envelope(self) -> bytes:
        """The envelope as qmail-queue reads it from descriptor 1 (qmail-queue(8))."""
        return b"F%s\0%s\0" % (self.sender, self._recipients)


class Message:
    """The mail data of a transaction on its way to qmail-queue.

    `databytes` is the largest size in octets, 0 for no limit.
    """

    __slots__ = ("_databytes", "data", "delivery", "transaction")

    def __init__(self, transaction: Transaction, delivery: Delivery, databytes: int) -> None:
        self.transaction = transaction
        self.delivery = delivery
        self.data = maildata.MailData()
        self._databytes = databytes

    @property
    def is_too_big(self) -> bool:
        """Whether what came so far is more than databytes; the Received field does not count."""
        return 0 < self._databytes < self.data.size

    @property
    def is_looping(self) -> bool:
        """Whether the header tells of too many hops (RFC 5321 section 6.3)."""
        return self.data.hops >= MAX_HOPS

    def facts(self, user: bytes | None, result: str, answer: Reply | None) -> dict[str, object]:
        """What the log tells of it: who sent it, and what became of it, with the reply if any."""
        refused = answer is not None and answer.code != 250
        return {
            "result": result,
            "code": answer.code if answer else None,
            "why": answer.lines[0] if answer and refused else None,
            "size": self.data.size,
            "qp": self.delivery.pid,
            "user": user,
            "from": self.transaction.sender,
            "to": self.transaction.recipients,
        }
