"""Sessions of all kinds, as a listener meets them: in order, cut off, and plain nonsense.

A client runs a batch of them, one after the other, chosen at random from a seed, and tells what
became of them in an Outcome.  Each message has a name, its sender, that no other message has, and a
body that differs from all others': what a queue got can be held against what was sent.
"""

from __future__ import annotations

import base64
import collections
import functools
import random
import socket
import ssl
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

PATIENCE = 60.0
"""Seconds without an answer after which a client calls a session stuck."""

BATCH = 50
"""Sessions in a batch."""

RECIPIENT = b"soak@example.org"
_LINE = base64.b64encode(bytes(range(57))) + b"\n..\n.dot\n"
_LARGE = 300_000  # octets


class Lost(Exception):
    """The connection ended where it should not have."""


class Wrong(Exception):
    """The server answered what it should not have."""


class Message(NamedTuple):
    """A message, as it stands in the queue."""

    name: str
    length: int
    sum: int


class Outcome:
    """What became of sessions; messages are acknowledged (250 was seen), open (neither 250 nor an
    end that would exclude it) or cut off by the client.
    """

    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.acknowledged: list[Message] = []
        self.open: list[Message] = []
        self.cut_off: list[Message] = []
        self.refused = self.lost = self.resumed = 0
        self.wrong: list[str] = []

    def add(self, other: Outcome) -> None:
        """Take in another."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Client:
    """The client of one session."""

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext, outcome: Outcome) -> None:
        self.outcome = outcome
        self._tls = tls
        self.connection = socket.create_connection(address, PATIENCE)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self.connection.makefile("rb")

    def close(self) -> None:
        """Hang up."""
        self._replies.close()
        self.connection.close()

    def expect(self, *codes: int) -> None:
        """Read replies, of these codes; raises Lost or Wrong."""
        for code in codes:
            line = self._replies.readline()
            while line[3:4] == b"-":
                line = self._replies.readline()
            if not line.endswith(b"\n"):
                raise Lost
            if line[:4] != b"%d " % code:
                raise Wrong(f"{line!r} instead of {code}")

    def say(self, text: bytes, *codes: int) -> None:
        """Send text, and read the replies to it."""
        self.connection.sendall(text)
        self.expect(*codes)

    def greet(self) -> None:
        """Take the greeting, and say EHLO."""
        self.expect(220)
        self.say(b"EHLO soak.example.com\r\n", 250)

    def start_tls(self) -> None:
        """STARTTLS, with the session of an earlier connection, if there is one."""
        self.say(b"STARTTLS\r\n", 220)
        self._replies.close()
        wrapped = self._tls.wrap_socket(self.connection, session=_sessions.get(self._tls))
        self.connection = wrapped
        self._replies = wrapped.makefile("rb")
        self.say(b"EHLO soak.example.com\r\n", 250)
        self.outcome.resumed += bool(wrapped.session_reused)
        _sessions[self._tls] = wrapped.session

    def send(self, name: str, size: int) -> None:
        """Send a message, and note what became of it."""
        message, data = compose(name, size)
        self._envelope(name)
        self.outcome.open.append(message)
        self.say(data + b".\r\n", 250)
        self.outcome.acknowledged.append(self.outcome.open.pop())

    def break_off(self, name: str, size: int) -> None:
        """Send half of a message."""
        message, data = compose(name, size)
        self._envelope(name)
        self.outcome.cut_off.append(message)
        self.connection.sendall(data[: len(data) // 2])

    def _envelope(self, name: str) -> None:
        text = b"MAIL FROM:<%s>\r\nRCPT TO:<%s>\r\nDATA\r\n" % (name.encode(), RECIPIENT)
        self.say(text, 250, 250, 354)

    def quit(self) -> None:
        """End the session in order; raises Wrong where more comes than the reply to QUIT."""
        self.say(b"QUIT\r\n", 221)
        if self._replies.read(1):
            raise Wrong("more behind the reply to QUIT")


_sessions: dict[ssl.SSLContext, ssl.SSLSession | None] = {}  # to be resumed


def compose(name: str, size: int) -> tuple[Message, bytes]:
    """A message of about so many octets, and how it is sent, but for the dot that ends it."""
    text = b"Subject: %s\n\n" % name.encode() + _LINE * (size // len(_LINE))
    data = text.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")
    return Message(name, len(text), zlib.adler32(text)), data


# The kinds of sessions


def plain(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """Connect, EHLO, QUIT."""
    client.greet()
    client.quit()


def tls(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """The same with STARTTLS."""
    client.greet()
    client.start_tls()
    client.quit()


def message(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """One message, or three."""
    client.greet()
    for _ in range(chance.choice((1, 1, 3))):
        client.send(next(names), chance.randrange(4000))
    client.quit()


def large_message(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """A large message, in clear or over TLS."""
    client.greet()
    if chance.random() < 0.5:
        client.start_tls()
    client.send(next(names), chance.randrange(_LARGE))
    client.quit()


def submission(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """A message from a user, over TLS and with AUTH."""
    client.greet()
    client.start_tls()
    client.say(b"AUTH PLAIN " + base64.b64encode(b"\0soak\0secret") + b"\r\n", 235)
    client.send(next(names), chance.randrange(4000))
    client.quit()


def cut_off_message(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """Hang up in the middle of a message."""
    client.greet()
    if chance.random() < 0.3:
        client.start_tls()
    client.break_off(next(names), chance.choice((2000, _LARGE)))


def refused_authentication(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """AUTH in clear, while FORCETLS is in force."""
    client.greet()
    client.say(b"AUTH PLAIN AHNvYWsAc2VjcmV0\r\n", 538)


def garbage(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """No SMTP at all."""
    client.expect(220)
    client.connection.sendall(bytes(chance.randrange(256) for _ in range(chance.randrange(600))))


def garbage_for_tls(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """No TLS behind STARTTLS."""
    client.greet()
    client.say(b"STARTTLS\r\n", 220)
    client.connection.sendall(bytes(chance.randrange(256) for _ in range(chance.randrange(600))))


def hang_up(client: Client, chance: random.Random, names: Iterator[str]) -> None:
    """Say nothing at all."""


Kind = Callable[[Client, random.Random, Iterator[str]], None]

KINDS: dict[Kind, int] = {
    plain: 20,
    tls: 15,
    message: 20,
    large_message: 4,
    submission: 20,
    cut_off_message: 8,
    refused_authentication: 3,
    garbage: 4,
    garbage_for_tls: 3,
    hang_up: 3,
}
"""How often each kind comes, in a hundred."""


@functools.cache
def _client_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def run_batch(address: tuple[str, int], seed: int, number: int) -> Outcome:
    """Run a batch of sessions; the same seed and number make the same sessions."""
    chance = random.Random(f"{seed} {number}")
    outcome = Outcome()
    names = (f"{number}-{count}@soak.example.com" for count in range(10**9))
    for kind in chance.choices(list(KINDS), list(KINDS.values()), k=BATCH):
        outcome.kinds[kind.__name__] += 1
        _run(kind, address, outcome, chance, names)
    return outcome


def _run(
    kind: Kind,
    address: tuple[str, int],
    outcome: Outcome,
    chance: random.Random,
    names: Iterator[str],
) -> None:
    client = None
    try:
        client = Client(address, _client_tls(), outcome)
        kind(client, chance, names)
    except ConnectionRefusedError:
        outcome.refused += 1
    except (Lost, ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        # The last is an end in the middle of a handshake: Python has OpenSSL not tell it from an
        # orderly one (OP_IGNORE_UNEXPECTED_EOF).
        outcome.lost += 1
    except (Wrong, OSError) as error:
        outcome.wrong.append(f"{kind.__name__}: {error}")
    finally:
        if client:
            client.close()
