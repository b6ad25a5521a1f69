"""The client's end of a dialogue: octets out, replies in, in clear or under TLS."""

from __future__ import annotations

import contextlib
import re
import ssl
import time

from .cases import FIXTURES, octets
from .transport import Connection

PATIENCE = 20.0
"""Seconds to wait for whatever must come."""

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Client:
    """A client over one connection.

    `received` is what came and is no reply yet; `ended` tells that no more can come, `close_notify`
    that TLS was ended as it should be.
    """

    def __init__(self, connection: Connection, patience: float = PATIENCE) -> None:
        self.connection = connection
        self.patience = patience
        self.received = b""
        self.ended = False
        self._tls: Tls | None = None
        self._unsent = b""

    @property
    def close_notify(self) -> bool:
        return self._tls is not None and self._tls.close_notify

    @property
    def cipher(self) -> str | None:
        """The cipher in use, None in clear."""
        return self._tls.cipher if self._tls else None

    @property
    def has_ticket(self) -> bool:
        """Whether the server gave a ticket by which the session could be resumed; there is TLS."""
        assert self._tls
        return self._tls.has_ticket

    @property
    def certificate(self) -> bytes:
        """The server's certificate, in DER; there is TLS."""
        assert self._tls
        return self._tls.certificate

    # Octets

    def send(self, *writes: bytes) -> None:
        """Write the octets, each piece when the one before it was read."""
        for octets_ in writes:
            self.settle()
            self._transmit(self.encrypt(octets_))

    def encrypt(self, data: bytes) -> bytes:
        """The octets as they go over the connection."""
        return self._tls.encrypt(data) if self._tls else data

    def push(self, *data: bytes) -> int:
        """Write as much as goes without waiting, and read nothing; how many octets did not go.

        These go first the next time.
        """
        for octets_ in data:
            self._unsent += self.encrypt(octets_)
        self._unsent = self._unsent[self.connection.write(self._unsent) :]
        return len(self._unsent)

    def settle(self) -> None:
        """Wait until the server has read all that was sent."""
        deadline = self._deadline()
        while not self.ended and self.connection.unread():
            assert time.monotonic() < deadline, "the server does not read"
            self._take(time.monotonic() + 0.0005)

    def read_to_end(self) -> bytes:
        """Read until the server ends the stream; all that no reply has taken."""
        deadline = self._deadline()
        while not self.ended:
            assert self._take(deadline), "the server does not end the stream"
        return self.received

    def close(self, how: str = "both") -> None:
        """End our stream, `write`, or close the connection, `both`; TLS is ended before."""
        self.settle()
        if self._tls:
            self._transmit(self._tls.close())
        if how == "write":
            self.connection.end_writing()
        else:
            self.ended = True
            self.connection.close()

    def _transmit(self, data: bytes) -> None:
        """Write all of it, and take in what comes meanwhile, or both sides could wait for ever."""
        deadline = self._deadline()
        while data:
            self.connection.wait(deadline, reading=not self.ended, writing=True)
            self._take(0)
            data = data[self.connection.write(data) :]

    def _take(self, deadline: float) -> bool:
        """Add to `received` what comes next; False if nothing came by the deadline."""
        if self.ended:
            return False
        try:
            data = self.connection.read(deadline)
        except TimeoutError:
            return False
        self.ended = not data
        self.received += self._tls.decrypt(data) if self._tls else data
        return True

    def _deadline(self) -> float:
        return time.monotonic() + self.patience

    # Replies

    def reply(self) -> str | None:
        """The next reply, its lines parted by LF; None if the stream or our patience ends first."""
        deadline = self._deadline()
        while not (whole := _REPLY.match(self.received)):
            if not self._take(deadline):
                return None
        self.received = self.received[whole.end() :]
        return whole[0][:-2].replace(b"\r\n", b"\n").decode("latin-1")

    def command(self, line: bytes) -> str | None:
        """The reply to a command line."""
        self.send(line + b"\r\n")
        return self.reply()

    # TLS

    def start_tls(
        self,
        *,
        min: str | None = None,
        max: str | None = None,
        sni: str | None = None,
        cert: str | None = None,
        ciphers: str | None = None,
        verify: bool = False,
        instead: str | list | None = None,
        close: bool = False,
    ) -> str:
        """Make a handshake: `ok`, or `fail` and what was then said in clear, if anything.

        The options are those of `starttls` in a case.
        """
        self.settle()
        if instead is not None:
            self._transmit(octets(instead))
            if close:
                self.connection.end_writing()
            return self._failure(b"")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
        if min:
            context.minimum_version = _VERSIONS[min]
        if max:
            context.maximum_version = _VERSIONS[max]
        if ciphers:
            context.set_ciphers(ciphers)
        if cert:
            context.load_cert_chain(FIXTURES / cert)
        return self.handshake(context, sni)

    def handshake(self, context: ssl.SSLContext, sni: str | None = None) -> str:
        """Make a handshake with a context of the caller's; as `start_tls`."""
        tls = Tls(context, sni)
        deadline = self._deadline()
        seen, self.received = self.received, b""
        tls.feed(seen)
        while True:
            done = tls.handshake()
            self._transmit(tls.pending())
            if done:
                self._tls = tls
                self.received = tls.decrypt(b"")
                return "ok"
            if tls.failed:
                return self._failure(seen)
            if not self._take(deadline):
                return "no end of the handshake"
            seen += self.received
            tls.feed(self.received)
            self.received = b""
            if self.ended:
                tls.end()

    def _failure(self, seen: bytes) -> str:
        """Read to the end, and tell octets in clear from TLS records."""
        seen += self.read_to_end()
        self.received = b""
        while len(seen) >= 5 and seen[0] in range(20, 24) and seen[1] == 3:
            seen = seen[5 + int.from_bytes(seen[3:5], "big") :]
        return f"fail, and in clear {seen!r}" if seen else "fail"


_REPLY = re.compile(rb"(?:\d\d\d-[^\n]*\r\n)*(?:(?!\d\d\d-)[^\n]*\r\n)")
"""A reply as it comes: lines that say that more follow, and one that does not."""


class Tls:
    """The client's side of TLS, on octets in memory."""

    def __init__(self, context: ssl.SSLContext, sni: str | None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=sni)
        self.failed = False
        self.close_notify = False

    @property
    def cipher(self) -> str:
        chosen = self._tls.cipher()
        assert chosen
        return chosen[0]

    @property
    def has_ticket(self) -> bool:
        session = self._tls.session
        return session is not None and session.has_ticket

    @property
    def certificate(self) -> bytes:
        return self._tls.getpeercert(binary_form=True)

    def feed(self, data: bytes) -> None:
        self._in.write(data)

    def end(self) -> None:
        self._in.write_eof()

    def pending(self) -> bytes:
        return self._out.read()

    def handshake(self) -> bool:
        """Go on with the handshake; whether it is complete.  `failed` says that it can not be."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            self.failed = True
            return False
        return True

    def encrypt(self, data: bytes) -> bytes:
        with contextlib.suppress(ssl.SSLError):  # the server has ended TLS: that shows in replies
            self._tls.write(data)
        return self.pending()

    def decrypt(self, data: bytes) -> bytes:
        if data:
            self.feed(data)
        plain = b""
        try:
            while piece := self._tls.read(1 << 16):
                plain += piece
            self.close_notify = True
        except ssl.SSLZeroReturnError:
            self.close_notify = True
        except ssl.SSLError:
            pass  # more is to come
        return plain

    def close(self) -> bytes:
        """The words that end our side."""
        with contextlib.suppress(ssl.SSLError):  # it waits for the server's words
            self._tls.unwrap()
        return self.pending()
