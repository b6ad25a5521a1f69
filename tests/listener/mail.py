"""Pieces of a session, each of which must go as it does here."""

from __future__ import annotations

from conformance.client import Client

ENVELOPE = [b"MAIL FROM:<a@client.example.com>", b"RCPT TO:<user@example.org>", b"DATA"]
PLAIN = b"AUTH PLAIN AGpvZQBzZWNyZXQ="


def begin_message(client: Client) -> None:
    """The envelope of a message, up to where its data begin."""
    replies = [client.command(line) for line in ENVELOPE]
    assert replies == ["250 ok", "250 ok", "354 go ahead"]


def end_message(client: Client, text: bytes = b"Subject: x\r\n\r\ntext\r\n") -> None:
    """The data of a message, which must be accepted."""
    client.send(text + b".\r\n")
    reply = client.reply()
    assert reply and reply.startswith("250 ok "), reply


def send_message(client: Client, text: bytes = b"Subject: x\r\n\r\ntext\r\n") -> None:
    """A whole message, which must be accepted."""
    begin_message(client)
    end_message(client, text)


def authenticate(client: Client) -> None:
    """AUTH with what the check program accepts."""
    assert client.command(PLAIN) == "235 ok, go ahead (#2.0.0)"


def start_tls(client: Client, **how: object) -> None:
    """STARTTLS, with the options of Client.start_tls."""
    assert client.command(b"STARTTLS") == "220 ready for tls"
    assert client.start_tls(**how) == "ok"  # type: ignore[arg-type]


def quit_(client: Client) -> None:
    """QUIT, and the end of the connection."""
    assert client.command(b"QUIT") == "221 mx.example.org"
    assert client.read_to_end() == b""
    client.connection.close()
