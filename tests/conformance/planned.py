"""A case without a process: the real session and control files, and children as it plans them.

Of the effects, what reads control files is the real thing, in the stage's home as the current
directory; qmail-queue, checkpassword and TLS are played, and leave the records that the stand-ins
would.
"""

from __future__ import annotations

import os

from qmail_smtpd_py import channel, log, qmail_queue, reply
from qmail_smtpd_py.checkpassword import fields
from qmail_smtpd_py.control import ControlFiles
from qmail_smtpd_py.effects import Delivery, Identity
from qmail_smtpd_py.sasl import Credentials
from qmail_smtpd_py.session import Session
from qmail_smtpd_py.smtpd import Resources, Server

from .cases import Case, Step, plan_of
from .stage import Record, Stage

NOW = 1700000000
CIPHER = b"TLS_TEST_CIPHER"

_CERTIFICATES: dict[str | None, tuple[str | None, str]] = {
    None: (None, ""),
    "client-alice.pem": ("alice@clients.example", ""),
    "client-carol.pem": ("carol@clients.example", ""),
    "client-expired.pem": (None, "certificate has expired"),
    "client-noemail.pem": (None, "contains no email address"),
    "client-revoked.pem": (None, "certificate revoked"),
    "client-stranger.pem": (None, "unable to get local issuer certificate"),
}

_SERVER_CERTIFICATES = {
    "@server-rsa.pem": None,
    "@server-ecdsa.pem": None,
    "@server-nokey.pem": b"no valid private key",
    "@server-wrongkey.pem": b"no valid private key",
}
"""What is wrong with a file for servercert.pem; any other text is no certificate."""


class PlannedDelivery(Delivery):
    """A qmail-queue that ends as planned."""

    def __init__(
        self, pid: int, plan: dict, environ: dict[str, str], records: list[Record]
    ) -> None:
        self.pid = pid
        self._plan = plan
        self._environ = environ
        self._records = records
        self._message: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._message.append(data)

    def close(self, envelope: bytes) -> reply.Reply | None:
        self._record(envelope)
        if "signal" in self._plan:
            return qmail_queue.CRASHED
        return qmail_queue.reply_to(self._plan["exit"])

    def cancel(self) -> None:
        self._record(b"")

    def _record(self, envelope: bytes) -> None:
        if self._plan.get("read", True):
            read = {0: b"".join(self._message), 1: envelope}
            self._records.append(Record([], self._environ, {}, read))


class PlannedChannel(channel.Channel):
    """TLS with what is known of the client's certificate."""

    def __init__(self, address: str | None, problem: str) -> None:
        self._known = address, problem

    def _client_certificate(self) -> tuple[str | None, str]:
        return self._known


class PlannedServer(Server):
    """The effects of a case; `deliveries`, `checks` and `lines` tell what was done and logged."""

    def __init__(self, case: Case, stage: Stage) -> None:
        environ = {name.encode(): value.encode("latin-1") for name, value in stage.env.items()}
        arguments = [os.fsencode(word) for word in stage.args]
        super().__init__(environ, arguments, Resources(ControlFiles()))
        self._case = case
        self._refused_by_sub = stage.programs["@false"].encode()
        self.deliveries: list[Record] = []
        self.checks: list[Record] = []
        self.lines: list[bytes] = []
        self.started = 0  # qmail-queues
        self._checked = 0
        self._challenges = 0

    def queued_by(self) -> range:
        """The process ids that qmail-queue had so far."""
        return range(1, self.started + 1)

    def now(self) -> int:
        return NOW

    def log(self, event: str, fields: dict[str, object]) -> None:
        self.lines.append(log.format_line(event, fields, self.connection.remote_ip))

    def _environ_of(self, identity: Identity) -> dict[str, str]:
        environ = self._child_environ(identity)
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in environ.items()}

    def open_delivery(self, identity: Identity) -> PlannedDelivery:
        self.started += 1
        plan = plan_of(self._case.queue, self.started)
        if not os.access(self._environ.get(b"QMAILQUEUE", qmail_queue.DEFAULT_PROGRAM), os.X_OK):
            plan = {"exit": 120, "read": False}
        return PlannedDelivery(self.started, plan, self._environ_of(identity), self.deliveries)

    def new_challenge(self) -> bytes:
        self._challenges += 1
        return self._challenge(b"%d" % self._challenges)

    def authenticate(self, credentials: Credentials, identity: Identity) -> reply.Reply:
        if not os.access(self._arguments[0], os.X_OK):
            return reply.AUTH_NO_CHILD
        self._checked += 1
        plan = plan_of(self._case.checkpassword, self._checked)
        argv = [os.fsdecode(word) for word in self._arguments]
        text = fields(credentials, self.settings.auth.challenge_field)
        self.checks.append(Record(argv, self._environ_of(identity), {}, {3: text}))
        if "signal" in plan or plan["exit"] == 111:
            return reply.AUTH_TROUBLE
        accepted = plan["exit"] == 0 and self._refused_by_sub not in self._arguments
        return reply.AUTHENTICATED if accepted else reply.AUTH_FAILED

    def prepare_tls(self) -> reply.Reply | None:
        file = self._case.control.get("servercert.pem")
        what = _SERVER_CERTIFICATES.get(str(file), b"missing certificate")
        if what:
            return reply.tls_unavailable(what, b"as planned")
        self._files.list("tlsserverciphers")
        return None

    def handshake(self, options: dict) -> None:
        """Make a handshake that is complete."""
        certificate = options.get("cert") if self.encryption.asks_for_certificates() else None
        self.encryption.channel = PlannedChannel(*_CERTIFICATES[certificate])


class Rehearsal:
    """A session on a stage, for one case; the stage's home must be the current directory."""

    def __init__(self, case: Case, stage: Stage) -> None:
        self.server = PlannedServer(case, stage)
        self.session = Session(self.server.connection, self.server.settings, self.server)
        self._is_greeted = False

    def greet(self) -> bytes:
        """The greeting, where it was not said yet."""
        is_greeted, self._is_greeted = self._is_greeted, True
        return b"" if is_greeted else self.session.greet()

    def take(self, step: Step) -> bytes:
        """What a step does beside sending octets; what the server says to that."""
        session = self.session
        if step.is_silence:
            return session.time_out()
        if step.close or (step.handshake is not None and step.outcome != "ok"):
            session.connection_lost()
        elif step.handshake is not None:
            self.server.handshake(step.handshake)
            session.tls_started(CIPHER)
        return b""

    def end(self) -> None:
        """Nothing more comes."""
        self.session.connection_lost()
        self.server.close()
