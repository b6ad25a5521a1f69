"""A session that can be looked into: what was said, without what nobody may see.

`WatchedSession` is a Session that writes down what it reads and replies, as it understands it:
whole lines, after they came through TLS, each with what it was taken for.  That is how it can leave
secrets out, however they were cut into pieces or pipelined:

    AUTH                 its mechanism, and how many octets stood behind it
    a response           how many octets
    334                  how many octets
    other commands       their verb, and of HELO, EHLO, MAIL and RCPT the arguments too; what other
                         servers have for commands is shown as such
    what is no command   how many octets: a client may say a password at the wrong time
    a message            how many octets
"""

from __future__ import annotations

from . import reply, sasl
from .lines import LineTooLong, Unread
from .reply import Reply
from .session import AUTH_RESPONSE, COMMAND, VERBS, Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .connection import Connection, Settings
    from .effects import Effects
    from .transaction import Message

CLIENT, SERVER, NOTE = "client", "server", "note"
"""Who says something; a note is what we say of it."""

_SHOWN_WHOLE = (b"HELO", b"EHLO", b"MAIL", b"RCPT")
_ELSEWHERE = (
    *(b"ATRN", b"BDAT", b"BURL", b"ETRN", b"EXPN", b"LHLO", b"PASS", b"SAML"),
    *(b"SEND", b"SOML", b"TURN", b"USER", b"XCLIENT", b"XFORWARD"),
)
"""Commands that others have and we do not."""


class Transcript:
    """Where it is written down; trouble with that is no concern of the session's."""

    def write(self, who: str, text: bytes) -> None:
        """Write a line; the text has whatever octets the client sent."""
        raise NotImplementedError

    def close(self) -> None:
        """The session is over; it may be told more than once."""
        raise NotImplementedError


class WatchedSession(Session):
    """A session that writes down what is said."""

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        effects: Effects,
        transcript: Transcript,
    ) -> None:
        super().__init__(connection, settings, effects)
        self._transcript = transcript
        self._unread = _WatchedUnread(self)

    def line_came(self, line: bytes | None) -> None:
        """A line is about to be read, None for one that is too long."""
        if line is None:
            self._transcript.write(NOTE, b"a line that is too long")
        elif self.state == AUTH_RESPONSE:
            self._transcript.write(CLIENT, line if line == b"*" else _count(line))
        else:
            self._transcript.write(CLIENT, show_command(line))

    def rest_came(self, octets: bytes) -> None:
        """Octets are about to be taken that are no line."""
        if self.state == COMMAND:
            self._transcript.write(NOTE, b"another protocol: " + _count(octets))

    def greet(self) -> bytes:
        greeting = super().greet()
        self._transcript.write(SERVER, greeting[:-2])
        return greeting

    def tls_started(self, cipher: bytes) -> None:
        self._transcript.write(NOTE, b"TLS: " + cipher)
        super().tls_started(cipher)

    def time_out(self, answer: Reply = reply.TIMEOUT) -> bytes:
        octets = super().time_out(answer)
        self._show(answer)
        return octets

    def connection_lost(self) -> None:
        super().connection_lost()
        self._transcript.close()
        self._unread = Unread()  # the other one leads back to us: a circle

    def _reply(self, answer: Reply) -> None:
        self._show(answer)
        super()._reply(answer)

    def _show(self, answer: Reply) -> None:
        if answer.code == 334:
            self._transcript.write(SERVER, b"334 " + _count(answer.lines[0]))
            return
        for line in answer.render().split(b"\r\n")[:-1]:
            self._transcript.write(SERVER, line)

    def _log_mail(self, message: Message, result: str, answer: Reply | None = None) -> None:
        self._transcript.write(CLIENT, b"(a message, %d octets)" % message.data.size)
        super()._log_mail(message, result, answer)


class _WatchedUnread(Unread):
    """Unread octets that tell the session when they are read."""

    __slots__ = ("_session",)

    def __init__(self, session: WatchedSession) -> None:
        super().__init__()
        self._session = session

    def line(self, limit: int) -> bytes | None:
        try:
            line = super().line(limit)
        except LineTooLong:
            self._session.line_came(None)
            raise
        if line is not None:
            self._session.line_came(line)
        return line

    def take(self) -> bytes:
        octets = super().take()
        self._session.rest_came(octets)
        return octets


def show_command(line: bytes) -> bytes:
    """A command line without its secrets."""
    verb = line.partition(b"\0")[0].partition(b" ")[0].upper()  # as the session reads it
    if verb in _SHOWN_WHOLE:
        return line
    if verb not in VERBS and verb not in _ELSEWHERE:
        return _count(line)
    shown, rest = line[: len(verb)], line[len(verb) :]
    if verb == b"AUTH":
        name = rest.lstrip(b" ").partition(b" ")[0]
        if name.upper() in sasl.MECHANISMS:
            shown, rest = b"AUTH " + name, rest.partition(name)[2]
    return shown + (b" " + _count(rest.lstrip(b" ")) if rest else b"")


def _count(octets: bytes) -> bytes:
    return b"(%d octets)" % len(octets)
