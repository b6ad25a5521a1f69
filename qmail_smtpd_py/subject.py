"""What qmail-smtpd-check looks at: one service, as it would be started for a client.

Settings come from `smtpd.Server`, the object that serves connections, made with control files that
remember what they were asked for: so what counts here is what counts there, and a control file that
is added to the program is checked without a word in this file.
"""

from __future__ import annotations

import os
import re

from .control import ControlFiles
from .effects import ControlError
from .remedies import explain
from .smtpd import Resources, Server, home_of
from .tcprules import Rules, RulesError
from .trial import CLIENT, Trial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    from .chain import Chain
    from .findings import Report

    Parsed = TypeVar("Parsed")

SERVICE_VARIABLES = (
    *("AUTHFAILLIMIT", "AUTHFAILPERIOD", "AUTHFAILTABLE", "BRTLIMIT", "DATABYTES", "DISABLETLS"),
    *("DROP_PRE_GREET", "FORCEAUTHMAILFROM", "FORCETLS", "HIDE_HOST", "MAXAUTHFAILURES"),
    *("MAXBADCOMMANDS", "MAXRCPT", "MINRATE", "QMAILHOME", "QMAILMAILDIR", "QMAILQUEUE"),
    *("QMAILQUEUE_CUSTOM_ERROR", "RELAYCLIENT", "REQUIRETLS", "SMTPAUTH", "SMTPD_GREETDELAY"),
    *("SMTPS", "SMTPTRACE", "SMTPUSERS", "TIMEOUTSESSION", "TLSCIPHERS", "TLSHELPER"),
    *("TLSMINVERSION", "TLSTICKETS"),
)
"""Variables that are known to be meant for qmail-smtpd, so that one that does not get there is an
error; of others it is a warning.
"""

_WITH_UNIT = re.compile(rb"[0-9]+ ?[A-Za-z]+")
"""A number that is meant to be more than its digits, which are what counts."""

_CIPHER = b"TLS_AES_256_GCM_SHA384"

USER_PORTS = (465, 587)
"""Where users send their mail, and no other host (RFC 8314)."""


class WatchedFiles(ControlFiles):
    """Control files that remember their names.  One that can not be read is told of, and counts as
    one that is not there, so that the others are looked at, too.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self.found: set[str] = set()
        self.unreadable: set[str] = set()

    def load(self, name: str, parse: Callable[[bytes | None], Parsed]) -> Parsed:
        try:
            return super().load(name, parse)
        except ControlError as error:
            self._tell(name, error)
            return parse(None)

    def open(self, name: str) -> int | None:
        try:
            descriptor = super().open(name)
        except ControlError as error:
            self._tell(name, error)
            return None
        if descriptor is not None:
            self.found.add(name)
        return descriptor

    def lacks(self, name: str) -> bool:
        return name in self.unreadable or super().lacks(name)

    def _tell(self, name: str, error: ControlError) -> None:
        self.unreadable.add(name)
        explain(str(error), self._report)

    def number(self, name: str, default: int) -> int:
        number = super().number(name, default)
        line = self.line(name)
        if line and not line.isdigit():
            what = f"control/{name}: {os.fsdecode(line)!a} counts as {number}"
            self._report.warning("not-a-number", what, "write digits only, without a unit")
        return number


class Subject:
    """The service: its environment and arguments, where it listens, and its limits.

    `default_rule` is what the rules set for a client that no other rule is for, None where it is
    turned away.  `unexported` are variables that the run file sets and does not export, and
    `may_have` says of one whether it may be set in a way that is not known; `is_found` is whether
    qmail-smtpd was found there, with its arguments.
    """

    def __init__(
        self, environ: Mapping[bytes, bytes], arguments: Sequence[bytes], chain: Chain, smtpd: str
    ) -> None:
        self.environ = dict(environ)
        self.arguments = arguments
        self.chain = chain
        self.smtpd = smtpd
        self.default_rule: dict[bytes, bytes] | None = {}
        self.unexported: set[str] = set()
        self.is_found = True
        self.may_have: Callable[[str], bool] = lambda name: False
        self.server: Server
        self.files: WatchedFiles

    @property
    def port(self) -> int | None:
        """The port, where that is known."""
        port = self.environ.get(b"TCPLOCALPORT", b"")
        return int(port) if port.isdigit() else self.chain.port

    @property
    def is_for_users(self) -> bool:
        """Whether it is a port for users."""
        return self.port in USER_PORTS

    @property
    def is_open(self) -> bool:
        """Whether strangers get as far as the program."""
        return self.chain.is_for_everybody and self.default_rule is not None

    @property
    def has_tls_in_front(self) -> bool:
        """Whether the server before the program does TLS: sslserver(1)."""
        return self.chain.server == "sslserver"

    @property
    def home(self) -> bytes:
        """The qmail home."""
        return home_of(self.environ)

    def path(self, name: str) -> str:
        """A path that is relative to the qmail home."""
        return os.path.join(os.fsdecode(self.home), name)

    def apply_rules(self, report: Report) -> None:
        """Take what the rules set for a stranger into the environment."""
        if self.chain.rules is None:
            return
        rules = Rules(self.chain.rules, self.chain.is_rules_file_optional)
        try:
            self.default_rule = rules.find(b"", None, None)
        except RulesError as error:
            explain(str(error), report)
            return
        self.environ.update(self.default_rule or {})

    def load(self, report: Report) -> bool:
        """Make the Server, in the qmail home; whether that was possible."""
        self.files = WatchedFiles(report)
        environ = self.session_environ()
        try:
            Resources(self.files).go_home(self.environ)
            self.server = Server(environ, self.arguments, Resources(self.files))
        except ControlError as error:
            if "me" not in self.files.unreadable:  # or it is told that it is missing, too
                explain(str(error), report)
            return False
        for name in SERVICE_VARIABLES:
            value = environ.get(name.encode(), b"")
            if _WITH_UNIT.fullmatch(value) and name != "TLSCIPHERS":
                what = f"{name}={os.fsdecode(value)} is no number"
                report.warning("not-a-number", what, "write digits only, without a unit")
        return True

    def session_environ(self) -> dict[bytes, bytes]:
        """The environment of a session with a stranger (tcp-environ(5))."""
        environ = {
            b"PROTO": b"TCP",
            b"TCPLOCALIP": b"127.0.0.1",
            b"TCPLOCALPORT": b"%d" % (self.port or 25),
            b"TCPREMOTEIP": CLIENT,
            b"TCPREMOTEPORT": b"65535",
            **self.environ,
        }
        if self.has_tls_in_front:
            # With -n TLS begins later, by sslserver's leave; what comes before can be tried.
            is_later = "-n" in self.chain.server_flags
            environ.update({b"DISABLETLS": b"1"} if is_later else {})
            if "-s" in self.chain.server_flags and not is_later:
                environ.update({b"SSL_PROTOCOL": b"TLSv1.3", b"SSL_CIPHER": _CIPHER})
        if self.chain.local_host is not None:
            environ.setdefault(b"TCPLOCALHOST", os.fsencode(self.chain.local_host))
        return environ

    def try_session(self, server_name: str | None = None, **options: object) -> Trial:
        """Have a session; see Trial.  It leaves no trace; only the first waits to be greeted."""
        trial = Trial(self.server.is_smtps, server_name)
        environ = self.session_environ()
        environ.pop(b"SMTPTRACE", None)
        if server_name or options:
            environ[b"SMTPD_GREETDELAY"] = b"0"
        return trial.run(
            self.smtpd,
            environ,
            self.arguments,
            {name: number for name, number in self.chain.limits.items() if number is not None},
            **options,  # type: ignore[arg-type]
        )
