"""The client: what is said in the sessions that are measured."""

from __future__ import annotations

import base64
import socket
import ssl
import time
from collections.abc import Callable

SENDER, RECIPIENT = b"bench@example.com", b"bench@example.org"

HEADER = b"From: <%s>\r\nTo: <%s>\r\nSubject: bench\r\n\r\n" % (SENDER, RECIPIENT)
LINE = base64.b64encode(bytes(range(57))) + b"\r\n"
SHORT_LINES = b"..\r\na\r\n...\r\n..\r\n\r\n..b\r\n"
"""Lines of up to three octets, most of which begin with a dot that was doubled."""


class Client:
    """The client's end of a session; `waits` has how long it waited for what, in seconds."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._replies = connection.makefile("rb")
        self.waits: dict[str, float] = {}

    def say(self, text: bytes, code: int) -> None:
        """Send the text; raises RuntimeError unless a reply of this code comes."""
        self._connection.sendall(text)
        self.expect(code)

    def expect(self, code: int) -> None:
        """Read a reply; raises RuntimeError if it has another code, or none comes."""
        line = self._replies.readline()
        while line[3:4] == b"-":
            line = self._replies.readline()
        if line[:4] != b"%d " % code:
            raise RuntimeError(f"{line!r} instead of {code}")

    def hello(self) -> None:
        """Say EHLO."""
        self.say(b"EHLO bench.example.com\r\n", 250)

    def start_tls(self, distance: float = 0) -> None:
        """Make the handshake, without a look at who is there; `distance` is in seconds."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        start = time.perf_counter()
        self.say(b"STARTTLS\r\n", 220)
        self.waits["STARTTLS to 220"] = time.perf_counter() - start
        self._replies.close()
        time.sleep(distance)  # 220 on its way to the client, and the client's first message back
        start = time.perf_counter()
        self._connection = context.wrap_socket(self._connection)
        self.waits["then to the end of the handshake"] = time.perf_counter() - start
        self._replies = self._connection.makefile("rb")

    def authenticate(self) -> None:
        """Authenticate by PLAIN; the check program takes any password."""
        self.say(b"AUTH PLAIN " + base64.b64encode(b"\0bench\0secret") + b"\r\n", 235)

    def send(self, data: bytes) -> None:
        """Send a message; `data` has its transparency dots, and ends a line."""
        self.say(b"MAIL FROM:<%s>\r\n" % SENDER, 250)
        self.say(b"RCPT TO:<%s>\r\n" % RECIPIENT, 250)
        self.say(b"DATA\r\n", 354)
        self._connection.sendall(data)
        self.say(b".\r\n", 250)

    def quit(self) -> None:
        """End the session in order."""
        self.say(b"QUIT\r\n", 221)
        self._connection.close()


Dialogue = Callable[[Client], None]


def mail_data(lines: bytes, size: int) -> bytes:
    """Mail data of a header and these lines again and again, to about `size` octets."""
    return HEADER + lines * (size // len(lines))


def plain(client: Client) -> None:
    """Connect, EHLO, QUIT."""
    client.hello()


def tls(client: Client) -> None:
    """The same with STARTTLS."""
    client.hello()
    client.start_tls()
    client.hello()


def far_tls(client: Client) -> None:
    """The same with a client at a distance of 100 ms, there and back."""
    client.hello()
    client.start_tls(distance=0.1)
    client.hello()


def message(data: bytes) -> Dialogue:
    """A message in clear."""

    def dialogue(client: Client) -> None:
        client.hello()
        client.send(data)

    return dialogue


def message_over_tls(data: bytes) -> Dialogue:
    """A message over TLS."""

    def dialogue(client: Client) -> None:
        tls(client)
        client.send(data)

    return dialogue


def submission(data: bytes) -> Dialogue:
    """A message from a user who sends it over TLS and with AUTH."""

    def dialogue(client: Client) -> None:
        tls(client)
        client.authenticate()
        client.send(data)

    return dialogue
