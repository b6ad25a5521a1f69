"""What the administrator set: variables of the environment first, control files behind them.

A variable can be set for one address, by tcprules, or for one port, in its run file; a control file
counts for all.  So where there are both, the variable wins.
"""

from __future__ import annotations

from .conduct import Limits
from .connection import AuthPolicy, Settings
from .effects import ControlError
from .path import number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import ControlFiles

TIMEOUT = 1200
"""Seconds of silence after which a client is given up, where control/timeoutsmtpd says nothing."""

LONGEST_SESSION = 86400
"""Seconds after which a session ends: 50 MB at 9600 bit/s take less."""

LEAST_RATE = 1
"""Octets a second that a client has to send, once it has begun to send something."""

LONGEST_TIMEOUT = 2_000_000
"""Seconds; what poll(2) takes, in milliseconds."""
_LARGEST_DATABYTES = 4294967294  # netqmail keeps it in 32 bits, and one less is its limit


class Sources:
    """Where settings come from, for one connection."""

    __slots__ = ("environ", "files")

    def __init__(self, environ: Mapping[bytes, bytes], files: ControlFiles) -> None:
        self.environ = environ
        self.files = files

    def line(self, variable: bytes, name: str) -> bytes | None:
        """The value of the variable, or else the first line of the control file, or None; raises
        ControlError.  An empty variable counts as unset.
        """
        return self.environ.get(variable) or self.files.line(name)

    def number(self, variable: bytes, name: str, default: int) -> int:
        """The number that the variable starts with, or else the control file's, or the default;
        raises ControlError.  A variable that does not start with a digit counts as unset.
        """
        value = self.environ.get(variable, b"")
        return number(value) if value[:1].isdigit() else self.files.number(name, default)

    def switch(self, variable: bytes) -> bool:
        """Whether the variable says yes: it is set, and neither empty nor 0."""
        return self.environ.get(variable, b"") not in (b"", b"0")


def auth_policy(smtpauth: bytes | None) -> AuthPolicy:
    """The policy that the value of SMTPAUTH stands for; None where the variable is unset.

    It fails closed where the C program is loose: anything that begins with `-`, or is `0`, is off,
    and anything that begins with `!` requires authentication.
    """
    if smtpauth is None or smtpauth == b"0" or smtpauth.startswith(b"-"):
        return AuthPolicy((), required=False)
    value = smtpauth.lower()
    required = value.startswith(b"!")
    if required:
        value = value[1:]
    if value.startswith(b"cram"):
        return AuthPolicy((b"CRAM-MD5",), required)
    if value.startswith(b"+cram"):
        return AuthPolicy((b"LOGIN", b"PLAIN", b"CRAM-MD5"), required)
    return AuthPolicy((b"LOGIN", b"PLAIN"), required)


def session_settings(sources: Sources, me: bytes | None, can_authenticate: bool) -> Settings:
    """What the session has to know; `me` is the line of control/me; raises ControlError."""
    files, environ = sources.files, sources.environ
    greeting = files.line("smtpgreeting")
    if greeting is None:
        greeting = me
    if greeting is None:
        raise ControlError("neither control/me nor control/smtpgreeting is there")
    databytes = files.number("databytes", 0)
    if b"DATABYTES" in environ:
        databytes = number(environ[b"DATABYTES"])
    require_tls = sources.switch(b"REQUIRETLS")
    return Settings(
        greeting,
        min(databytes, _LARGEST_DATABYTES),
        auth_policy(environ.get(b"SMTPAUTH")),
        can_authenticate,
        force_tls=require_tls or environ.get(b"FORCETLS") != b"0",
        require_tls=require_tls,
        disable_tls=sources.switch(b"DISABLETLS"),
        force_auth_mail_from=sources.switch(b"FORCEAUTHMAILFROM"),
        hide_host=sources.switch(b"HIDE_HOST"),
        limits=Limits(
            auth_failures=sources.number(b"MAXAUTHFAILURES", "maxauthfailures", 3),
            bad_commands=sources.number(b"MAXBADCOMMANDS", "maxbadcommands", 20),
            bad_recipients=sources.number(b"BRTLIMIT", "brtlimit", 0),
            recipients=sources.number(b"MAXRCPT", "maxrcpt", 0),
        ),
    )


class Configuration:
    """What the administrator wants for all connections with the same variables: `settings` are for
    the session, the others for whoever runs it; raises ControlError.

    `ip_host` is the domain of our own IP addresses; `timeout` is in seconds, `longest_session` too,
    0 for no limit, `least_rate` in octets a second, `greeting_delay` in seconds.
    """

    __slots__ = (
        "greeting_delay",
        "ip_host",
        "least_rate",
        "longest_session",
        "settings",
        "timeout",
    )

    def __init__(self, sources: Sources, can_authenticate: bool) -> None:
        files = sources.files
        me = files.line("me")
        self.settings = session_settings(sources, me, can_authenticate)
        ip_host = files.line("localiphost")
        ip_host = me if ip_host is None else ip_host
        # In an envelope a NUL would end the address.
        self.ip_host = None if ip_host is None else ip_host.partition(b"\0")[0]
        self.timeout = min(max(1, files.number("timeoutsmtpd", TIMEOUT)), LONGEST_TIMEOUT)
        self.longest_session = sources.number(b"TIMEOUTSESSION", "timeoutsession", LONGEST_SESSION)
        self.least_rate = sources.number(b"MINRATE", "minrate", LEAST_RATE)
        delay = sources.number(b"SMTPD_GREETDELAY", "greetdelay", 0)
        self.greeting_delay = min(delay, LONGEST_TIMEOUT)


_VARIABLES = (
    b"BRTLIMIT", b"DATABYTES", b"DISABLETLS", b"FORCEAUTHMAILFROM", b"FORCETLS", b"HIDE_HOST",
    b"MAXAUTHFAILURES", b"MAXBADCOMMANDS", b"MAXRCPT", b"MINRATE", b"REQUIRETLS", b"SMTPAUTH",
    b"SMTPD_GREETDELAY", b"TIMEOUTSESSION",
)  # fmt: skip
"""All that a configuration sees of the environment: it is the same for all clients that rules do
not set apart in these, and may be kept where control files are.
"""


def configuration(
    environ: Mapping[bytes, bytes], files: ControlFiles, can_authenticate: bool
) -> Configuration:
    """The configuration for connections with this environment; raises ControlError."""
    variables = tuple([(name, environ[name]) for name in _VARIABLES if name in environ])
    return files.derive((variables, can_authenticate), _configure)


def _configure(
    key: tuple[tuple[tuple[bytes, bytes], ...], bool], files: ControlFiles
) -> Configuration:
    variables, can_authenticate = key
    return Configuration(Sources(dict(variables), files), can_authenticate)
