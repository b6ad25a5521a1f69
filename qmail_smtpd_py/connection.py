"""What is known of a connection and of the administrator's wishes before the first octet is read.

Both are values, made once from an environment and the control files, and never changed: what is
learnt during the session is the session's own.
"""

from __future__ import annotations

from . import reply
from .conduct import Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .reply import Reply


class Connection:
    """The connection as tcpserver describes it in the environment (tcp-environ(5)).

    `remote_info`, `relay_client` and `local_port` are None where their variables are unset: an
    empty value means something else.  An IPv4 address in IPv6's clothes, as a socket for both
    has it (RFC 4291 section 2.5.5.2), is taken for what it is.  `cipher` is that of the TLS that is
    on already, by the program that started us, or None.
    """

    __slots__ = (
        "cipher",
        "local",
        "local_port",
        "relay_client",
        "remote_host",
        "remote_info",
        "remote_ip",
    )

    def __init__(self, environ: Mapping[bytes, bytes]) -> None:
        self.remote_ip = plain_ip(environ.get(b"TCPREMOTEIP", b"unknown"))
        self.remote_host = environ.get(b"TCPREMOTEHOST", b"unknown")
        self.remote_info = environ.get(b"TCPREMOTEINFO")
        local_ip = plain_ip(environ.get(b"TCPLOCALIP", b"unknown"))
        self.local = environ.get(b"TCPLOCALHOST", local_ip)
        self.local_port = environ.get(b"TCPLOCALPORT")
        self.relay_client = environ.get(b"RELAYCLIENT")
        self.cipher = cipher_in(environ)

    def without_remote(self) -> Connection:
        """The connection as if nothing were known of the client's end."""
        return Connection({b"TCPLOCALHOST": self.local})


def cipher_in(environ: Mapping[bytes, bytes]) -> bytes | None:
    """The cipher, if the variables that sslserver has from mod_ssl tell of TLS that is as new as
    ours would be; otherwise None.
    """
    protocol = environ.get(b"SSL_PROTOCOL", b"")
    if protocol[:6] != b"TLSv1." or protocol[6:] < b"2":
        return None
    return environ.get(b"SSL_CIPHER") or protocol


def plain_ip(ip: bytes) -> bytes:
    """The address, but for an IPv4 address that is mapped into IPv6: that one as IPv4."""
    return ip[7:] if ip[:7].lower() == b"::ffff:" and b"." in ip else ip


class AuthPolicy:
    """What SMTPAUTH says: the mechanisms on offer, in the order EHLO names them; whether MAIL needs
    authentication; whether the check program is given a third field, the CRAM-MD5 challenge.
    """

    __slots__ = ("challenge_field", "mechanisms", "required")

    def __init__(self, mechanisms: tuple[bytes, ...], required: bool) -> None:
        self.mechanisms = mechanisms
        self.required = required
        self.challenge_field = b"CRAM-MD5" in mechanisms


class Settings:
    """What the administrator set, from control files and variables.

    `greeting` is the name in the replies to connect, HELO, EHLO and QUIT; `databytes` the largest
    message in octets, 0 for no limit; `auth` what SMTPAUTH says; `can_authenticate` whether there
    is a check program; `force_tls` whether AUTH needs TLS, `require_tls` whether mail needs it, and
    `disable_tls` whether there is no STARTTLS; `force_auth_mail_from` whether who has authenticated
    may send as nobody else; `hide_host` whether Received leaves out where they are; `limits` is
    what the client may do.  What is said of it to clients is the same in many sessions: `opening`
    and `goodbye` are the replies to connect and QUIT.
    """

    __slots__ = (
        "_hellos",
        "auth",
        "can_authenticate",
        "databytes",
        "disable_tls",
        "force_auth_mail_from",
        "force_tls",
        "goodbye",
        "greeting",
        "hide_host",
        "limits",
        "opening",
        "require_tls",
    )

    def __init__(
        self,
        greeting: bytes,
        databytes: int,
        auth: AuthPolicy,
        can_authenticate: bool,
        force_tls: bool,
        require_tls: bool = False,
        disable_tls: bool = False,
        force_auth_mail_from: bool = False,
        hide_host: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.greeting = greeting
        self.databytes = databytes
        self.auth = auth
        self.can_authenticate = can_authenticate
        self.force_tls = force_tls
        self.require_tls = require_tls
        self.disable_tls = disable_tls
        self.force_auth_mail_from = force_auth_mail_from
        self.hide_host = hide_host
        self.limits = limits or Limits()
        self.opening = reply.greeting(greeting)
        self.goodbye = reply.goodbye(greeting)
        self._hellos: dict[tuple[bool, bool], Reply] = {}

    def hello(self, with_tls: bool, with_auth: bool) -> Reply:
        """The reply to EHLO (RFC 5321 section 4.1.1.1), with STARTTLS and AUTH or without."""
        kept = self._hellos.get((with_tls, with_auth))
        if kept is None:
            mechanisms = self.auth.mechanisms if with_auth else ()
            kept = reply.hello(self.greeting, with_tls, mechanisms, self.databytes)
            self._hellos[with_tls, with_auth] = kept
        return kept
