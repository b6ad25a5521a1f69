"""qmail-smtpd: one SMTP session on two descriptors, composed from its parts.

`serve` is the whole program as a function: it reads the environment and the control files that it
is given, runs the session, and returns the exit status.  Nothing below it reads os.environ, keeps a
global state or exits, so that one process can serve many connections one after the other.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py
import sys
import time
from _signal import SIG_DFL, SIGCHLD, signal  # type: ignore[import-not-found]

from . import log, process, reply, trace
from .badmailfrom import BadMailFrom
from .conduct import Pace, Quota
from .connection import Connection
from .control import ControlFiles
from .effects import ControlError, Effects, Identity
from .rcpthosts import RcptHosts
from .session import CLOSED, TLS_HANDSHAKE, Session
from .settings import TIMEOUT, Sources, configuration
from .wire import ConnectionLost, HandedOver, TimedOut, Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .authfailures import AuthFailures
    from .effects import Delivery
    from .encryption import Encryption
    from .reply import Reply
    from .sasl import Credentials
    from .tls import CachedContexts

HOME = b"/var/qmail"

AUTH_FAILURES, AUTH_FAILURES_PERIOD = 30, 3600
"""How many failed AUTH attempts an address may have, in how many seconds, if they are counted."""


SHORTEST_WINDOW = 300
"""Seconds over which a client's pace is looked at, at least: a short timeout is no stopwatch."""

MOST_ERRORS = 100
"""Lines of `error` that a session may have in the log."""


class Resources:
    """What a process keeps from one connection to the next.

    `files` reads control files; `contexts` has TLS contexts, where there is more than one
    connection; `encryption` is what does TLS, once that is loaded; `left_children` are the process
    ids of qmail-queues and check programs that were given up and may not have ended yet; `log`
    writes the lines of sessions.  `start` is the directory that a relative qmail home is in.
    """

    __slots__ = (
        *("_date", "_home", "_second", "_start"),
        *("contexts", "encryption", "files", "left_children", "log"),
    )

    def __init__(
        self,
        files: ControlFiles,
        contexts: CachedContexts | None = None,
        start: bytes = b"",
        own_log: log.Log | None = None,
    ) -> None:
        self.log = own_log or log.Log()
        self.files = files
        self.contexts = contexts
        self._start = start
        self.left_children: list[int] = []
        self.encryption: type[Encryption] | None = None
        self._home: bytes | None = None
        self._second: int | None = None
        self._date = b""

    def date(self, second: int) -> bytes:
        """A time as header fields have it; of many messages in the same second it is the same."""
        if second != self._second:
            self._second, self._date = second, trace.date(second)
        return self._date

    def go_home(self, environ: Mapping[bytes, bytes]) -> None:
        """Make the qmail home the current directory; raises ControlError."""
        home = home_of(environ)
        if self._start and not home.startswith(b"/"):
            home = b"%s/%s" % (self._start, home)
        if home == self._home:
            return
        try:
            os.chdir(home)
        except OSError as error:
            why = f"cannot change to {log.text(home)}: {error.strerror} (uid {os.geteuid()})"
            raise ControlError(why) from None
        self._home = home
        self.files.refresh()  # those of another home are other files

    def forget_home(self) -> None:
        """Look for the qmail home once more: its name may be that of another directory by now."""
        if self._home and self._home.startswith(b"/"):
            self._home = None


class Server(Effects):
    """What a session may do, done for one connection.

    Made in the qmail home; reads the control files that every session needs, and raises
    ControlError where one is there and can not be read.
    """

    def __init__(
        self, environ: Mapping[bytes, bytes], arguments: Sequence[bytes], resources: Resources
    ) -> None:
        files = self._files = resources.files
        self._resources = resources
        self._environ = environ
        self._arguments = arguments
        self.connection = Connection(environ)
        wanted = configuration(environ, files, can_authenticate=bool(arguments))
        self._sources = Sources(environ, files)
        self.settings = wanted.settings
        self._ip_host = wanted.ip_host
        self.timeout = wanted.timeout
        self.longest_session = wanted.longest_session
        self.pace = Pace(wanted.least_rate, max(wanted.timeout, SHORTEST_WINDOW))
        may_relay = self.connection.relay_client is not None
        self.greeting_delay = 0 if may_relay else wanted.greeting_delay
        self._bad_mail_from = BadMailFrom(files)
        self._rcpt_hosts = RcptHosts(files)
        self.is_smtps = b"SMTPS" in environ and self.connection.cipher is None
        self._encryption: Encryption | None = None
        self._errors = Quota(MOST_ERRORS, "errors")

    @property
    def drops_early_talkers(self) -> bool:
        """Whether a client that can not wait for its greeting is turned away."""
        return self._sources.number(b"DROP_PRE_GREET", "droppregreet", 0) > 0

    def turns_early_talker_away(self) -> bool:
        """Log that the client spoke before its greeting; whether that turns it away."""
        is_dropped = self.drops_early_talkers
        code = reply.SPOKE_TOO_EARLY.code if is_dropped else None
        self.log("limit", {"code": code, "why": "spoke before the greeting"})
        return is_dropped

    def open_session(self) -> Session:
        """The session for the connection; one that is written down where SMTPTRACE says so."""
        where = self._environ.get(b"SMTPTRACE")
        if not where:
            return Session(self.connection, self.settings, self)
        from .transcript import transcript
        from .watched import WatchedSession

        written = transcript(where, self.connection.remote_ip, self.log)
        return WatchedSession(self.connection, self.settings, self, written)

    def close(self) -> None:
        """Give back what is open."""
        self._rcpt_hosts.close()
        self._encryption = None  # it logs through us: a circle, and listeners collect no garbage

    def now(self) -> int:
        return int(time.time())

    def date(self) -> bytes:
        return self._resources.date(self.now())

    def log(self, event: str, fields: Mapping[str, object]) -> None:
        if event != "error" or self._errors.allows(self.log):
            self._resources.log.write(event, fields, self.connection.remote_ip)

    # Policy

    def is_sender_blocked(self, sender: bytes) -> bool:
        return self._bad_mail_from.blocks(sender)

    def is_recipient_allowed(self, recipient: bytes) -> bool:
        return self._rcpt_hosts.allows(recipient)

    def localize(self, address: bytes) -> bytes:
        if self._ip_host is None or not address.endswith(b"]"):
            return address
        from .localip import localize

        return localize(address, self._ip_host)

    # Children

    def _child_environ(self, identity: Identity) -> dict[bytes, bytes]:
        environ = dict(self._environ)
        if self._encryption:
            environ.update(self._encryption.variables)
        now = {
            b"RELAYCLIENT": identity.relay_client,
            b"TCPREMOTEINFO": identity.remote_info,
            b"SMTPAUTHUSER": identity.user,
            b"SMTPAUTHMETHOD": identity.method,
            b"SMTP_AUTH_USER": identity.user,
        }
        for name, value in now.items():
            environ.pop(name, None)
            if value is not None:
                environ[name] = value
        return environ

    def open_delivery(self, identity: Identity) -> Delivery | None:
        from . import qmail_queue

        program = self._environ.get(b"QMAILQUEUE") or qmail_queue.DEFAULT_PROGRAM
        chosen = self._environ.get(b"QMAILQUEUE_CUSTOM_ERROR")
        with_text = chosen != b"0" if chosen else qmail_queue.writes_text(program)
        environ = self._child_environ(identity)
        left = self._resources.left_children
        delivery = qmail_queue.open_delivery(program, environ, left, with_text)
        if delivery is None:
            self.log("error", {"why": "no descriptors or processes for qmail-queue"})
        elif delivery.trouble:
            name, reason = log.text(program), delivery.trouble.strerror
            self.log("error", {"why": f"cannot start {name}: {reason} (uid {os.geteuid()})"})
        return delivery

    def new_challenge(self) -> bytes:
        return self._challenge(os.urandom(16).hex().encode())

    def _challenge(self, unique: bytes) -> bytes:
        """What is like a Message-ID (RFC 2195 section 2), with our name, or our address as the
        environment has it.
        """
        local_ip = self._environ.get(b"TCPLOCALIP", b"unknown")
        local = self._environ.get(b"TCPLOCALHOST", local_ip)
        return b"<%s.%d@%s>" % (unique, self.now(), local)

    def authenticate(self, credentials: Credentials, identity: Identity) -> Reply:
        from . import checkpassword

        failures = self.auth_failures()
        if failures and failures.are_too_many():
            return reply.AUTH_TOO_OFTEN
        return checkpassword.authenticate(
            self._arguments,
            checkpassword.fields(credentials, self.settings.auth.challenge_field),
            self._child_environ(identity),
            checkpassword.patience(self.timeout),
            self._log_error,
            self._resources.left_children,
            failures.end if failures else None,
        )

    def auth_failures(self) -> AuthFailures | None:
        """The failed attempts of this client's address; None where nobody counts them."""
        path = self._sources.line(b"AUTHFAILTABLE", "authfailtable")
        if not path:
            return None
        limit = self._sources.number(b"AUTHFAILLIMIT", "authfaillimit", AUTH_FAILURES)
        period = self._sources.number(b"AUTHFAILPERIOD", "authfailperiod", AUTH_FAILURES_PERIOD)
        if not limit or not period:
            return None
        from .authfailures import AuthFailures

        return AuthFailures(path, self.connection.remote_ip, limit, period, self._log_error)

    def _log_error(self, why: str) -> None:
        self.log("error", {"why": why})

    # TLS

    def offers_tls(self) -> bool:
        if b"SSLCTLFD" in self._environ and self.encryption.is_ucspi:
            return True
        try:
            return self._files.is_readable("servercert.pem")
        except ControlError as error:
            self.log("error", {"why": f"STARTTLS not offered: {error}"})
            return False

    @property
    def encryption(self) -> Encryption:
        """TLS for this connection; made, and its code loaded, when it is first asked for."""
        if self._encryption is None:
            kept = self._resources
            if kept.encryption is None:
                from .encryption import Encryption

                kept.encryption = Encryption
            self._encryption = kept.encryption(
                self._sources, self._arguments, self.connection, kept.contexts, self.log
            )
        return self._encryption

    def prepare_tls(self) -> Reply | None:
        return self.encryption.prepare()

    def preload(self) -> None:
        """Make the TLS context that this environment asks for; what is wrong goes to the log."""
        if self._resources.contexts and self.offers_tls():
            self.prepare_tls()

    def certified_client(self) -> tuple[bytes | None, bytes]:
        return self.encryption.certified_client()


def serve(
    wire: Wire,
    environ: Mapping[bytes, bytes],
    arguments: Sequence[bytes],
    resources: Resources,
    begin: Callable[[], bool] | None = None,
) -> int:
    """Serve one connection; the exit status: 0 after QUIT, 1 in every other case.

    `arguments` are the check program and its own arguments; `environ` is that of tcp-environ(5),
    with the variables of qmail-smtpd(8).  For a connection that is offered for TLS alone, there is
    `begin`: it is called when the handshake could begin, lets the wire have the connection, and
    says whether it did.  Until then whoever offers it goes on by itself.
    """
    server = None
    try:
        resources.go_home(environ)
        server = Server(environ, arguments, resources)
        wire.limit(server.timeout, server.longest_session)
        return _converse(wire, server, begin)
    except HandedOver as handed_over:
        return handed_over.exit_status
    except ControlError as error:
        resources.log.write("error", {"why": str(error)}, Connection(environ).remote_ip)
        if not begin:
            wire.write(reply.CONTROLS_UNREADABLE.render())
            if server:  # which has told of the connection, too
                server.log("disconnect", {"why": "closed"})
        return 1
    finally:
        wire.close()
        if server:
            server.close()


def _converse(wire: Wire, server: Server, begin: Callable[[], bool] | None) -> int:
    """Run the session to its end, whatever that is; the exit status."""
    connection = server.connection
    if not begin:
        ends = {"host": connection.remote_host, "local": connection.local}
        server.log("connect", {**ends, "port": connection.local_port})
        if connection.cipher is not None:
            server.log("tls", {"result": "ok", "cipher": connection.cipher})
    session = server.open_session()
    exit_status = 1
    try:
        why = _dialogue(wire, server, session, begin)
        exit_status = session.exit_status
    except TimedOut:
        why = "timeout"
    except ConnectionLost as error:
        why = str(error)
    finally:
        session.connection_lost()
    if why:
        server.log("disconnect", {"why": why})
    return exit_status


def _dialogue(
    wire: Wire, server: Server, session: Session, begin: Callable[[], bool] | None
) -> str:
    """Take turns with the client until the session is closed; why it was, empty where it was not
    ours to begin.
    """
    if server.is_smtps or begin:
        refusal = server.prepare_tls()
        if begin and (refusal or not begin()):
            return ""
        if refusal:
            wire.write(refusal.render())
            return "no TLS"
        session.tls_started(server.encryption.start(wire))
    if server.is_smtps or not begin:
        _greet(wire, server, session)
    while session.state != CLOSED:
        if session.state == TLS_HANDSHAKE:
            session.tls_started(server.encryption.start(wire))
        else:
            _take_turns(wire, server, session)
    return "closed" if session.exit_status else "quit"


def _greet(wire: Wire, server: Server, session: Session) -> None:
    """Open the session, and see whether the client can wait for it (RFC 5321 section 3.1)."""
    delay, early = server.greeting_delay, b""
    if delay:
        begin = time.monotonic()
        early = wire.read_early(delay)
        if early and server.turns_early_talker_away():
            wire.write(reply.SPOKE_TOO_EARLY.render())
            session.connection_lost()
            return
        time.sleep(max(0, begin + delay - time.monotonic()))
    wire.write(session.greet())
    if early:
        wire.write(session.receive(early))


def _take_turns(wire: Wire, server: Server, session: Session) -> None:
    """Read, and write the replies to it, as long as what comes is for the session."""
    while session.state not in (TLS_HANDSHAKE, CLOSED):
        was_half_sent = session.is_half_sent
        try:
            if session.is_paused:
                wire.check()
                data = b""
            else:
                data = wire.read()
        except TimedOut:
            if not wire.is_over:
                wire.write(session.time_out())
                raise
            wire.write(session.time_out(reply.SESSION_TOO_LONG))
            return
        waited = wire.waited() if was_half_sent else 0.0
        replies = session.receive(data)
        if not server.pace.keeps_up(len(data), waited, was_half_sent and session.is_half_sent):
            replies += session.time_out(reply.TOO_SLOW)
        wire.write(replies)


def main() -> int:
    """The program: descriptors 0 and 1, the environment and the arguments are the process's."""
    try:
        environ = process.environment()
        signal(SIGCHLD, SIG_DFL)  # where it is ignored, nobody hears what became of a message
        process.tidy_descriptors(_ucspi_descriptors(environ) if b"SSLCTLFD" in environ else ())
        coding = sys.getfilesystemencoding()
        arguments = [word.encode(coding, "surrogateescape") for word in sys.argv[1:]]  # PEP 383
        if b"REMOTE_ADDR" in environ:
            from .activation import tcp_environ

            environ = tcp_environ(environ, 0)
        process.give_no_tickets(environ)
        return serve(Wire(0, 1, TIMEOUT), environ, arguments, Resources(ControlFiles()))
    except (ConnectionLost, TimedOut, KeyboardInterrupt):
        return 1
    except MemoryError:
        why = log.OUT_OF_MEMORY
    except Exception as error:  # a defect: no traceback, as it could show what nobody may see
        why = f"internal error: {log.where(error)}"
    log.write("error", {"why": why})  # here, where the memory that an exception held is free
    return 1


def home_of(environ: Mapping[bytes, bytes]) -> bytes:
    """The qmail home."""
    return environ.get(b"QMAILHOME") or HOME


def _ucspi_descriptors(environ: dict[bytes, bytes]) -> list[int]:
    """Those that are there for STARTTLS, if they are usable; if not, the environment forgets them,
    as their numbers will be those of other descriptors.
    """
    from . import ucspitls

    connection = Connection(environ)
    try:
        if connection.cipher is None:
            return sorted(set(ucspitls.descriptors(environ)))
    except ucspitls.UcspiError as error:
        log.write("error", {"ip": connection.remote_ip, "why": f"no UCSPI-TLS: {error}"})
    del environ[b"SSLCTLFD"]
    return []
