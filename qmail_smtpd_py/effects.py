"""What a session asks of the world: the only way in which it can touch anything.

The session computes; whoever runs it implements `Effects` and hands it in.  Outcomes come back as
values, and every outcome that has a reply of its own is mapped to it by a table beside its cause.
The one exception that may pass through a session is ControlError.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .reply import Reply
    from .sasl import Credentials


class ControlError(Exception):
    """A control file is there but can not be used; the text names the file, the user id and why."""


class Identity:
    """Who the client is by now, for children: RELAYCLIENT and TCPREMOTEINFO, and the user who has
    authenticated with the method; None for unset.
    """

    __slots__ = ("method", "relay_client", "remote_info", "user")

    def __init__(
        self,
        relay_client: bytes | None,
        remote_info: bytes | None,
        user: bytes | None = None,
        method: bytes | None = None,
    ) -> None:
        self.relay_client = relay_client
        self.remote_info = remote_info
        self.user = user
        self.method = method


class Delivery:
    """One run of qmail-queue."""

    pid: int

    def write(self, data: bytes) -> None:
        """Pass on a piece of the message; trouble is told by `close`."""
        raise NotImplementedError

    def close(self, envelope: bytes) -> Reply | None:
        """End the message and wait: None if it is queued, otherwise the reply that says why not."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Give up: qmail-queue gets an envelope that it will refuse."""
        raise NotImplementedError


class Effects:
    """What a session may do."""

    def now(self) -> int:
        """The time in seconds since 1970."""
        raise NotImplementedError

    def date(self) -> bytes:
        """The same as header fields have it (RFC 5322 section 3.3)."""
        raise NotImplementedError

    def log(self, event: str, fields: Mapping[str, object]) -> None:
        """Write a line to the log; a field that is None is left out."""
        raise NotImplementedError

    def new_challenge(self) -> bytes:
        """A CRAM-MD5 challenge that was never there before (RFC 2195 section 2)."""
        raise NotImplementedError

    def authenticate(self, credentials: Credentials, identity: Identity) -> Reply:
        """Ask the check program; the reply is AUTHENTICATED only if it said yes."""
        raise NotImplementedError

    def open_delivery(self, identity: Identity) -> Delivery | None:
        """Start qmail-queue; None where there are no descriptors or processes for it."""
        raise NotImplementedError

    def is_sender_blocked(self, sender: bytes) -> bool:
        """Whether badmailfrom lists the sender or its host."""
        raise NotImplementedError

    def is_recipient_allowed(self, recipient: bytes) -> bool:
        """Whether rcpthosts or morercpthosts.cdb has the domain; raises ControlError."""
        raise NotImplementedError

    def localize(self, address: bytes) -> bytes:
        """The address, with localiphost for its domain where that is one of our IP addresses."""
        raise NotImplementedError

    def offers_tls(self) -> bool:
        """Whether EHLO may name STARTTLS."""
        raise NotImplementedError

    def prepare_tls(self) -> Reply | None:
        """Make sure that a handshake can begin: None if so; raises ControlError."""
        raise NotImplementedError

    def certified_client(self) -> tuple[bytes | None, bytes]:
        """The address in a client certificate that control/tlsclients lists, or None and why not;
        raises ControlError.
        """
        raise NotImplementedError
