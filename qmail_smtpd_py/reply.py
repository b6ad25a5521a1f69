"""Replies: what the server may say, and the only place where a reply becomes octets.

A reply has a code, one or more lines of text, and may be final: the session ends behind it.  Every
fixed reply is a constant here, named for its meaning; what differs from session to session is made
by a function at the end.  Texts are netqmail's to the octet, so that what administrators and their
filters know stays true; the enhanced status code (RFC 3463) stands in brackets as qmail puts it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Reply:
    """One reply (RFC 5321 section 4.2): code, lines of text, and whether the session ends."""

    __slots__ = ("_octets", "code", "final", "lines")

    def __init__(self, code: int, *lines: bytes, final: bool = False) -> None:
        self.code = code
        self.lines = lines
        self.final = final
        self._octets = b""

    def render(self) -> bytes:
        """The octets of the reply (RFC 5321 section 4.2.1), which are kept: most are constants."""
        if not self._octets:
            octets = b"%d %s\r\n" % (self.code, self.lines[-1])
            for line in self.lines[-2::-1]:
                octets = b"%d-%s\r\n%s" % (self.code, line, octets)
            self._octets = octets
        return self._octets

    def __repr__(self) -> str:
        return f"<Reply {self.code} {b' / '.join(self.lines)!r}>"


# Commands that are obeyed (RFC 5321 section 4.1.1).
OK = Reply(250, b"ok")
FLUSHED = Reply(250, b"flushed")
CANNOT_VRFY = Reply(252, b"send some mail, i'll try my best")
HELP = Reply(214, b"qmail-smtpd: RFC 5321 with AUTH, STARTTLS, PIPELINING, 8BITMIME and SIZE")
GO_AHEAD = Reply(354, b"go ahead")

# Commands that are wrong, or come at the wrong time.
UNIMPLEMENTED = Reply(502, b"unimplemented (#5.5.1)")
SYNTAX = Reply(555, b"syntax error (#5.5.4)")
LINE_TOO_LONG = Reply(500, b"line too long (#5.5.2)")
MAIL_FIRST = Reply(503, b"MAIL first (#5.5.1)")
RCPT_FIRST = Reply(503, b"RCPT first (#5.5.1)")

# Policy.
AUTH_REQUIRED = Reply(530, b"Authorization required (#5.7.1) ")
SENDER_NOT_USER = Reply(503, b"from and auth not the same (#5.5.1)")
SENDER_BLOCKED = Reply(553, b"sorry, your envelope sender is in my badmailfrom list (#5.7.1)")
TOO_MANY_RECIPIENTS = Reply(452, b"too many recipients (#4.5.3)")
TOO_BIG = Reply(552, b"sorry, that message size exceeds my databytes limit (#5.3.4)")
TOO_MANY_HOPS = Reply(554, b"too many hops, this message is looping (#5.4.6)")

# AUTH (RFC 4954 sections 4 and 6).
AUTHENTICATED = Reply(235, b"ok, go ahead (#2.0.0)")
AUTH_FAILED = Reply(535, b"authentication failed (#5.7.1)")
AUTH_CANCELED = Reply(501, b"auth exchange canceled (#5.0.0)")
AUTH_MALFORMED = Reply(501, b"malformed auth input (#5.5.4)")
AUTH_LINE_TOO_LONG = Reply(500, b"auth line too long (#5.5.6)")
AUTH_ALREADY = Reply(503, b"you're already authenticated (#5.5.0)")
AUTH_IN_TRANSACTION = Reply(503, b"no auth during mail transaction (#5.5.0)")
AUTH_UNAVAILABLE = Reply(503, b"auth not available (#5.3.3)")
AUTH_UNKNOWN_MECHANISM = Reply(504, b"auth type invalid (#5.5.1)")
AUTH_NEEDS_TLS = Reply(538, b"auth not available without TLS (#5.3.3)", final=True)
AUTH_NO_PIPE = Reply(454, b"oops, unable to open pipe and I can't auth (#4.3.0)")
AUTH_NO_CHILD = Reply(454, b"oops, child won't start and I can't auth (#4.3.0)")
AUTH_TROUBLE = Reply(454, b"oops, problem with child and I can't auth (#4.3.0)")
AUTH_TOO_OFTEN = Reply(454, b"too many failed auth attempts, try again later (#4.7.0)")

# STARTTLS (RFC 3207 section 4).
TLS_REQUIRED = Reply(530, b"Must issue a STARTTLS command first (#5.7.0)")
READY_FOR_TLS = Reply(220, b"ready for tls")
STARTTLS_ARGUMENT = Reply(501, b"Syntax error (no parameters allowed) (#5.5.4)")

# What ends a session.
CONTROLS_UNREADABLE = Reply(421, b"unable to read controls (#4.3.0)", final=True)
OUT_OF_MEMORY = Reply(421, b"out of memory (#4.3.0)", final=True)
TIMEOUT = Reply(451, b"timeout (#4.4.2)", final=True)
STRAY_NEWLINE = Reply(451, b"See https://cr.yp.to/docs/smtplf.html.", final=True)

# What ends a session that is abused (RFC 5321 section 3.8).
NOT_SMTP = Reply(421, b"this is SMTP, goodbye (#4.5.0)", final=True)
SPOKE_TOO_EARLY = Reply(554, b"SMTP protocol violation", final=True)
TOO_MANY_AUTH_FAILURES = Reply(421, b"too many failed auth attempts, goodbye (#4.7.0)", final=True)
TOO_MANY_BAD_COMMANDS = Reply(421, b"too many bad commands, goodbye (#4.5.0)", final=True)
TOO_MANY_BAD_RECIPIENTS = Reply(421, b"too many invalid addresses, goodbye (#4.3.0)", final=True)
TOO_SLOW = Reply(421, b"too slow, goodbye (#4.4.2)", final=True)
SESSION_TOO_LONG = Reply(421, b"session too long, goodbye (#4.4.2)", final=True)

# Delivery: qmail-queue could not be started for want of pipes or processes.
NO_DELIVERY = Reply(451, b"qqt failure (#4.3.0)")


def greeting(name: bytes) -> Reply:
    """The opening message of a session (RFC 5321 section 4.2)."""
    return Reply(220, name + b" ESMTP")


def hello(name: bytes, has_tls: bool, mechanisms: Sequence[bytes], databytes: int) -> Reply:
    """The answer to EHLO (RFC 5321 section 4.1.1.1), with what there is of extensions."""
    lines = [name]
    if has_tls:
        lines.append(b"STARTTLS")
    lines += [b"PIPELINING", b"8BITMIME"]
    if mechanisms:
        lines.append(b"AUTH " + b" ".join(mechanisms))
    return Reply(250, *lines, b"SIZE %d" % databytes)


def goodbye(name: bytes) -> Reply:
    """The answer to QUIT."""
    return Reply(221, name, final=True)


def challenge(text: bytes) -> Reply:
    """A server challenge of an AUTH exchange, in base64 (RFC 4954 section 4)."""
    return Reply(334, text)


def accepted(now: int, qp: int) -> Reply:
    """The promise that a message is queued: time in seconds, process id of qmail-queue."""
    return Reply(250, b"ok %d qp %d" % (now, qp))


def relaying_denied(tls: bool, reason: bytes = b"") -> Reply:
    """A recipient is not in rcpthosts; under TLS a client certificate did not help either."""
    text = b"sorry, that domain isn't in my list of allowed rcpthosts"
    if tls:
        text += b"; no valid cert for gatewaying"
        if reason:
            text += b": " + reason
    return Reply(553, text + b" (#5.7.1)")


def tls_unavailable(what: bytes, reason: bytes = b"") -> Reply:
    """TLS can not be started here (RFC 3207 section 4)."""
    return Reply(454, b"TLS " + what + (b": " + reason if reason else b"") + b" (#4.3.0)")
