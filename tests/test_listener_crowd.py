"""Many clients at a time: each has a state of its own, and none is another's trouble."""

from __future__ import annotations

import random
import time

import pytest
from conformance.client import Client
from conformance.stage import Stage
from listener.listening import Listening
from listener.mail import ENVELOPE, end_message, quit_, send_message, start_tls

pytestmark = pytest.mark.tls
pytest_plugins = ["listener.fixtures"]


class Sender:
    """A client that knows what it must be answered, by what it has said so far."""

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.number = number
        self.queued: list[tuple[bytes, bytes]] = []
        self._envelope: list[bytes] = []

    def step(self, chance: random.Random) -> None:
        """Do something, which must be answered as this client's state asks."""
        step = chance.choice(["mail", "recipient", "recipient", "data", "data", "reset"])
        getattr(self, step)()

    def mail(self) -> None:
        sender = b"sender%d@client.example.com" % self.number
        assert self.client.command(b"MAIL FROM:<%s>" % sender) == "250 ok"
        self._envelope = [b"F%s\0" % sender]

    def recipient(self) -> None:
        recipient = b"user%d@example.org" % self.number
        reply = self.client.command(b"RCPT TO:<%s>" % recipient)
        assert reply == ("250 ok" if self._envelope else "503 MAIL first (#5.5.1)")
        if self._envelope:
            self._envelope.append(b"T%s\0" % recipient)

    def data(self) -> None:
        expected = ["503 MAIL first (#5.5.1)", "503 RCPT first (#5.5.1)", "354 go ahead"]
        assert self.client.command(b"DATA") == expected[min(2, len(self._envelope))]
        if len(self._envelope) > 1:
            text = b"Subject: %d of %d" % (len(self.queued), self.number)
            end_message(self.client, text + b"\r\n")
            self.queued.append((b"".join(self._envelope) + b"\0", text))
            self._envelope = []

    def reset(self) -> None:
        assert self.client.command(b"RSET") == "250 flushed"
        self._envelope = []


def test_each_has_a_state_of_its_own(mx: Stage) -> None:
    chance = random.Random(0)
    with Listening(mx, "-c", "20", "--idle=2") as listener:
        senders = []
        for number in range(20):
            client = listener.greeted()
            if number % 4 == 0:
                start_tls(client)
            senders.append(Sender(client, number))
        for _ in range(900):
            chance.choice(senders).step(chance)
        for sender in senders:
            assert sender.client.received == b"", "nothing came that was another's"
            quit_(sender.client)
        assert [status for _, status in listener.ends(20)] == [0] * 20
    expected = [message for sender in senders for message in sender.queued]
    found = [
        (delivery.read[1], delivery.read[0].splitlines()[-1]) for delivery in mx.deliveries()
    ]
    assert sorted(found) == sorted(expected)
    assert len(expected) > 20


def abuse(listener: Listening, how: int, chance: random.Random) -> None:
    """A connection that no honest client would make."""
    client = listener.connect()
    if how == 0:
        client.push(chance.randbytes(3000))
    elif how == 1:
        client.send(b"STARTTLS\r\n")
        client.push(chance.randbytes(400))
    elif how == 2:
        client.send(b"\r\n".join(ENVELOPE) + b"\r\nhalf")
    elif how == 3:
        client.push(b"NOOP\r\n" * 5000)
    elif how == 4:
        client.send(b"STARTTLS\r\n")
        client.reply()
        client.reply()
        client.start_tls(instead="\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", close=True)
    client.connection.close()


def test_the_service_is_as_good_as_before(mx: Stage) -> None:
    """After hundreds of bad connections, and with some that do nothing at all."""
    chance = random.Random(0)
    mx.control({"timeoutsmtpd": "20\n"})
    with Listening(mx, "-c", "12") as listener:
        silent = [listener.socket() for _ in range(4)]
        for number in range(250):
            abuse(listener, number % 6, chance)
        for _ in range(3):
            began = time.monotonic()
            client = listener.greeted()
            start_tls(client)
            send_message(client)
            quit_(client)
            assert time.monotonic() - began < 5
        for connection in silent:
            connection.close()
        listener.ends(250 + 3 + 4)
        assert "warning" not in listener.log.text(), "no worker died of it"
        assert len(listener.workers) <= 12
