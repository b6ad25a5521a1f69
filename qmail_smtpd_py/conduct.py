"""Conduct: what a client may do before the session ends with 421.

Each reply of the session is shown to `Conduct`, which counts those that refuse, by their code:

    500 501 502 504     no command, or a malformed one; not an AUTH exchange that was canceled
    535                 a failed AUTH attempt; so is one that was refused for those before it
    454 to AUTH         trouble with the check program, which is started anew each time
    553                 a recipient that is not taken

Behind the reply that reaches a limit comes a 421 (RFC 5321 section 3.8).  503 and 555 do not count:
a client that pipelines a hundred recipients behind a MAIL that is refused gets 503 to each.

`Pace` is the same for time: whether a client that sends a little now and then sends enough.
"""

from __future__ import annotations

from . import reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .reply import Reply


class Limits:
    """The most that a client may do of each kind in a session, or for `recipients` in a message; 0
    is no limit.
    """

    __slots__ = ("auth_failures", "bad_commands", "bad_recipients", "recipients")

    def __init__(
        self,
        auth_failures: int = 3,
        bad_commands: int = 20,
        bad_recipients: int = 0,
        recipients: int = 0,
    ) -> None:
        self.auth_failures = auth_failures
        self.bad_commands = bad_commands
        self.bad_recipients = bad_recipients
        self.recipients = recipients


_NOT_COUNTED, _BAD_COMMAND, _AUTH_FAILURE, _BAD_RECIPIENT, _AUTH_TROUBLE = range(5)

_BY_CODE = {
    500: _BAD_COMMAND,
    501: _BAD_COMMAND,
    502: _BAD_COMMAND,
    504: _BAD_COMMAND,
    535: _AUTH_FAILURE,
    553: _BAD_RECIPIENT,
}
"""What a reply counts as."""

_BY_REPLY = {
    reply.AUTH_CANCELED: _NOT_COUNTED,  # the client may (RFC 4954 section 4)
    reply.AUTH_TOO_OFTEN: _AUTH_FAILURE,
    reply.AUTH_TROUBLE: _AUTH_TROUBLE,
    reply.AUTH_NO_CHILD: _AUTH_TROUBLE,
    reply.AUTH_NO_PIPE: _AUTH_TROUBLE,
}
"""The same for those that mean something else than others with their code."""

_ENDS = {
    _BAD_COMMAND: ("bad_commands", reply.TOO_MANY_BAD_COMMANDS),
    _AUTH_FAILURE: ("auth_failures", reply.TOO_MANY_AUTH_FAILURES),
    _BAD_RECIPIENT: ("bad_recipients", reply.TOO_MANY_BAD_RECIPIENTS),
    # Not so few: a user with the right password may try again.
    _AUTH_TROUBLE: ("bad_commands", reply.TOO_MANY_AUTH_FAILURES),
}
"""Which of the Limits it is then, and the reply that ends the session there."""


_HTTP = ("GET", "POST", "HEAD", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "PRI")
_RTSP = ("DESCRIBE", "SETUP", "PLAY", "ANNOUNCE")
_SIP = ("INVITE", "REGISTER")

_OPENINGS: dict[bytes, str] = {
    **{b"%s " % method.encode(): "HTTP" for method in _HTTP},
    **{b"%s " % method.encode(): "RTSP" for method in _RTSP},
    **{b"%s " % method.encode(): "SIP" for method in _SIP},
    b"\x16\x03": "TLS",
    b"SSH-": "SSH",
    b"PROXY TCP": "PROXY protocol",
    b"PROXY UNKNOWN": "PROXY protocol",
    b"\x03\0\0": "RDP",
}
"""What other protocols begin with; none of it could be the start of a command of SMTP."""

OPENINGS: dict[bytes, tuple[bytes, ...]] = {}
"""Those, by their first two octets: most clients begin with two others."""

for _opening in _OPENINGS:
    OPENINGS[_opening[:2]] = (*OPENINGS.get(_opening[:2], ()), _opening)

MOST_REFUSALS = 100
"""Refusals in a session that the log is told of."""


class Quota:
    """Lines of a kind that a session may have in the log, lest one client should fill it."""

    __slots__ = ("_count", "_kind", "_most")

    def __init__(self, most: int, kind: str) -> None:
        self._most = most
        self._kind = kind
        self._count = 0

    def allows(self, tell: Callable[[str, Mapping[str, object]], None]) -> bool:
        """Take note of one more; whether there is a line for it.  `tell` takes one that says so
        when there is none any more.
        """
        self._count += 1
        if self._count == self._most + 1:
            tell("limit", {"why": f"more {self._kind} are not told"})
        return self._count <= self._most


class Conduct:
    """The conduct of one client; `tell` writes a line to the log, as Effects.log does."""

    __slots__ = ("_counts", "_limits", "_refusals", "_tell")

    def __init__(self, limits: Limits, tell: Callable[[str, Mapping[str, object]], None]) -> None:
        self._limits = limits
        self._counts: dict[int, int] = {}
        self._tell = tell
        self._refusals = Quota(MOST_REFUSALS, "refusals")

    def tells_refusal(self) -> bool:
        """Take note of a refusal that has a line in the log; whether there is one for it yet."""
        return self._refusals.allows(self._tell)

    def refuse(
        self,
        answer: Reply,
        sender: bytes | None = None,
        recipient: bytes | None = None,
        why: str | None = None,
    ) -> Reply:
        """The reply itself, with a line in the log for it, as long as they are not too many."""
        if self.tells_refusal():
            why = why or answer.lines[0].decode("latin-1")
            fields = {"result": "refused", "code": answer.code, "why": why}
            self._tell("mail", {**fields, "from": sender, "to": recipient})
        return answer

    def judge(self, answer: Reply) -> Reply | None:
        """Take note of a reply: the one that ends the session behind it, or None."""
        if answer.code < 400:
            return None
        kind = _BY_REPLY.get(answer, _BY_CODE.get(answer.code, _NOT_COUNTED))
        if kind == _NOT_COUNTED:
            return None
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        limit, end = _ENDS[kind]
        return self.end(end) if count == getattr(self._limits, limit) else None

    def refuse_protocol(self, octets: bytes) -> Reply:
        """The reply to octets that start with one of OPENINGS."""
        names = (name for opening, name in _OPENINGS.items() if octets.startswith(opening))
        return self.end(reply.NOT_SMTP, f"not SMTP: {next(names)}")

    def end(self, answer: Reply, why: str | None = None) -> Reply:
        """The reply itself, which ends the session, with a line in the log for it."""
        self._tell("limit", {"code": answer.code, "why": why or answer.lines[0]})
        return answer


class Pace:
    """Whether a client keeps up with `rate` octets a second, 0 for no limit, over `window` seconds.

    What counts is the time that is spent waiting for the client, as long as there is something half
    sent: a command, or a message.  A client that is silent altogether is not looked at here, as it
    runs out of time.
    """

    __slots__ = ("_octets", "_seconds", "_window", "rate")

    def __init__(self, rate: int, window: float) -> None:
        self.rate = rate
        self._window = window
        self._octets = 0
        self._seconds = 0.0

    def keeps_up(self, octets: int, seconds: float, is_half_sent: bool) -> bool:
        """Take note that so many octets came after so many seconds of waiting; `is_half_sent` tells
        that something was half sent before, and still is.
        """
        if not is_half_sent:
            self._octets, self._seconds = 0, 0.0
            return True
        self._octets += octets
        self._seconds += seconds
        if self._seconds < self._window:
            return True
        is_enough = self._octets >= self.rate * self._seconds
        self._octets, self._seconds = 0, 0.0
        return is_enough
