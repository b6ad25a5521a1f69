"""The SMTP session: octets in, octets out, and no input or output of its own.

Theory of operation.  `receive` takes whatever octets came and returns the replies to them; how the
octets are cut into pieces makes no difference.  `state` says one thing only: what the next octets
mean.  What else is known stands beside it, each fact with one place where it is set and one where
it is forgotten:

    transaction      set by MAIL; dropped by RSET, HELO, EHLO, DATA and TLS
    helo             set by HELO and EHLO; dropped by TLS
    user, method     set by AUTH; dropped by TLS; RSET and HELO leave them
    relay_client, remote_info
                     start as the environment has them; set by AUTH, a client certificate and
                     MAIL's AUTH=; TLS makes them what they were at the start
    cipher           set by TLS, once; at the start, if there is TLS already
    conduct          what was refused so far; nothing forgets it

A command is a row of VERBS: its name, the checks that must hold first (RFC 5321 section 4.3.2 can
be read off them) and its method.  A check returns the reply that refuses, or None.  A reply that is
marked final closes the session, and what came behind it is not looked at.
"""

from __future__ import annotations

from . import path, reply, sasl, trace
from . import transaction as mail  # not a name of it: see Program.late in launcher.py
from .conduct import OPENINGS, Conduct
from .effects import ControlError, Identity
from .lines import LineTooLong, Unread
from .reply import Reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import Connection, Settings
    from .effects import Effects
    from .transaction import Message, Transaction

    Check = Callable[["Session"], "Reply | None"]
    Verb = Callable[["Session", bytes], Reply]

COMMAND = 0
AUTH_RESPONSE = 1
MAIL_DATA = 2
TLS_HANDSHAKE = 3
CLOSED = 4
"""What the next octets mean."""

LINE_LIMIT = 16384
"""Octets in a command line, without its CR LF: 32 times what RFC 5321 section 4.5.3.1.4 asks."""


class Session:
    """One session; see the head of this file.

    `exit_status` is what the program ends with: 0 after QUIT, 1 in every other case;
    `is_half_sent` tells whether a command, or a message, is there in part and the rest is to come;
    `is_paused` whether `receive` has more to obey, though nothing more may come.
    """

    def __init__(self, connection: Connection, settings: Settings, effects: Effects) -> None:
        self.state = COMMAND
        self.exit_status = 1
        self.is_half_sent = self.is_paused = self._pauses = False
        self._connection = connection
        self._settings = settings
        self._effects = effects
        self._unread = Unread()
        self._replies: list[bytes] = []
        self._cipher = connection.cipher
        self._conduct = Conduct(settings.limits, effects.log)
        self._start_over()

    def _start_over(self) -> None:
        """Know no more of the client than the environment tells (RFC 3207 section 4.2)."""
        self._is_opening = True
        self._helo: bytes | None = None
        self._user: bytes | None = None
        self._method: bytes | None = None
        self._relay_client = self._connection.relay_client
        self._remote_info = self._connection.remote_info
        self._certificate: bytes | None = None
        self._certificate_asked = False
        self._no_certificate = b""
        self._transaction: Transaction | None = None
        self._message: Message | None = None
        self._exchange: sasl.Exchange | None = None
        self._mechanism = b""

    # The outside

    def greet(self) -> bytes:
        """The opening message."""
        return self._settings.opening.render()

    def receive(self, data: bytes) -> bytes:
        """Take in what the client sent; the replies to it.

        The session pauses before a check program and behind it, and behind a queue program, as they
        take time: what there is to tell, the client is to hear, if it is there yet, before more of
        what it pipelined is obeyed.
        """
        if self.state in (TLS_HANDSHAKE, CLOSED):
            return b""  # in clear behind STARTTLS, or behind the end: it must not count
        self._unread.add(data)
        self._pauses = False
        try:
            while not self._unread.is_empty() and not self._pauses:
                if self._replies and self._is_auth_next():
                    self._pauses = True
                elif not self._read_next():
                    break
        except ControlError as error:
            self._effects.log("error", {"why": str(error)})
            self._reply(reply.CONTROLS_UNREADABLE)
        has_more = not self._unread.is_empty()
        self.is_paused = self._pauses and has_more
        self.is_half_sent = self.state == MAIL_DATA or (has_more and not self.is_paused)
        replies, self._replies = self._replies, []
        return b"".join(replies)

    def _read_next(self) -> bool:
        """Read the next octets as what they are; False if they are not all there, or not for us."""
        if self.state == COMMAND:
            return self._read_command()
        if self.state == MAIL_DATA:
            return self._read_mail_data()
        return self.state == AUTH_RESPONSE and self._read_auth_response()

    def _is_auth_next(self) -> bool:
        """Whether a check program may be asked next."""
        if self.state != COMMAND:
            return self.state == AUTH_RESPONSE
        is_refused = self._user is not None or self._check_auth_available() is not None
        return not is_refused and self._unread.starts_with_verb(b"AUTH")

    def tls_started(self, cipher: bytes) -> None:
        """A handshake is complete: what was said before it counts no more."""
        self._start_over()
        self._cipher = cipher
        self.state = COMMAND

    def time_out(self, answer: Reply = reply.TIMEOUT) -> bytes:
        """The client was silent, or slow, for too long; what it is told."""
        if answer is not reply.TIMEOUT:
            self._conduct.end(answer)  # with a line in the log
        self._close(answer)
        return answer.render()

    def connection_lost(self) -> None:
        """Nothing more will come: a message that is not whole must not be queued."""
        self._close()

    def _reply(self, answer: Reply) -> None:
        self._replies.append(answer.render())
        if answer.final:
            self._close(answer)
        elif end := self._conduct.judge(answer):
            self._reply(end)

    def _close(self, answer: Reply | None = None) -> None:
        """End the session, and a message that is not whole with it; `answer` is why, if told."""
        message, self._message = self._message, None
        if message:
            self._log_mail(message, "cut-off", answer)
            message.delivery.cancel()
        self.state = CLOSED
        self._unread.discard()

    def _read_command(self) -> bool:
        """Obey the next command; False if there is none yet."""
        if self._is_opening and self._unread.starts_with(OPENINGS):
            self._reply(self._conduct.refuse_protocol(self._unread.take()))
            return False
        try:
            line = self._unread.line(LINE_LIMIT)
        except LineTooLong:
            self._is_opening = False
            self._reply(reply.LINE_TOO_LONG)
            return True
        if line is None:
            return False
        self._is_opening = False
        verb, _, argument = line.partition(b"\0")[0].partition(b" ")
        checks, obey = VERBS.get(verb.upper(), _UNKNOWN)
        for check in checks:
            if refusal := check(self):
                self._reply(refusal)
                return True
        self._reply(obey(self, argument.lstrip(b" ")))
        return True

    # Commands that leave the transaction alone (RFC 5321 section 4.1.1)

    def _noop(self, argument: bytes) -> Reply:
        return reply.OK

    def _vrfy(self, argument: bytes) -> Reply:
        return reply.CANNOT_VRFY

    def _help(self, argument: bytes) -> Reply:
        return reply.HELP

    def _unknown(self, argument: bytes) -> Reply:
        return reply.UNIMPLEMENTED

    def _quit(self, argument: bytes) -> Reply:
        self.exit_status = 0
        return self._settings.goodbye

    # Commands that end a transaction

    def _hello(self, argument: bytes) -> Reply:
        self._transaction = None
        same = argument.lower() == self._connection.remote_host.lower()
        self._helo = None if same else argument
        return Reply(250, self._settings.greeting)

    def _extended_hello(self, argument: bytes) -> Reply:
        self._hello(argument)
        with_tls = self._may_start_tls() and self._effects.offers_tls()
        return self._settings.hello(with_tls, with_auth=not self._auth_needs_tls())

    def _rset(self, argument: bytes) -> Reply:
        self._transaction = None
        return reply.FLUSHED

    # The transaction

    def _check_authorized(self) -> Reply | None:
        if self._user is None and self._settings.auth.required:
            return self._conduct.refuse(reply.AUTH_REQUIRED)
        return None

    def _check_mail(self) -> Reply | None:
        return None if self._transaction else reply.MAIL_FIRST

    def _check_rcpt(self) -> Reply | None:
        return None if self._transaction and self._transaction.count else reply.RCPT_FIRST

    def _address(self, argument: bytes) -> bytes:
        """The address in an argument; raises PathError."""
        return path.check_length(self._effects.localize(path.parse_path(argument)))

    def _mail(self, argument: bytes) -> Reply:
        try:
            sender = self._address(argument)
        except path.PathError as error:
            return self._conduct.refuse(reply.SYNTAX, why=str(error))
        if not self._may_send_as(sender):
            return self._conduct.refuse(reply.SENDER_NOT_USER, sender=sender)
        if not self._heed_parameters(argument):
            return self._conduct.refuse(reply.TOO_BIG, sender=sender)
        is_blocked = self._effects.is_sender_blocked(sender)
        self._transaction = mail.Transaction(sender, is_blocked, self._settings.limits.recipients)
        return reply.OK

    def _may_send_as(self, sender: bytes) -> bool:
        """Whether the sender is the user's own, where FORCEAUTHMAILFROM asks for that."""
        if self._user is None or not self._settings.force_auth_mail_from:
            return True
        return sender.lower() == self._user.lower()

    def _heed_parameters(self, argument: bytes) -> bool:
        """Take note of MAIL's parameters; False if SIZE (RFC 1870) is beyond databytes."""
        for word in path.parameters(argument):
            keyword, value = word[:5].upper(), word[5:]
            if keyword == b"SIZE=" and 0 < self._settings.databytes < path.number(value):
                return False
            # Only of a client that is trusted anyway (RFC 4954 section 5).
            if keyword == b"AUTH=" and self._relay_client is not None and self._remote_info is None:
                self._remote_info = path.decode_auth_parameter(value)
        return True

    def _rcpt(self, argument: bytes) -> Reply:
        transaction = self._transaction
        assert transaction  # _check_mail
        sender = transaction.sender
        try:
            recipient = self._address(argument)
        except path.PathError as error:
            return self._conduct.refuse(reply.SYNTAX, why=str(error), sender=sender)
        if transaction.blocked:
            return self._conduct.refuse(reply.SENDER_BLOCKED, sender=sender, recipient=recipient)
        if not self._may_send_to(recipient):
            denied = reply.relaying_denied(self._cipher is not None, self._no_certificate)
            return self._conduct.refuse(denied, sender=sender, recipient=recipient)
        recipient += self._relay_client or b""
        if not transaction.add(recipient):
            return self._conduct.refuse(
                reply.TOO_MANY_RECIPIENTS, sender=sender, recipient=recipient
            )
        return reply.OK

    def _may_send_to(self, recipient: bytes) -> bool:
        is_trusted = self._relay_client is not None
        return is_trusted or self._effects.is_recipient_allowed(recipient) or self._is_certified()

    def _is_certified(self) -> bool:
        """Whether a client certificate makes this a relaying client from now on; asked once."""
        if self._cipher is None or self._certificate_asked:
            return False
        self._certificate_asked = True
        self._certificate, self._no_certificate = self._effects.certified_client()
        if self._certificate is None:
            return False
        self._relay_client = b""
        return True

    # Mail data

    def _data(self, argument: bytes) -> Reply:
        assert self._transaction  # _check_mail
        transaction, self._transaction = self._transaction, None
        delivery = self._effects.open_delivery(self._identity())
        if delivery is None:
            return self._conduct.refuse(reply.NO_DELIVERY, sender=transaction.sender)
        self._message = mail.Message(transaction, delivery, self._settings.databytes)
        protocol = trace.protocol(self._cipher, self._user is not None, self._certificate)
        connection, helo = self._connection, self._helo
        if self._settings.hide_host and self._user is not None:
            connection, helo = connection.without_remote(), None
        date = self._effects.date()
        delivery.write(trace.received(connection, self._remote_info, helo, protocol, date))
        self.state = MAIL_DATA
        return reply.GO_AHEAD

    def _identity(self) -> Identity:
        return Identity(self._relay_client, self._remote_info, self._user, self._method)

    def _read_mail_data(self) -> bool:
        """Pass on the mail data that came; False if there is more to come."""
        message = self._message
        assert message  # set with the state
        text = message.data.receive(self._unread.take())
        if message.data.stray_newline:
            self._reply(reply.STRAY_NEWLINE)
            return False
        if not message.is_too_big:
            message.delivery.write(text)
        if not message.data.complete:
            return False
        self._unread.add(message.data.rest)
        self._message = None
        self.state = COMMAND
        self._reply(self._finish(message))
        return True

    def _finish(self, message: Message) -> Reply:
        """What became of a message that was read to its end."""
        if message.is_looping or message.is_too_big:
            message.delivery.cancel()
            answer = reply.TOO_MANY_HOPS if message.is_looping else reply.TOO_BIG
        else:
            refusal = message.delivery.close(message.transaction.envelope())
            answer = refusal or reply.accepted(self._effects.now(), message.delivery.pid)
        self._pauses = True
        self._log_mail(message, "accepted" if answer.code == 250 else "refused", answer)
        return answer

    def _log_mail(self, message: Message, result: str, answer: Reply | None = None) -> None:
        if result != "refused" or self._conduct.tells_refusal():
            self._effects.log("mail", message.facts(self._user, result, answer))

    # STARTTLS (RFC 3207)

    def _may_start_tls(self) -> bool:
        return self._cipher is None and not self._settings.disable_tls

    def _check_tls(self) -> Reply | None:
        if self._settings.require_tls and self._cipher is None:
            return self._conduct.refuse(reply.TLS_REQUIRED)
        return None

    def _starttls(self, argument: bytes) -> Reply:
        # What stands behind it was said in clear, whatever the answer: it must not count.
        self._unread.discard()
        if not self._may_start_tls():
            return reply.UNIMPLEMENTED
        if argument:
            return reply.STARTTLS_ARGUMENT
        if refusal := self._effects.prepare_tls():
            return refusal
        self.state = TLS_HANDSHAKE
        return reply.READY_FOR_TLS

    # AUTH (RFC 4954 section 4)

    def _check_auth_available(self) -> Reply | None:
        settings = self._settings
        available = settings.auth.mechanisms and settings.can_authenticate
        return None if available else reply.AUTH_UNAVAILABLE

    def _check_not_authenticated(self) -> Reply | None:
        return None if self._user is None else reply.AUTH_ALREADY

    def _check_no_transaction(self) -> Reply | None:
        return reply.AUTH_IN_TRANSACTION if self._transaction else None

    def _check_tls_for_auth(self) -> Reply | None:
        if not self._auth_needs_tls():
            return None
        self._effects.log("auth", {"result": "refused", "code": 538, "why": "AUTH without TLS"})
        return reply.AUTH_NEEDS_TLS

    def _auth_needs_tls(self) -> bool:
        return self._settings.force_tls and self._cipher is None

    def _auth(self, argument: bytes) -> Reply:
        name, _, initial = argument.partition(b" ")
        name = name.upper()
        if name not in self._settings.auth.mechanisms:
            return reply.AUTH_UNKNOWN_MECHANISM
        self._mechanism = name
        begin = sasl.MECHANISMS[name]
        self._exchange = begin(initial.lstrip(b" ") or None, self._effects.new_challenge)
        return self._continue(None)

    def _read_auth_response(self) -> bool:
        """Go on with the exchange; False if the response is not all there."""
        try:
            line = self._unread.line(sasl.LINE_LIMIT)
        except LineTooLong:
            self.state = COMMAND
            self._reply(reply.AUTH_LINE_TOO_LONG)
            return True
        if line is None:
            return False
        self.state = COMMAND
        canceled = line.partition(b"\0")[0] == b"*"
        self._reply(reply.AUTH_CANCELED if canceled else self._continue(line))
        return True

    def _continue(self, response: bytes | None) -> Reply:
        """The next challenge, or the outcome, of the exchange."""
        assert self._exchange
        try:
            challenge = self._exchange.send(response)  # type: ignore[arg-type]
        except StopIteration as end:
            return self._authenticate(end.value)
        except sasl.Malformed:
            return self._log_auth(reply.AUTH_MALFORMED)
        self.state = AUTH_RESPONSE
        return reply.challenge(sasl.encode(challenge))

    def _authenticate(self, credentials: sasl.Credentials) -> Reply:
        answer = self._effects.authenticate(credentials, self._identity())
        self._pauses = True
        if answer is reply.AUTHENTICATED:
            self._user = self._remote_info = credentials.user
            self._method = self._mechanism.lower()
            self._relay_client = b""
            self._certificate = None  # it is the user who vouches for the message now
        return self._log_auth(answer, credentials.user)

    def _log_auth(self, answer: Reply, user: bytes | None = None) -> Reply:
        ok = answer is reply.AUTHENTICATED
        fields = {
            "result": "ok" if ok else "failed",
            "mechanism": self._mechanism,
            "tls": "yes" if self._cipher else "no",
            "code": answer.code,
            "why": None if ok else answer.lines[0],
            "user": user,
        }
        if ok or answer is reply.AUTH_FAILED or self._conduct.tells_refusal():
            self._effects.log("auth", fields)
        return answer


_AUTH_CHECKS: tuple[Check, ...] = (
    Session._check_auth_available,
    Session._check_not_authenticated,
    Session._check_no_transaction,
    Session._check_tls_for_auth,
)

VERBS: dict[bytes, tuple[tuple[Check, ...], Verb]] = {
    b"HELO": ((Session._check_tls,), Session._hello),
    b"EHLO": ((), Session._extended_hello),
    b"STARTTLS": ((), Session._starttls),
    b"AUTH": (_AUTH_CHECKS, Session._auth),
    b"MAIL": ((Session._check_tls, Session._check_authorized), Session._mail),
    b"RCPT": ((Session._check_tls, Session._check_mail), Session._rcpt),
    b"DATA": ((Session._check_tls, Session._check_mail, Session._check_rcpt), Session._data),
    b"RSET": ((Session._check_tls,), Session._rset),
    b"VRFY": ((Session._check_tls,), Session._vrfy),
    b"HELP": ((Session._check_tls,), Session._help),
    b"NOOP": ((), Session._noop),
    b"QUIT": ((), Session._quit),
}
"""The commands: what must hold first, in this order, and what obeys."""

_UNKNOWN: tuple[tuple[Check, ...], Verb] = ((), Session._unknown)
