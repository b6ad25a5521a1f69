"""A small world for the session: effects in memory, for tests that ask it thousands of questions.

Mail for here.example is taken, bad@example.com is blocked, and joe alone can authenticate; at a
recipient at broken.example a control file turns out unreadable; every third qmail-queue fails.
"""

from __future__ import annotations

from binascii import b2a_base64

from qmail_smtpd_py import log, reply, trace
from qmail_smtpd_py.connection import Connection, Settings
from qmail_smtpd_py.effects import ControlError, Delivery, Effects, Identity
from qmail_smtpd_py.sasl import Credentials
from qmail_smtpd_py.session import Session
from qmail_smtpd_py.settings import auth_policy

NOW = 1700000000
QUEUE_IS_FULL = reply.Reply(451, b"full (#4.3.0)")


class Queue(Delivery):
    """A qmail-queue: its message, and its envelope: None until it ended, empty if given up."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.message = b""
        self.envelope: bytes | None = None

    def write(self, data: bytes) -> None:
        assert self.envelope is None
        self.message += data

    def close(self, envelope: bytes) -> reply.Reply | None:
        assert self.envelope is None
        self.envelope = envelope
        return None if self.pid % 3 else QUEUE_IS_FULL

    def cancel(self) -> None:
        assert self.envelope is None
        self.envelope = b""


def all_replies(session: Session, data: bytes) -> bytes:
    """The replies to what a client sent that waits for all of them."""
    said = session.receive(data)
    while session.is_paused:
        said += session.receive(b"")
    return said


class World(Effects):
    """`queues`, `identities` and `lines` are what qmail-queue was given, as whom, and the log;
    `users` who had authenticated, and how.
    """

    def __init__(self) -> None:
        self.queues: list[Queue] = []
        self.identities: list[tuple[bytes | None, bytes | None]] = []
        self.users: list[tuple[bytes | None, bytes | None]] = []
        self.lines: list[bytes] = []

    def now(self) -> int:
        return NOW

    def date(self) -> bytes:
        return trace.date(NOW)

    def log(self, event: str, fields: dict[str, object]) -> None:
        self.lines.append(log.format_line(event, fields))

    def new_challenge(self) -> bytes:
        return b"<1.1700000000@here.example>"

    def authenticate(self, credentials: Credentials, identity: Identity) -> reply.Reply:
        return reply.AUTHENTICATED if credentials.user == b"joe" else reply.AUTH_FAILED

    def open_delivery(self, identity: Identity) -> Queue | None:
        self.queues.append(Queue(len(self.queues) + 1))
        self.identities.append((identity.relay_client, identity.remote_info))
        self.users.append((identity.user, identity.method))
        return self.queues[-1]

    def is_sender_blocked(self, sender: bytes) -> bool:
        return sender == b"bad@example.com"

    def is_recipient_allowed(self, recipient: bytes) -> bool:
        if recipient.endswith(b"@broken.example"):
            raise ControlError("cannot read control/morercpthosts.cdb: Input/output error (uid 0)")
        return recipient.endswith(b"@here.example")

    def localize(self, address: bytes) -> bytes:
        return address.replace(b"[127.0.0.1]", b"here.example")

    def offers_tls(self) -> bool:
        return True

    def prepare_tls(self) -> reply.Reply | None:
        return None

    def certified_client(self) -> tuple[bytes | None, bytes]:
        return None, b"certificate has expired"


def open_session(
    smtpauth: bytes | None = b"+cram",
    force_tls: bool = False,
    databytes: int = 0,
    **more: object,
) -> tuple[Session, World]:
    """A session in a world of its own; `more` are settings."""
    world = World()
    connection = Connection({b"TCPREMOTEIP": b"192.0.2.1", b"TCPLOCALHOST": b"here.example"})
    policy = auth_policy(smtpauth)
    settings = Settings(b"here.example", databytes, policy, True, force_tls, **more)
    return Session(connection, settings, world), world


def base64(octets: bytes) -> bytes:
    return b2a_base64(octets, newline=False)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, cut at these places, which may be any numbers."""
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)])]
